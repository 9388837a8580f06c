import json

import pytest
from reports.synthetic_sweep import write_run

from moepp.config import load, save
from moepp.records import RunRecord, read_json
from moepp.sweeps.sharing import share_finished_runs
from moepp.sweeps.spec import Scale, Sweep, Trial
from moepp.training.settings import RunConfig


@pytest.fixture
def trial(overrides):
    sweep = Sweep(name="second", arms={"plain": ["model=vanilla"]}, scales={"smoke": Scale()}, baseline="plain")
    [found] = sweep.trials("smoke", overrides, seeds=[0])
    return found


def other(trial: Trial) -> RunRecord:
    """The same run, finished by another sweep under another arm's name."""
    record = write_run(trial.directory.parent.parent / "first-smoke" / trial.directory.name, 3.0)
    save(trial.config, record.path / "config.yaml")
    record.checkpoints.mkdir()
    (record.checkpoints / "final.ckpt").write_bytes(b"weights")
    (record.path / "tokenizer.json").write_text("{}")
    (record.path / "mlflow.json").write_text("{}")
    return record


def test_a_finished_run_of_another_sweep_is_taken_over(trial):
    source = other(trial)
    assert share_finished_runs([trial]) == 1
    record = RunRecord(trial.directory)
    assert record.status == "done" and record.final() == source.final()
    assert load(RunConfig, record.path / "config.yaml").tags["arm"] == "plain"
    assert read_json(record.path / "provenance.json")["trained_as"] == f"first-smoke/{trial.directory.name}"
    assert (record.checkpoints / "final.ckpt").samefile(source.checkpoints / "final.ckpt")
    assert (record.path / "tokenizer.json").samefile(source.path / "tokenizer.json")
    assert not (record.path / "metrics.jsonl").samefile(source.path / "metrics.jsonl")
    assert not (record.path / "mlflow.json").exists()  # it becomes a run of its own there
    assert [path.name for path in trial.directory.parent.iterdir()] == [trial.directory.name]


def test_neither_an_unfinished_run_nor_one_that_is_here_is_touched(trial):
    source = other(trial)
    (source.path / "done").unlink()
    assert share_finished_runs([trial]) == 0 and not trial.directory.exists()
    source.finish()
    trial.directory.mkdir(parents=True)
    assert share_finished_runs([trial]) == 0 and list(trial.directory.iterdir()) == []


def test_a_run_that_was_begun_before_a_default_changed_is_not_taken_over(trial):
    source = other(trial)
    text = (source.path / "config.yaml").read_text()
    (source.path / "config.yaml").write_text(text.replace("eps: 1.0e-08", "eps: 1.0e-05"))
    assert text.count("eps: 1.0e-08") == 1 and share_finished_runs([trial]) == 0


def test_another_seed_is_another_run(trial):
    other(trial)
    trial.config.seed = 1
    assert share_finished_runs([trial]) == 0


def test_the_metrics_of_a_copy_can_be_rewritten_alone(trial):
    source = other(trial)
    share_finished_runs([trial])
    RunRecord(trial.directory).log(101, {"final/more": 1.0})
    assert "more" not in source.final()
    assert json.loads((source.path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 100
