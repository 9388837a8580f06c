"""A real trial, killed with its sweep: its scores are those of a run that nobody disturbed."""

import multiprocessing
import time
from pathlib import Path

import forked
import pytest

from moepp.config import load
from moepp.records import RunRecord, read_json
from moepp.sweeps import fork_server
from moepp.sweeps.reading import read_sweep
from moepp.sweeps.runner import run_sweep
from moepp.training.run import train
from moepp.training.settings import RunConfig

SWEEP = """
name: toy
question: What does it reach?
base: [size=smoke, tracking=jsonl, trainer.expert_timing=false, trainer.val_every=30, trainer.log_every=1,
       trainer.steps=90, trainer.checkpoint_every=20, trainer.threads=1, data=tokens]
scales: {smoke: {set: []}}
baseline: moepp
arms: {moepp: []}
seeds: [0]
"""


@pytest.fixture
def start(tmp_path, token_folder, monkeypatch):
    """Starts the sweep in a process of its own, whose fork server has one of its own, too."""
    monkeypatch.setattr(fork_server, "start", forked.start)
    (tmp_path / "toy.yaml").write_text(SWEEP)
    toy = read_sweep(str(tmp_path / "toy.yaml"))

    def start(runs: Path) -> multiprocessing.Process:
        options = {"workers": 1, "extra": [f"data.path={token_folder}", f"runs={runs}"], "progress": False}
        process = multiprocessing.get_context("fork").Process(target=run_sweep, args=(toy, "smoke"), kwargs=options)
        process.start()
        return process

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
            assert process.is_alive() and time.monotonic() < deadline, "the sweep ended before it could be killed"
            time.sleep(0.01)
        process.kill()
        process.join()
        assert not list((tmp_path / "cut").glob("toy-smoke/*/done"))
    last = start(tmp_path / "cut")
    last.join(120)
    assert last.exitcode == 0
    directory = tmp_path / "cut" / "toy-smoke"
    [trial] = [directory / trial["path"] for trial in read_json(directory / "sweep.json")["trials"]]
    assert RunRecord(trial).status == "done"
    undisturbed = train(load(RunConfig, trial / "config.yaml"), tmp_path / "whole")
    for name in ("val_loss", "val_bits_per_byte"):
        assert undisturbed.final()[name] == RunRecord(trial).final()[name]
