import csv
import json

import pytest
from synthetic_sweep import write_sweep

from moepp.errors import UsageError
from moepp.reports.experiment import Context, Experiment, Findings
from moepp.reports.report import terminal, write_report
from moepp.statistics import style
from moepp.statistics.claims import Claim
from moepp.statistics.style import Figure
from moepp.statistics.tables import Table

EXPERIMENT = Experiment(
    name="demo", title="A demo", question="Is it so?", expected="it is.", measure=lambda context: REPORT,
    reference="Fig. 9", paper=(Table("paper", "As printed.", ("x", "y"), (("a", 0.5),)),), notes=("A choice.",),
)  # fmt: skip
DATA = Table("line", "A line.", ("x", "y"), ((1, 1 / 3), (2, None)))


def draw():
    figure, axes = style.axes_of(2, 1)
    axes.plot([1, 2], [1, 2])
    return figure


REPORT = Findings(
    tables=(Table("counts", "Counts.", ("what", "n", "share"), (("tokens", 12_345, 0.123456), ("none", None, None))),),
    figures=(Figure(DATA, draw),),
    claims=(
        Claim("y grows", "holds", 0.5, 0.25, 0.75, unit="points", p=0.0001, paper="it grows"),
        Claim("y ends", "undecided", note="One seed."),
    ),
    setup={"repeats": 3},
)  # fmt: skip
PROVENANCE = {
    "command": "python run.py reproduce demo", "scale": "smoke", "started": "2026-01-02T03:04:05",
    "hardware": {"cpu": "two cores"},
}  # fmt: skip


@pytest.fixture
def written(tmp_path):
    (tmp_path / "mine.csv").write_text("of somebody else")
    return write_report(EXPERIMENT, REPORT, tmp_path, PROVENANCE)


def test_it_says_what_it_wrote_and_deletes_nothing(written, tmp_path):
    assert {*written, tmp_path / "mine.csv"} == set(tmp_path.iterdir()) and written[0].name == "report.md"
    assert {path.name for path in written} >= {"line.svg", "line.png", "line.csv", "counts.csv", "provenance.json"}
    assert json.loads((tmp_path / "provenance.json").read_text())["repeats"] == 3


def test_csv_files_keep_seven_digits_and_the_report_four(written, tmp_path):
    rows = list(csv.reader((tmp_path / "counts.csv").open()))
    assert rows == [["what", "n", "share"], ["tokens", "12345", "0.123456"], ["none", "", ""]]
    text = (tmp_path / "report.md").read_text()
    assert "| tokens | 12,345 | 0.1235 |" in text and "| none | – | – |" in text
    assert list(csv.reader((tmp_path / "line.csv").open()))[1] == ["1", "0.3333333"]


def test_the_report_says_what_was_asked_expected_found_and_printed_in_the_paper(written, tmp_path):
    text = (tmp_path / "report.md").read_text()
    for part in ("# A demo", "**Is it so?** Beside the paper's Fig. 9", "Expected: it is.", "Hardware: cpu two cores.",
                 "- **holds**: y grows: 0.5 [0.25, 0.75] points, p <0.001. Paper: it grows.",
                 "- **undecided**: y ends. One seed.", "![A line.](line.svg)", "| a | 0.5 |",
                 "- A choice."):  # fmt: skip
        assert part in text


def test_the_terminal_shows_the_first_table_and_the_claims():
    lines = terminal(REPORT).splitlines()
    assert lines[1].split() == ["tokens", "12,345", "0.1235"]
    assert lines[-2].startswith("holds: y grows: 0.5 [0.25, 0.75] points")


def test_figures_repeat_byte_for_byte(written, tmp_path):
    before = (tmp_path / "line.svg").read_bytes(), (tmp_path / "line.png").read_bytes()
    write_report(EXPERIMENT, REPORT, tmp_path, PROVENANCE)
    assert ((tmp_path / "line.svg").read_bytes(), (tmp_path / "line.png").read_bytes()) == before


def test_a_study_finds_the_finished_runs_of_an_arm(tmp_path):
    write_sweep(tmp_path, {"vanilla": {0: 3.0, 1: 3.1}, "zero": {0: 3.2}})
    (tmp_path / "trials/vanilla-0/done").unlink()
    (tmp_path / "trials/zero-0/done").unlink()
    context = Context("laptop", {"zero_computation_experts": tmp_path})
    assert context.run_directories("zero_computation_experts", "vanilla") == {1: tmp_path / "trials/vanilla-1"}
    assert context.results("zero_computation_experts").runs["vanilla"][1].seed == 1
    with pytest.raises(UsageError, match="no finished run of arm zero"):
        context.run_directories("zero_computation_experts", "zero")


def test_an_option_that_names_no_file_is_refused(tmp_path):
    context = Context("laptop", options={"pos": str(tmp_path), "tasks_dir": f"{tmp_path}/nothing"})
    assert context.path("pos") == tmp_path and context.path("weights") is None
    with pytest.raises(UsageError, match=r"tasks_dir=.*nothing: there is no such file or folder"):
        context.path("tasks_dir")
