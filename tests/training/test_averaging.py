import pytest
from test_run import run

from moepp.config import compose
from moepp.errors import Interrupted, UsageError
from moepp.training import callbacks
from moepp.training.averaging import LateAverage
from moepp.training.run import freeze, train
from moepp.training.settings import RunConfig, run_directory

AVERAGED = "trainer.average_checkpoints=2"
STOP = ["trainer.callbacks.EarlyStopping.monitor=val/loss", "trainer.callbacks.EarlyStopping.divergence_threshold=0.0"]


def averages(record):
    return {name: value for name, value in record.final().items() if name.startswith("averaged_")}


def test_the_mean_is_of_snapshots_evenly_spread_over_the_last_fifth_and_the_last_step():
    assert LateAverage(5, steps=100).due == [84, 88, 92, 96, 100]
    assert LateAverage(3, steps=15).due == [13, 14, 15]


def test_more_than_the_last_fifth_has_are_refused(overrides):
    """No earlier weights are averaged instead."""
    compose(RunConfig, [*overrides, "trainer.average_checkpoints=2"])
    for count, steps, way_out in ((3, 12, "set it to 2 at most, or"), (1, 4, "set it to 0, or")):
        asked = [*overrides, "optim.warmup_steps=2", f"trainer.average_checkpoints={count}", f"trainer.steps={steps}"]
        refused = f"^trainer.average_checkpoints={count} is more than .* trainer.steps={steps} has, .*: {way_out} train"
        with pytest.raises(UsageError, match=refused):
            compose(RunConfig, asked)


@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_a_run_that_ends_in_its_last_step_before_it_is_done_finishes_when_it_is_continued(overrides, monkeypatch, end):
    whole = run(overrides, AVERAGED, "name=whole")
    config = freeze(compose(RunConfig, [*overrides, AVERAGED, "name=cut"]))

    class Stopped(callbacks.ResumeCheckpoint):
        def on_train_batch_end(self, trainer, *arguments):
            self.stopping = trainer.global_step == 12
            super().on_train_batch_end(trainer, *arguments)

    def die(*_):
        raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        if end == "stopped":
            patch.setattr("moepp.training.trainer.ResumeCheckpoint", Stopped)
        else:
            patch.setattr("moepp.training.run.finish", die)
        train(config, run_directory(config))
    assert averages(train(config, run_directory(config))) == averages(whole) != {}


def test_a_run_that_ended_before_its_first_snapshot_has_no_average(overrides):
    """Snapshots are due at steps 11 and 12; the first run ends at 5, the second one at 11."""
    record = run(overrides, AVERAGED, *STOP)
    assert record.final()["stopped_at_step"] == 5 and averages(record) == {}
    assert averages(run(overrides, AVERAGED, *STOP, "trainer.val_every=11")) != {}


def test_a_mean_is_of_the_steps_that_are_due():
    average, other = LateAverage(3, steps=20), LateAverage(3, steps=20)
    average.load_state_dict({"taken": [18], "mean": {}})
    assert average.is_whole(18) and not average.is_whole(19) and not average.is_whole(20)
    other.load_state_dict({"taken": [17, 18], "mean": {}})
    assert other.taken == [] and not other.is_whole(17) and not other.is_whole(20)
