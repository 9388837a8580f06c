"""Run records to mirror, and what of them is found in the store."""

from pathlib import Path

from mlflow import MlflowClient

from moepp.records import RunRecord, read_json, write_json

CONFIG = """
name: toy
seed: 3
model:
  {router: linear, selection: top_k, top_k: 2, gating_residual: true, balance: {tau: 0.75, form: switch, beta: 0.01},
   gate: released, logits_norm: null, capacity_factor: 1.1,
   experts: {ffn: 4, zero: 1, copy: 1, constant: 2}}
data: {corpus: sotu}
optim: {name: adamw, lr: 0.0005}
tags: {arm: zero+copy, baseline: vanilla, sweep: toy-smoke, size: tiny}
"""
BUDGET = {"total_params": 100, "active_params": 50, "flops_per_token": 861398.0, "tokens": 4096}
PROVENANCE = {
    "host": "box",
    "command": "run.py train",
    "git": {"sha": "abc", "dirty": True},
    "data": {"digest": "0123456789abcdef", "corpus": "speeches, public domain"},
}


def make_record(path: Path) -> RunRecord:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(CONFIG)
    write_json(path / "budget.json", BUDGET)
    write_json(path / "provenance.json", PROVENANCE)
    return RunRecord(path)


def make_sweep(runs, name) -> Path:
    directory = runs / name
    for trial in ("aaaa", "bbbb"):
        record = make_record(directory / trial)
        log(record, 1, 2)
        finish(record)
    trials = [{"arm": "a", "seed": 0, "path": "aaaa"}, {"arm": "b", "seed": 0, "path": "bbbb"}]
    about = {"name": "toy", "question": "Which expert?", "paper": "Table 5", "scale": "smoke", "baseline": "a"}
    write_json(directory / "sweep.json", {**about, "match": "tokens", "trials": trials})
    return directory


def store(runs) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{runs}/mlflow.db")


def run_of(record, runs):
    return store(runs).get_run(read_json(record.path / "mlflow.json")["run_id"])


def steps_in_store(record, runs, metric="train/loss"):
    run_id = read_json(record.path / "mlflow.json")["run_id"]
    return [point.step for point in store(runs).get_metric_history(run_id, metric)]


def artifacts(record, runs):
    """Path and text of everything that hangs on the record's run."""
    folder = Path(run_of(record, runs).info.artifact_uri.removeprefix("file://"))
    assert folder.is_relative_to(runs / "mlartifacts")
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def log(record, first, last):
    for step in range(first, last + 1):
        record.log(step, {"train/loss": 1 / step, "router/zero_share": 0.25})


def finish(record):
    record.log(record.metrics()[-1]["step"], {"final/train_seconds": 1.0})
    record.finish()
