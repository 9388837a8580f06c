import json
from dataclasses import replace

import pytest
import torch

from moepp.cli import main
from moepp.config import compose, load
from moepp.errors import RunError, UsageError
from moepp.records import RunRecord, read_json, write_json
from moepp.training.rerun import rerun
from moepp.training.run import freeze, train
from moepp.training.settings import RunConfig, run_directory


@pytest.fixture
def original(overrides):
    config = freeze(compose(RunConfig, [*overrides, "trainer.steps=6", "name=mine"]))
    config = replace(config, tags={"arm": "zero", "sweep": "toy"})
    return train(config, run_directory(config))


@pytest.fixture
def clean(monkeypatch):
    """As in a checkout without changes, whatever this one holds."""
    monkeypatch.setattr("moepp.training.provenance.git", lambda root: {"sha": "abc", "dirty": False})


def change_loss(record):
    """One logged loss becomes another, by one unit in the last place of six digits."""
    lines = record.metrics()
    lines[0]["train/loss"] += 1e-6
    (record.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_repetition_has_the_same_losses_in_a_record_of_its_own(clean, original, capsys):
    before = original.metrics()
    assert main(["rerun", str(original.path)]) == 0
    out = capsys.readouterr().out
    assert "losses    equal, all 4 of them, to the last bit" in out
    assert out.count("the same") == 4
    again = RunRecord(original.path.parent.parent / "rerun" / original.path.name)
    assert again.status == "done" and str(again.path) in out
    assert again.metrics()[0]["time"] > before[0]["time"]
    assert original.metrics() == before
    config = load(RunConfig, again.path / "config.yaml")
    assert config.tags == {"rerun_of": f"mine/{original.path.name}"}  # it joins no arm


def test_a_finished_repetition_is_made_anew(original):
    first = rerun(original.path).metrics()
    assert rerun(original.path).metrics()[0]["time"] > first[-1]["time"]


def test_losses_that_differ_alone_are_an_error(clean, original, capsys):
    change_loss(original)
    assert main(["rerun", str(original.path)]) == 1
    captured = capsys.readouterr()
    assert "1 of 4 differs, by 1e-06 at most (train/loss, step 2)" in captured.out
    assert captured.err.startswith("error: the losses of") and captured.err.count("\n") == 1


def test_losses_that_differ_with_another_version_are_reported(clean, original, capsys):
    change_loss(original)
    path = original.path / "provenance.json"
    provenance = read_json(path)
    write_json(path, provenance | {"versions": provenance["versions"] | {"torch": "1.0"}})
    assert main(["rerun", str(original.path)]) == 0
    out = capsys.readouterr().out
    assert "versions  torch 1.0 -> " in out and "1 of 4 differs" in out


def test_it_takes_the_threads_that_the_original_had(overrides):
    """As in a sweep, which leaves the key at 0 and sets the number from outside."""
    config = freeze(compose(RunConfig, [*overrides, "trainer.threads=0", "trainer.steps=2"]))
    original = train(config, run_directory(config))
    again = rerun(original.path)
    assert load(RunConfig, again.path / "config.yaml").trainer.threads == torch.get_num_threads() == 1
    assert again.path.name == original.path.name


def test_a_pruned_run_is_repeated_as_far_as_it_came(clean, overrides, capsys):
    class Strict:
        def verdict(self, step, loss):
            return "too slow"

    config = freeze(compose(RunConfig, overrides))
    judge = Strict()
    judge.record = RunRecord(run_directory(config))
    pruned = train(config, run_directory(config), judge)
    assert pruned.status == "pruned"
    assert main(["rerun", str(pruned.path)]) == 0
    out = capsys.readouterr().out
    assert "ended     original pruned, repetition pruned" in out and "losses    equal, all 2 of them" in out


def test_a_failed_run_is_repeated_and_may_fail_again(clean, overrides, monkeypatch, capsys):
    from moepp.training import callbacks

    def explode(self, trainer, pl_module, *_):
        if trainer.global_step == 6:
            raise RunError("expert 3 is on fire")

    monkeypatch.setattr(callbacks.ResumeCheckpoint, "on_train_batch_end", explode)
    config = freeze(compose(RunConfig, overrides))
    with pytest.raises(RunError, match="on fire"):
        train(config, run_directory(config))
    assert main(["rerun", str(run_directory(config))]) == 0
    out = capsys.readouterr().out
    assert "ended     original failed, repetition failed" in out and "losses    equal, all 3 of them" in out


def test_a_record_that_lacks_its_provenance_is_told_in_a_line(overrides):
    config = freeze(compose(RunConfig, [*overrides, "trainer.threads=0", "trainer.steps=2"]))
    record = train(config, run_directory(config))
    (record.path / "provenance.json").unlink()
    with pytest.raises(UsageError, match=r"provenance\.json does not say with how many threads") as error:
        rerun(record.path)
    assert "\n" not in str(error.value)


def test_what_cannot_be_repeated_is_said(original, tmp_path):
    with pytest.raises(UsageError, match="is no run that has ended"):
        rerun(tmp_path)
    again = rerun(original.path)
    with pytest.raises(UsageError, match="name the run that it repeats"):
        rerun(again.path)
    assert again.status == "done"
