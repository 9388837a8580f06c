"""Real trials, killed: the table of a sweep that died is the table of one that did not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moepp.config import CONF, load
from moepp.records import RunRecord, read_json
from moepp.training.run import train
from moepp.training.settings import RunConfig

SWEEP = """
name: toy
question: Does the zero expert matter?
base: [size=smoke, tracking=jsonl, trainer.expert_timing=false, trainer.val_every=30, trainer.log_every=1,
       trainer.steps=90, trainer.checkpoint_every=20, data=tokens]
scales: {smoke: {set: []}}
baseline: vanilla
arms: {vanilla: [model=vanilla], moepp: []}
seeds: [0]
"""
SCRIPT = """
import sys
from moepp.sweeps.runner import run_sweep
from moepp.sweeps.spec import load_sweep
run_sweep(load_sweep(sys.argv[1]), "smoke", workers=2, extra=sys.argv[2:], progress=False)
"""


@pytest.fixture
def start(tmp_path, token_folder):
    (tmp_path / "toy.yaml").write_text(SWEEP)

    def start(runs: Path) -> subprocess.Popen:
        arguments = [str(tmp_path / "toy.yaml"), f"data.path={token_folder}", f"runs={runs}"]
        environment = {**os.environ, "PYTHONPATH": str(CONF.parent)}
        return subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments], env=environment)

    return start


def test_a_sweep_killed_again_and_again_ends_as_an_undisturbed_one(start, tmp_path):
    for reached in (10, 45):  # before the first checkpoint, and in the middle
        process = start(tmp_path / "cut")
        deadline = time.monotonic() + 60
        while not any(
            line["step"] >= reached
            for path in (tmp_path / "cut").glob("toy-smoke/*/metrics.jsonl")
            for line in RunRecord(path.parent).metrics()
        ):
            assert process.poll() is None and time.monotonic() < deadline, "the sweep ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not list((tmp_path / "cut").glob("toy-smoke/*/done"))
    assert start(tmp_path / "cut").wait(timeout=120) == 0
    directory = tmp_path / "cut" / "toy-smoke"
    trials = [directory / trial["path"] for trial in read_json(directory / "sweep.json")["trials"]]
    assert len(trials) == 2 and {RunRecord(trial).status for trial in trials} == {"done"}
    for trial in trials:
        undisturbed = train(load(RunConfig, trial / "config.yaml"), tmp_path / "whole" / trial.name)
        for name in ("val_loss", "val_bits_per_byte"):
            assert undisturbed.final()[name] == RunRecord(trial).final()[name]
