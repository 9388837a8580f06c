import json

import pytest
from moepp.experiments.table6 import EXPERIMENT as TABLE6
from synthetic_sweep import compared, write_sweep, write_times

from moepp.reports.arm_runs import arm_runs, parent_metrics

FULL = "zero+copy+constant"
LOSSES = {"vanilla": {0: 3.2, 1: 3.26, 2: 3.17}, FULL: {0: 3.099, 1: 3.16, 2: 3.071}}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    directory = write_sweep(tmp_path_factory.mktemp("sweep"), LOSSES, {"vanilla": (12.0, 1.0), FULL: (10.0, 0.75)})
    write_times(directory, {"vanilla": (12.0, 1.0), FULL: (10.0, 0.75)})
    return compared(TABLE6, directory)


def test_the_parent_has_every_number_of_an_arm_with_its_interval(comparison):
    found = parent_metrics(comparison)
    mean, low, high = (found[f"report/{FULL}/val_loss_minus_baseline{end}"] for end in ("", "_low", "_high"))
    assert mean == pytest.approx(-0.1) and low < mean < high
    assert found[f"report/{FULL}/expert_forward_speedup"] == pytest.approx(1.2)
    assert found["report/vanilla/val_loss_low"] < found["report/vanilla/val_loss"] < 3.3
    assert "report/vanilla/val_loss_minus_baseline" not in found


def test_an_arms_curve_is_the_mean_over_its_seeds(comparison):
    found = arm_runs(comparison)
    assert list(found) == ["vanilla", FULL]
    tokens, loss = found["vanilla"].curves["val/loss"][-1]
    runs = comparison.results.runs["vanilla"].values()
    assert tokens == round(next(iter(runs)).curve[-1][0])
    assert loss == pytest.approx(sum(run.curve[-1][1] for run in runs) / 3)


def test_a_curve_has_the_points_that_all_seeds_have(tmp_path):
    directory = write_sweep(tmp_path, LOSSES, {"vanilla": (12.0, 1.0), FULL: (10.0, 0.75)})
    before = arm_runs(compared(TABLE6, directory))["vanilla"].curves["val/loss"]
    metrics = next(run.path for run in compared(TABLE6, directory).results.runs["vanilla"].values()) / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    first = next(line for line in lines if "val/loss" in line)
    del first["val/loss"]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert arm_runs(compared(TABLE6, directory))["vanilla"].curves["val/loss"] == before[1:]
