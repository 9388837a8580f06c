"""Runs of several lengths that share the steps before their decays."""

import pytest
import torch

from moepp.config import compose
from moepp.errors import UsageError
from moepp.training.branching import branch_off
from moepp.training.run import freeze, train
from moepp.training.settings import RunConfig, run_directory
from moepp.training.weights import load_model

DECAYING = ("optim.schedule=wsd", "optim.decay_share=0.5", "optim.warmup_steps=2")


def run(overrides, steps, keep_at, *more):
    kept = f"trainer.keep_at={keep_at}"
    config = freeze(compose(RunConfig, [*overrides, *DECAYING, f"trainer.steps={steps}", kept, *more]))
    return train(config, run_directory(config))


def drops_and_averages(record):
    counted = ("train_dropped", "online_loss", "averaged_")
    return {name: value for name, value in record.final().items() if name.startswith(counted)}


def losses(record):
    return {line["step"]: line["train/loss"] for line in record.metrics() if "train/loss" in line}


def test_a_branched_run_is_the_run_that_trained_from_the_start(overrides, tmp_path, monkeypatch):
    """Of steps 8 and 12, whose decays begin at 4 and 6; the shorter one keeps what both have in common."""
    trunk = run(overrides, 8, [4])
    assert [point.name for point in trunk.checkpoints.glob("step-*")] == ["step-00000004.ckpt"]
    alone = run(overrides, 12, [], f"runs={tmp_path / 'alone'}")
    trained = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (trained.append(1), step(self, *a, **k))[1])
    branched = run(overrides, 12, [4, 6])
    assert len(trained) == 12 - 4 and losses(branched) == losses(alone)
    ours, wanted = (load_model(record.path)[0].state_dict() for record in (branched, alone))
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


LATE = ("optim.decay_share=0.1", "model.capacity_factor=0.8", "trainer.average_checkpoints=3", "trainer.val_every=100")


@pytest.mark.parametrize(
    "trunk, kept, steps",
    [(20, 10, 80), (20, 18, 40), (80, 10, 20)],
    ids=["early-longer", "after-a-snapshot", "shorter"],
)
def test_drops_and_the_late_mean_are_those_of_the_run_trained_alone(overrides, tmp_path, trunk, kept, steps):
    run(overrides, trunk, [kept], *LATE)
    branched = run(overrides, steps, [kept], *LATE)
    alone = drops_and_averages(run(overrides, steps, [], *LATE, f"runs={tmp_path / 'alone'}"))
    assert drops_and_averages(branched) == alone
    assert {"train_dropped_share_early", "train_dropped_share_late", "averaged_val_loss"} < alone.keys()


def test_a_mean_that_lacks_snapshots_from_before_the_branch_is_left_out(overrides, tmp_path):
    """The shorter run's are due at steps 18, 19 and 20; the longer one took none of them."""
    run(overrides, 40, [18], *LATE)
    branched = drops_and_averages(run(overrides, 20, [18], *LATE))
    alone = drops_and_averages(run(overrides, 20, [], *LATE, f"runs={tmp_path / 'alone'}"))
    assert branched == {name: value for name, value in alone.items() if not name.startswith("averaged_")} != alone


def test_the_latest_state_is_taken_and_no_other_runs(overrides):
    longer = run(overrides, 16, [4, 6])
    assert {point.name for point in longer.checkpoints.glob("step-*")} == {"step-00000004.ckpt", "step-00000006.ckpt"}
    for changed, taken in (("seed=0", ["step-00000006.ckpt"]), ("seed=1", [])):
        config = freeze(
            compose(RunConfig, [*overrides, *DECAYING, "trainer.steps=12", "trainer.keep_at=[4, 6]", changed])
        )
        record = type(longer)(run_directory(config))
        branch_off(record, config)
        assert [point.name for point in record.checkpoints.glob("step-*")] == taken


@pytest.mark.parametrize("words", [DECAYING, ("optim.schedule=cosine",)])
def test_no_state_of_a_falling_rate_is_kept(overrides, words):
    with pytest.raises(UsageError, match="keep_at=6: no run of another length may begin there"):
        compose(RunConfig, [*overrides, *words, "trainer.steps=8", "trainer.keep_at=[6]"])
