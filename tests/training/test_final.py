import pytest
from test_run import run

from moepp.config import load
from moepp.training.final import _speed
from moepp.training.settings import RunConfig, metrics_of


@pytest.mark.parametrize(
    "words",
    [["model=moepp", "trainer.average_checkpoints=2", "trainer.expert_timing=true"], ["model=dense", "cloze.points=1"]],
    ids=["moepp", "dense"],
)
def test_every_metric_that_a_run_logs_is_told_beforehand(overrides, words):
    record = run(overrides, *words)
    logged = {name for line in record.metrics() for name in line} - {"step", "time"}
    known = metrics_of(load(RunConfig, record.path / "config.yaml"))
    assert logged <= set(known) and len(known) == len(set(known))
    asked = [name for name in known if name.startswith(("final/averaged_val_", "final/expert_forward", "val/cloze"))]
    assert asked and {name for name in asked if "divergence" not in name and "bits" not in name} <= logged


def test_the_first_interval_of_several_holds_the_warm_up_and_counts_for_memory_alone():
    lines = [
        {"perf/tokens_per_s": 10.0, "perf/peak_mem_gib": 3.0},
        {"train/loss": 1.0},
        {"perf/tokens_per_s": 100.0, "perf/peak_mem_gib": 2.0},
        {"perf/tokens_per_s": 120.0, "perf/peak_mem_gib": 2.0},
    ]
    assert _speed(lines) == {"tokens_per_s": 110.0, "peak_mem_gib": 3.0}
    assert _speed(lines[:2]) == {"tokens_per_s": 10.0, "peak_mem_gib": 3.0}
    assert _speed(lines[1:2]) == {}
