"""Workers and trials are killed at random; the promise holds: every trial once, none lost, each step once."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from moepp.config import CONF
from moepp.records import RunRecord

TRIALS, WORKERS, KILLS, STEPS = 12, 4, 10, 20
OPTIONS = {"arms": TRIALS, "retries": KILLS, "workers": WORKERS, "one_share": True, "stale": 2.0, "progress": False}


def start_worker(runs) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(CONF.parent), "SECONDS_PER_STEP": "0.05"}
    command = [sys.executable, str(Path(__file__).with_name("run_fake_sweep.py")), str(runs), json.dumps(OPTIONS)]
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


def test_a_tortured_sweep_keeps_its_promise(tmp_path):
    chance = random.Random(0)
    directory = tmp_path / "runs" / "toy-smoke"
    workers = [start_worker(tmp_path / "runs") for _ in range(WORKERS)]
    killed_trials = killed_workers = 0
    try:
        while not trial_processes(directory):
            time.sleep(0.05)
        for _ in range(KILLS):
            time.sleep(chance.uniform(0.1, 0.5))
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
        assert [worker.wait(timeout=60) for worker in workers] == [0] * WORKERS
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert killed_trials and killed_workers
    records = [RunRecord(path.parent) for path in directory.glob("*/config.yaml")]
    assert len(records) == TRIALS and {record.status for record in records} == {"done"}
    for record in records:
        steps = [line["step"] for line in record.metrics() if "train/loss" in line]
        assert steps == list(range(1, STEPS + 1))
        assert len(record.final()) == 2 and sum("final/val_loss" in line for line in record.metrics()) == 1
        assert len(lines(record.path / "ends")) <= 1  # none ran to its end twice
