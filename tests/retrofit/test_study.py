"""The study of sweeps/retrofit.yaml, from its packaged model to its report."""

import pytest

pytest.importorskip("transformers", "5.24", reason="needs the extra hf")
pytest.importorskip("glassllm", reason="needs the extra hf")

from functools import partial

from moepp.config import load
from moepp.models import packaged
from moepp.reports import reproduce
from moepp.sweeps.job import Job
from moepp.sweeps.probe import step_seconds
from moepp.sweeps.reading import read_sweep
from moepp.sweeps.timing import time_arms
from moepp.training import foreign
from moepp.training.run import freeze, train
from moepp.training.settings import RunConfig, run_directory


def test_the_study_reports_each_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packaged, "CACHE", tmp_path / "models")
    monkeypatch.setattr(foreign, "run_alone", lambda folder: train(load(RunConfig, folder / "config.yaml"), folder))
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / f"text/{i}.txt").write_text(f"Alice had {i} cakes, and the Hatter some more. " * 20)
    words = [
        "data=text", f"data.path={tmp_path}/text/*.txt", f"data.cache={tmp_path}/cache", "data.val_share=0.2",
        f"runs={tmp_path}/runs", "tracking=jsonl", "trainer.progress=false", "trainer.threads=1",
        "trainer.accelerator=cpu", "model.retrofit.first_steps=1", "model.retrofit.recalibrate_every=1",
        "optim.warmup_steps=1", "trainer.steps=1", "trainer.val_every=1",
    ]  # fmt: skip
    for trial in read_sweep("retrofit").trials("smoke", words):
        trial.config.name = "arms"
        config = freeze(trial.config)
        train(config, run_directory(config))
    monkeypatch.setattr(Job, "start", lambda job, *_: pytest.fail(f"{job.label} is trained again"))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    monkeypatch.setattr("moepp.sweeps.timing.time_arms", partial(time_arms, repeats=1))
    monkeypatch.chdir(tmp_path)
    reproduce.reproduce("retrofit", "smoke", 1, words, out=tmp_path / "out")
    text = (tmp_path / "out/retrofit/smoke/report.md").read_text()
    divergences = text.partition("From calibrated to trained")[2].partition("Bits per byte")[0]
    rows = {
        tuple(cells[:2]): cells[2:] for cells in (line.strip("| ").split(" | ") for line in divergences.split("\n"))
    }
    assert all("–" not in cells[:2] for row, cells in rows.items() if row[1:] == ("0.75",))
    assert float(rows["scaled copy", "0.75"][0]) > 0 and rows["copy", "0.5"][2] == "–" != rows["all", "0.75"][2]
    assert rows["zero", "0.75"][0] != rows["zero", "0.75"][1]  # before the first step, and after the last
    assert "Expert forward" in text and "Not timed" not in text


def test_a_step_is_timed_before_the_first_phase_has_said_the_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setattr("moepp.sweeps.probe.SECONDS", 0.01)
    trials = read_sweep("retrofit").trials("smoke", ["trainer.accelerator=cpu"])
    assert step_seconds(tmp_path, trials[:1], threads=1)[trials[0].arm] > 0
