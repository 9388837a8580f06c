from unittest import mock

import forked
import pytest

from moepp.config import compose
from moepp.errors import UsageError
from moepp.records import RunRecord, write_json
from moepp.sweeps.job import Job
from moepp.sweeps.leases import Heartbeat
from moepp.sweeps.pruning import SuccessiveHalving, SweepPruner, parse
from moepp.sweeps.spec import Trial
from moepp.sweeps.status import read_status
from moepp.training.pruning import Pruning
from moepp.training.ranks import launch
from moepp.training.run import freeze, train
from moepp.training.settings import RunConfig, run_directory

PRUNER = {"successive_halving": {"first": 5, "factor": 2}}


def test_rungs_grow_by_the_factor_and_stop_before_the_end():
    halving = SuccessiveHalving(first=10, factor=3)
    assert [step for step in range(271) if halving.is_rung(step, 270)] == [10, 30, 90]


def test_the_best_of_a_rung_go_on():
    halving = SuccessiveHalving(first=10, factor=3)
    assert halving.keeps(9.0, [9.0])  # alone
    assert not halving.keeps(9.0, [9.0, 8.0]) and halving.keeps(8.0, [9.0, 8.0])
    losses = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert [halving.keeps(loss, losses) for loss in losses] == [True, True, False, False, False, False]


@pytest.mark.parametrize(
    "pruner",
    [
        {"median": {}},
        {"successive_halving": {"first": 5}},
        {"successive_halving": {"first": 5, "factor": 1}},
        {"successive_halving": {"first": 2.5, "factor": 2}},
        {"successive_halving": {"first": 5, "factor": 2}, "patience": 1},
    ],
)
def test_what_is_no_pruner_is_refused(pruner):
    with pytest.raises(UsageError, match="pruner"):
        parse(pruner)


@pytest.fixture
def plan(overrides):
    """A frozen trial of 12 steps with rungs at 5 and 10, and a way to place rivals beside it."""
    config = freeze(compose(RunConfig, overrides))
    directory = run_directory(config)
    trials = [{"arm": "a", "seed": 0, "path": directory.name, "steps": 12, "group": "space"}]

    def rival(name, losses, seed=0, group="space"):
        record = RunRecord(directory.parent / name)
        record.path.mkdir(parents=True)
        for step, loss in losses.items():
            record.log(step, {"val/loss": loss})
        trials.append({"arm": name, "seed": seed, "path": name, "steps": 12, "group": group})
        write_json(directory.parent / "sweep.json", {"pruner": PRUNER, "trials": trials})

    rival("absent", {})
    return config, directory, rival


def test_rivals_are_those_of_the_same_group_and_seed(plan):
    _, directory, rival = plan
    rival("other_seed", {5: 1.0}, seed=1)
    rival("other_group", {5: 1.0}, group="")
    rival("not_there_yet", {4: 1.0})
    judge = SweepPruner.of(directory)
    assert judge.verdict(5, 3.0) == ""
    rival("better", {5: 2.0})
    assert judge.verdict(5, 3.0) == "validation loss 3 at step 5 is number 2 of 2"
    assert judge.verdict(5, 1.0) == judge.verdict(6, 3.0) == judge.verdict(12, 3.0) == ""


def test_a_rival_that_cannot_be_read_does_not_count(plan):
    _, directory, rival = plan
    rival("damaged", {5: 1.0})
    rival("better", {5: 2.0})
    (directory.parent / "damaged" / "metrics.jsonl").write_text('{"step": 5, "ti\n{"step": 6, "time": 0}\n')
    assert SweepPruner.of(directory).verdict(5, 3.0) == "validation loss 3 at step 5 is number 2 of 2"


def test_named_arms_and_single_runs_have_no_judge(plan):
    _, directory, rival = plan
    rival("named", {5: 9.0}, group="")
    assert SweepPruner.of(directory.parent / "named") is None
    assert SweepPruner.of(directory.parent.parent / "elsewhere" / directory.name) is None


def test_a_run_that_falls_behind_stops_at_its_rung(plan):
    config, directory, rival = plan
    rival("better_later", {5: 99.0, 10: 0.0})
    record = train(config, directory, SweepPruner.of(directory))
    assert record.status == "pruned" and not record.final()
    assert record.read("pruned.json")["step"] == 10 and record.metrics()[-1]["step"] == 10
    before = record.metrics()
    assert train(config, directory, SweepPruner.of(directory)).metrics() == before  # it stays so

    (directory / "pruned.json").unlink()  # as when it is killed before the outcome is on the disk
    again = train(config, directory, SweepPruner.of(directory))
    assert again.status == "pruned"
    for name in ("val/loss", "train/loss"):
        lines = [[(line["step"], line[name]) for line in found if name in line] for found in (before, again.metrics())]
        assert lines[0] == lines[1]

    job = Job(Trial("a", 0, config), retries=0, heartbeat=Heartbeat())
    assert job.settled and not job.failure and not job.done and job.progress.step == 12
    [status] = read_status(
        directory.parent, {"trials": [{"arm": "a", "seed": 0, "path": directory.name, "steps": 12}]}
    ).trials
    assert (status.state, status.step) == ("pruned", 10) and "number 2 of 2" in status.note


def test_ranks_stop_at_the_same_rung_by_the_verdict_of_one(plan, overrides, monkeypatch):
    monkeypatch.setattr(launch, "start", forked.start)
    _, directory, rival = plan
    rival("better_later", {5: 99.0, 10: 0.0})
    config = freeze(compose(RunConfig, [*overrides, "strategy=ddp", "trainer.devices=2", "strategy.timeout_s=20"]))
    # A rank that went on alone would wait until the timeout.
    record = train(config, directory, SweepPruner.of(directory))
    assert record.status == "pruned" and record.read("pruned.json")["step"] == record.metrics()[-1]["step"] == 10


@pytest.mark.parametrize("reason", ["", "number 2 of 2"])
def test_another_rank_asks_nobody_and_does_what_rank_0_was_told(reason):
    judge, trainer, module = mock.Mock(), mock.Mock(global_step=5, max_steps=12, is_global_zero=False), mock.Mock()
    trainer.state.fn, trainer.sanity_checking, trainer.should_stop = "fit", False, False
    module.validation_metrics.return_value = {"loss": 3.0}
    trainer.strategy.broadcast.return_value = reason
    Pruning(judge).on_validation_end(trainer, module)
    assert trainer.should_stop == bool(reason) and not judge.mock_calls
    trainer.strategy.broadcast.assert_called_once_with("")


def test_a_run_among_the_best_is_the_run_without_a_pruner(plan, tmp_path):
    config, directory, rival = plan
    rival("worse", {5: 99.0, 10: 99.0})
    pruned = train(config, directory, SweepPruner.of(directory)).final()
    assert pruned["val_loss"] == train(config, tmp_path / "alone").final()["val_loss"]
