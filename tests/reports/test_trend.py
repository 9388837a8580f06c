import csv

import pytest
from omegaconf import OmegaConf
from synthetic_sweep import compared, write_sweep, write_times, written

from moepp.records import read_json, write_json
from moepp.reports.arms import of_sweep
from moepp.reports.trend import trend

BALANCE = {"form": "switch", "control": None, "beta": 0.01}
CONSTANTS, TAU = of_sweep("constant_experts"), of_sweep("tau")


def write_settings(directory, key, values):
    """Adds to the frozen config of every run what its arm sets."""
    for trial in read_json(directory / "sweep.json")["trials"]:
        name, part = key.rsplit(".", 1)
        config = directory / trial["path"] / "config.yaml"
        tree = OmegaConf.load(config)
        OmegaConf.update(tree, f"{name}.{part}", values[trial["arm"]])
        OmegaConf.save(tree, config)


@pytest.fixture
def constants(tmp_path):
    """Loss 3 plus a tenth of the arm's place; the seeds of an arm are 0.02 apart."""
    names = CONSTANTS.measure.design.arms
    arms = {arm: {seed: 3 + 0.1 * i + 0.02 * seed for seed in (0, 1)} for i, arm in enumerate(names)}
    directory = write_sweep(tmp_path, arms)
    write_json(directory / "sweep.json", read_json(directory / "sweep.json") | {"baseline": "constant_2"})
    write_settings(directory, "model.experts.constant", {arm: int(arm.split("_")[1]) for arm in arms})
    return directory


def test_arms_are_drawn_by_what_they_set_in_two_series_with_their_data(constants, tmp_path):
    written(CONSTANTS, constants, tmp_path / "report")
    rows = list(csv.DictReader((tmp_path / "report/trend.csv").open()))
    numbers = {}
    for row in rows:
        numbers.setdefault(row["series"], []).append(float(row["model.experts.constant"]))
    assert numbers == {"tau 0.75": [0, 1, 2, 4, 6], "equal FFN compute": [0, 1, 2, 4, 6]}
    four = [row for row in rows if row["arm"] == "constant_4"]
    assert len(four) == 2 and float(four[0]["val_loss"]) == pytest.approx(3.31)
    assert four[0]["val_loss"] == four[1]["val_loss"]
    assert float(four[0]["low"]) < 3.31 < float(four[0]["high"]) and four[0]["expert_forward_ms"] == ""
    assert "(trend.svg)" in (tmp_path / "report/report.md").read_text()


def test_series_are_told_apart_without_colour_and_drawn_with_intervals(constants):
    [axes] = trend(compared(CONSTANTS, constants)).draw().axes
    looks = [(bars.lines[0].get_marker(), bars.lines[0].get_linestyle()) for bars in axes.containers]
    assert len(set(looks)) == 2 and all(bars.has_yerr for bars in axes.containers)
    first, second = (bars.lines[0].get_ydata() for bars in axes.containers)
    assert list(first) == pytest.approx([3.01, 3.11, 3.21, 3.31, 3.41]) and second[3] == first[3]


def test_arms_that_have_not_run_are_left_out(constants):
    (constants / "trials/constant_6-0/done").unlink()
    (constants / "trials/constant_6-1/done").unlink()
    rows = trend(compared(CONSTANTS, constants)).data.rows
    assert "constant_6" not in [row[1] for row in rows] and len(rows) == 9


def test_records_without_the_axis_have_no_trend(tmp_path):
    write_sweep(tmp_path, {arm: {0: 3.0, 1: 3.1} for arm in TAU.measure.design.arms})
    assert trend(compared(TAU, tmp_path)) is None


def test_a_baseline_outside_the_series_is_a_level_and_times_get_a_panel(tmp_path):
    arms = TAU.measure.design.arms
    write_sweep(tmp_path, {arm: {0: 3.0, 1: 3.1} for arm in arms})
    write_times(tmp_path, {arm: (10.0 + i, 1.0) for i, arm in enumerate(arms)})
    write_settings(tmp_path, "model.balance", {arm: BALANCE for arm in arms})
    write_settings(tmp_path, "model.balance.tau", {arm: 0.1 * i for i, arm in enumerate(arms)})
    found = trend(compared(TAU, tmp_path))
    figure, last = found.draw(), found.data.rows[-1]
    assert len(figure.axes) == 2 and last[:3] == ("baseline", "vanilla", None) and last[-1] == 10.0
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["vanilla", "MoE++"]
