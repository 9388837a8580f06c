import csv

import pytest
from synthetic_sweep import write_sweep, write_times

from experiments.fig3 import EXPERIMENT as FIG3
from experiments.table3 import EXPERIMENT as TABLE3
from moepp.records import read_json, write_json
from moepp.reports.comparison import compare
from moepp.reports.report import write_report
from moepp.reports.results import load_sweep_results
from moepp.reports.trend import trend


@pytest.fixture
def constants(tmp_path):
    """Loss 3 plus a tenth of the arm's place; the seeds of an arm are 0.02 apart."""
    arms = {arm: {seed: 3 + 0.1 * i + 0.02 * seed for seed in (0, 1)} for i, arm in enumerate(FIG3.arms)}
    directory = write_sweep(tmp_path, arms)
    write_json(directory / "sweep.json", read_json(directory / "sweep.json") | {"baseline": "constant_2"})
    return directory


def test_fig3_is_drawn_by_number_in_two_series_with_its_data(constants, tmp_path):
    write_report(FIG3, load_sweep_results(constants), tmp_path / "report")
    rows = list(csv.DictReader((tmp_path / "report/trend.csv").open()))
    numbers = {}
    for row in rows:
        numbers.setdefault(row["series"], []).append(float(row["number of constant experts"]))
    assert numbers == {"tau 0.75": [0, 1, 2, 4, 6], "equal FFN compute": [0, 1, 2, 4, 6]}
    four = [row for row in rows if row["arm"] == "constant_4"]
    assert len(four) == 2 and float(four[0]["val_loss"]) == pytest.approx(3.31)
    assert four[0]["val_loss"] == four[1]["val_loss"]
    assert float(four[0]["low"]) < 3.31 < float(four[0]["high"]) and four[0]["expert_forward_ms"] == ""
    assert "(trend.svg)" in (tmp_path / "report/report.md").read_text()


def test_series_are_told_apart_without_colour_and_drawn_with_intervals(constants):
    figure, _ = trend(compare(FIG3, load_sweep_results(constants)))
    [axes] = figure.axes
    looks = [(bars.lines[0].get_marker(), bars.lines[0].get_linestyle()) for bars in axes.containers]
    assert len(set(looks)) == 2 and all(bars.has_yerr for bars in axes.containers)
    first, second = (bars.lines[0].get_ydata() for bars in axes.containers)
    assert list(first) == pytest.approx([3.01, 3.11, 3.21, 3.31, 3.41]) and second[3] == first[3]


def test_arms_that_have_not_run_are_left_out(constants):
    (constants / "trials/constant_6-0/done").unlink()
    (constants / "trials/constant_6-1/done").unlink()
    _, rows = trend(compare(FIG3, load_sweep_results(constants)))
    assert "constant_6" not in [row[1] for row in rows] and len(rows) == 10


def test_a_baseline_outside_the_series_is_a_level_and_times_get_a_panel(tmp_path):
    write_sweep(tmp_path, {arm: {0: 3.0, 1: 3.1} for arm in TABLE3.arms})
    write_times(tmp_path, {arm: (10.0 + i, 1.0) for i, arm in enumerate(TABLE3.arms)})
    figure, rows = trend(compare(TABLE3, load_sweep_results(tmp_path)))
    assert len(figure.axes) == 2 and rows[-1][:3] == ["baseline", "vanilla", ""] and rows[-1][-1] == "10.0"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["vanilla", "MoE++"]
