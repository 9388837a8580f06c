import statistics

import pytest

from experiments import table4
from moepp.analysis.study import StudyContext
from moepp.errors import UsageError
from moepp.evaluation.results import About, Example, TaskResult
from moepp.evaluation.tasks import PAPER_SHOTS


def test_published_averages_are_those_of_the_published_scores():
    assert set(table4.AVERAGES) == set(table4.PUBLISHED) and tuple(PAPER_SHOTS) == table4.TASKS
    for model, (_, scores) in table4.PUBLISHED.items():
        if None not in scores:
            assert statistics.fmean(scores) == pytest.approx(table4.AVERAGES[model], abs=0.051)


def test_without_weights_one_line_says_what_to_give():
    with pytest.raises(UsageError, match=r"reproduce table4 weights=DIR"):
        table4.measure(StudyContext("paper"))


def test_scores_are_judged_against_the_printed_ones(monkeypatch, tmp_path):
    def scored(source, tasks, folder, limit):
        assert (source, tasks, folder, limit) == (tmp_path, "sciq", None, 20)
        examples = tuple(
            Example(str(i), -2.0, 4, {"acc": float(i < 18), "acc_norm": float(i < 5)}, (), None) for i in range(20)
        )
        yield TaskResult(About("sciq", 0, 20, "hub:sciq", "", "0.4.13", {"sciq": "1"}, 2048), examples)

    monkeypatch.setattr("moepp.evaluation.commands.scored", scored)
    options = {"weights": str(tmp_path), "tasks": "sciq", "limit": "20"}
    report = table4.measure(StudyContext("paper", options=options))
    [row] = report.tables[0].rows
    assert row[:6] == ("sciq", 0, 20, 0.0, 89.7, 90.0) and row[6] == 25.0 and row[7] is None
    assert [(claim.verdict, claim.paper) for claim in report.claims] == [("holds", "89.7"), ("fails", "89.7")]
    assert report.claims[0].effect == pytest.approx(0.3)
