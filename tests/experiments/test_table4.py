import statistics

import pytest
from scipy import stats

from moepp.errors import UsageError
from moepp.evaluation.results import About, Example, TaskResult
from moepp.evaluation.tasks import PAPER_SHOTS
from moepp.experiments import table4
from moepp.reports.experiment import Context


def test_published_averages_are_those_of_the_published_scores():
    assert set(table4.AVERAGES) == set(table4.PUBLISHED) and tuple(PAPER_SHOTS) == table4.TASKS
    for model, (_, scores) in table4.PUBLISHED.items():
        if None not in scores:
            assert statistics.fmean(scores) == pytest.approx(table4.AVERAGES[model], abs=0.051)


def test_without_weights_one_line_says_what_to_give():
    with pytest.raises(UsageError, match=r"reproduce table4 weights=DIR"):
        table4.measure(Context("paper"))


def result(task: str, n: int, **shares: float) -> TaskResult:
    """`shares`: metric -> share of the examples that it counts as right."""
    examples = tuple(
        Example(str(i), -2.0, 4, {name: float(i < round(share * n)) for name, share in shares.items()})
        for i in range(n)
    )
    return TaskResult(About(task, 0, None, "hub:x", "", "0.4.13", {task: "1"}, 2048, examples=n), examples)


@pytest.fixture
def verdicts(monkeypatch, tmp_path):
    def measure(*results):
        monkeypatch.setattr("moepp.evaluation.commands.scored", lambda *_: iter(results))
        report = table4.measure(Context("paper", options={"weights": str(tmp_path)}))
        return report, [claim.verdict for claim in report.claims]

    return measure


def test_a_task_has_one_claim_of_its_closer_metric(verdicts):
    report, found = verdicts(result("hellaswag", 10_000, acc=0.55, acc_norm=0.723))
    assert found == ["holds"]
    assert report.claims[0].statement == "hellaswag: acc_norm lies within 2 points of the printed score"
    assert report.claims[0].effect == pytest.approx(0.0) and report.claims[0].paper == "72.3"


def test_a_whole_text_has_bits_per_byte_and_no_claim(verdicts):
    report, found = verdicts(result("wikitext", 3))
    text, mean = report.tables[0].rows
    assert found == [] and (text[0], mean[0]) == ("wikitext", "mean") and text[5:9] == mean[5:9] == (None,) * 4
    assert text[9] == mean[9] > 0


@pytest.mark.parametrize(
    ("share", "n", "verdict"),
    [
        (1.0, 5, "undecided"),  # five examples settle nothing, also where their scatter is zero
        (0.8, 5, "undecided"),
        (0.897, 1000, "undecided"),  # equal, but the interval exceeds the margin
        (0.897, 10_000, "holds"),
        (0.87, 1000, "undecided"),
        (0.80, 1000, "fails"),
    ],
)
def test_verdicts_are_those_of_an_equivalence_test(verdicts, share, n, verdict):
    assert verdicts(result("sciq", n, acc=share))[1] == [verdict]


def test_claims_are_corrected_over_the_tasks(verdicts):
    """Alone within the margin, but not as one of three."""
    near = result("sciq", 1100, acc=0.897)
    alone, among = verdicts(near)[0], verdicts(near, result("piqa", 10, acc=0.8), result("boolq", 10, acc=0.7))[0]
    assert among.claims[0].p == pytest.approx(3 * alone.claims[0].p)
    assert (alone.claims[0].verdict, among.claims[0].verdict) == ("holds", "undecided")


def test_means_stand_beside_the_papers(verdicts):
    results = [result(task, 1000, acc=score / 100) for task, score in table4.PAPER.items()]
    rows = {row[0]: row for row in verdicts(*results)[0].tables[0].rows}
    assert rows["mean"][4] == pytest.approx(table4.AVERAGES[table4.MOEPP], abs=0.05) == rows["mean"][5]
    assert rows["mean without BoolQ"][4] == pytest.approx(rows["mean without BoolQ"][5], abs=0.05)
    assert rows["mean without BoolQ"][4] == pytest.approx((11 * rows["mean"][4] - 68.3) / 10)
    assert [row[0] for row in verdicts(result("sciq", 5, acc=1.0))[0].tables[0].rows] == ["sciq", "mean"]


def test_a_share_is_tested_from_both_sides():
    greater, less = (stats.binomtest(880, 1000, p, side).pvalue for p, side in ((0.86, "greater"), (0.9, "less")))
    assert table4._tests(880, 1000, 0.86, 0.9)[0] == pytest.approx(max(greater, less))
    beyond = stats.binomtest(880, 1000, 0.9, "less").pvalue
    assert table4._tests(880, 1000, 0.9, 0.95)[1] == pytest.approx(beyond)
