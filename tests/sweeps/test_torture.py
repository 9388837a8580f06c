"""Workers and trials are killed at random and the tracker is shut; the promise holds: every trial once, none lost, each
step once in the records and in MLflow, and the table is that of a sweep that nobody disturbed.
"""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import run_fake_sweep

from moepp.config import CONF
from moepp.records import RunRecord, read_json
from moepp.sweeps.runner import run_sweep
from moepp.tracking.mirror import sync_all
from moepp.tracking.mlflow_store import connect
from moepp.tracking.settings import TrackingConfig

TRIALS, WORKERS, KILLS, STEPS = 12, 4, 10, 20
SHUT_AT, SECONDS_SHUT = (3, 7), 1.0  # before which kills the tracker takes nothing for a while
OPTIONS = {"arms": TRIALS, "retries": KILLS, "workers": WORKERS, "one_share": True, "stale": 2.0, "progress": False}


def store(runs) -> str:
    return f"sqlite:///{runs}/mlflow.db"


def start_worker(runs) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(CONF.parent), "SECONDS_PER_STEP": "0.05"}
    options = json.dumps(OPTIONS | {"extra": ["tracking.backend=mlflow", f"tracking.uri={store(runs)}"]})
    command = [sys.executable, str(Path(__file__).with_name("run_fake_sweep.py")), str(runs), options]
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def trial_processes(directory: Path) -> list[int]:
    """Those that live now and are known by their config to be ours."""
    found = []
    for path in directory.glob("*/attempts"):
        for line in lines(path)[-1:]:
            command = Path(f"/proc/{line.split()[0]}/cmdline")
            with suppress(OSError):
                if str(path.parent).encode() in command.read_bytes():
                    found.append(int(line.split()[0]))
    return found


def shut(runs: Path) -> None:
    """Locks the tracker's file, so that whoever writes to it waits or gives up."""
    with closing(sqlite3.connect(runs / "mlflow.db", timeout=30)) as database:
        database.execute("BEGIN EXCLUSIVE")
        time.sleep(SECONDS_SHUT)


def records(directory: Path) -> dict[str, RunRecord]:
    plan = read_json(directory / "sweep.json")["trials"]
    return {trial["arm"]: RunRecord(directory / trial["path"]) for trial in plan}


def test_a_tortured_sweep_keeps_its_promise(tmp_path, monkeypatch):
    chance = random.Random(0)
    directory = tmp_path / "runs" / "toy-smoke"
    tracking = TrackingConfig(uri=store(tmp_path / "runs"))
    client, _ = connect(tracking, tmp_path / "runs")  # makes the store: MLflow does not survive being killed in that
    workers = [start_worker(tmp_path / "runs") for _ in range(WORKERS)]
    killed_trials = killed_workers = 0
    try:
        while not trial_processes(directory):
            time.sleep(0.05)
        for kill in range(KILLS):
            time.sleep(chance.uniform(0.1, 0.5))
            if kill in SHUT_AT:
                shut(tmp_path / "runs")
            if chance.random() < 0.4:
                victim = chance.randrange(WORKERS)
                workers[victim].kill()
                workers[victim].wait()
                workers[victim] = start_worker(tmp_path / "runs")
                killed_workers += 1
            elif trials := trial_processes(directory):
                with suppress(ProcessLookupError):  # it was quicker
                    os.kill(chance.choice(trials), signal.SIGKILL)
                    killed_trials += 1
        assert [worker.wait(timeout=120) for worker in workers] == [0] * WORKERS
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert killed_trials and killed_workers
    found = records(directory)
    assert len(found) == TRIALS and {record.status for record in found.values()} == {"done"}
    sync_all(tmp_path / "runs", tracking)
    for record in found.values():
        steps = [line["step"] for line in record.metrics() if "train/loss" in line]
        assert steps == list(range(1, STEPS + 1))
        assert sum("final/val_loss" in line for line in record.metrics()) == 1
        assert len(lines(record.path / "ends")) <= 1  # none ran to its end twice
        run_id = read_json(record.path / "mlflow.json")["run_id"]
        assert sorted(point.step for point in client.get_metric_history(run_id, "train/loss")) == steps
        assert client.get_run(run_id).info.status == "FINISHED"
    parent = client.get_run(read_json(directory / "mlflow.json")["run_id"])
    assert parent.info.status == "FINISHED"

    monkeypatch.setattr("moepp.data.prepare.prepare", run_fake_sweep.no_preparation)
    extra = [f"runs={tmp_path / 'whole'}", f"trainer.steps={STEPS}"]
    toy = run_fake_sweep.sweep(**run_fake_sweep.arms(TRIALS))
    whole = run_sweep(toy, "smoke", WORKERS, extra, progress=False, command=run_fake_sweep.FAKE_TRIAL)
    table = {arm: record.final() for arm, record in records(whole).items()}
    assert {arm: record.final() for arm, record in found.items()} == table and len(table) == TRIALS
