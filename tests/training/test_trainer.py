"""What a config may name for the Trainer of a run: callbacks, loggers, a profiler. And what the record keeps of it."""

import csv

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from test_run import Killed, cut_at, losses, run

from moepp import register
from moepp.config import compose
from moepp.errors import RunError, UsageError
from moepp.models.decoder import Decoder
from moepp.records import RunRecord
from moepp.training import recorded_trainer, trainer
from moepp.training.module import LanguageModel
from moepp.training.optim import parameter_groups
from moepp.training.run import freeze, train
from moepp.training.settings import RunConfig, run_directory
from moepp.training.weights import read_checkpoint

STOP = ["trainer.callbacks.EarlyStopping.monitor=val/loss", "trainer.callbacks.EarlyStopping.divergence_threshold=0.0"]


@pytest.fixture
def steps_logged():
    """A callback of one's own that logs by `self.log`."""

    @register.callback("steps_logged")
    class StepsLogged(Callback):
        def __init__(self, factor: int = 1):
            self.factor = factor

        def on_train_batch_end(self, trainer, pl_module, *_):
            pl_module.log("mine/step", float(self.factor * trainer.global_step))

        def on_validation_epoch_end(self, trainer, pl_module):
            pl_module.log("mine/val_step", float(trainer.global_step))

    yield
    del register.callback._parts["steps_logged"]


def test_final_weights_and_resume_points_load_as_a_module(overrides, monkeypatch):
    config = freeze(compose(RunConfig, [*overrides, "name=cut"]))
    record = cut_at(6, config, monkeypatch)
    point = max(record.checkpoints.glob("step-*.ckpt"))
    assert LanguageModel.load_from_checkpoint(point).steps == 12
    train(config, record.path)
    final = record.checkpoints / "final.ckpt"
    module = LanguageModel.load_from_checkpoint(final)
    assert read_checkpoint(final)["hyper_parameters"]["config"]["data"]["digest"] == "feedfacefeedface"
    assert module.model.config == config.model and module.optim == config.optim
    shown = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    from moepp.data.batches import TokenDataModule

    [found] = shown.validate(module, TokenDataModule(config.data, 0), verbose=False)
    assert found["val/loss"] == pytest.approx(record.final()["val_loss"])


def test_early_stopping_ends_a_run_as_done_and_says_where(overrides, monkeypatch):
    record = run(overrides, *STOP)
    assert record.status == "done" and record.final()["stopped_at_step"] == 5
    lines = record.metrics()
    assert [line["step"] for line in lines if "val/loss" in line] == [5]
    assert record.final()["val_loss"] == next(line["val/loss"] for line in lines if "val/loss" in line)
    assert "stopped_at_step" not in run(overrides, "name=whole").final()
    config = freeze(compose(RunConfig, [*overrides, *STOP, "name=cut"]))
    cut = train(config, cut_at(4, config, monkeypatch).path)
    assert losses(cut) == losses(record)


def test_a_run_that_is_killed_between_its_stop_and_done_stops_there_again(overrides, monkeypatch):
    more = [*STOP, "trainer.checkpoint_every=5"]
    whole = run(overrides, *more)
    config = freeze(compose(RunConfig, [*overrides, *more, "name=cut"]))

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("moepp.training.run.finish", die)
        train(config)
    assert losses(train(config)) == losses(whole)


def test_a_callback_of_ones_own_writes_into_the_lines_of_the_record_also_when_continued(
    overrides, steps_logged, monkeypatch
):
    more = ["trainer.callbacks.steps_logged.factor=10", "trainer.val_every=5"]
    record = run(overrides, *more)
    found = {line["step"]: line["mine/step"] for line in record.metrics() if "mine/step" in line}
    assert found == {step: 10 * step for step in (2, 4, 6, 8, 10, 12)}
    assert [(line["step"], line["mine/val_step"]) for line in record.metrics() if "mine/val_step" in line] == [
        (5, 5), (10, 10),
    ]  # fmt: skip
    assert losses(record) == losses(run(overrides, "name=without"))
    config = freeze(compose(RunConfig, [*overrides, *more, "name=cut"]))
    cut = train(config, cut_at(4, config, monkeypatch).path)  # right after step 4 was saved
    named = [[{k: v for k, v in line.items() if "mine" in k} for line in r.metrics()] for r in (cut, record)]
    assert named[0] == named[1]


def test_lightnings_model_checkpoint_works_in_a_run(overrides, tmp_path):
    more = [
        "trainer.callbacks.ModelCheckpoint.monitor=val/loss",
        f"trainer.callbacks.ModelCheckpoint.dirpath={tmp_path}",
    ]
    record = run(overrides, *more)
    assert record.status == "done" and record.final()["train_seconds"] > 0
    assert len(list(tmp_path.glob("epoch*.ckpt"))) == 1


def test_the_csv_logger_shows_what_the_record_holds(overrides):
    record = run(overrides, "tracking.loggers=[csv]")
    [table] = record.path.rglob("metrics.csv")
    with open(table) as file:
        *lines, last = csv.DictReader(file)
    rows = {int(row["step"]): row for row in lines if row["train/loss"]}
    for line in record.metrics():
        if "train/loss" in line:
            assert float(rows[line["step"]]["train/loss"]) == pytest.approx(line["train/loss"], rel=1e-8)
    assert float(last["final/val_loss"]) == pytest.approx(record.final()["val_loss"], rel=1e-8)
    assert losses(record) == losses(run(overrides, "name=without"))


def test_a_missing_package_of_a_logger_is_one_line(overrides, monkeypatch):
    def missing(*_, **__):
        raise ModuleNotFoundError("You want to use `wandb` logger which is not installed yet,\n install it with ...")

    monkeypatch.setattr(trainer, "WandbLogger", missing)
    with pytest.raises(UsageError, match=r"^tracking\.loggers=wandb: You want to use `wandb` logger .*$"):
        run(overrides, "tracking.loggers=[wandb]")


def test_an_option_that_a_callback_needs_is_named(overrides):
    with pytest.raises(UsageError, match=r"^callback EarlyStopping needs trainer\.callbacks\.EarlyStopping\.monitor$"):
        compose(RunConfig, [*overrides, "trainer.callbacks.EarlyStopping={}"])


def test_the_profilers_report_lies_in_the_runs_folder(overrides):
    record = run(overrides, "trainer.profiler=simple", "trainer.steps=2")
    assert "run_training_batch" in "".join(path.read_text() for path in record.path.glob("fit-profile*.txt"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.callbacks.EarlyStoping={}", r"EarlyStoping: no such callback; .* did you mean EarlyStopping\?"),
        ("trainer.callbacks.EarlyStopping.patients=3", r"EarlyStopping\.patients: .* did you mean patience\?"),
        ("tracking.loggers=[cvs]", r"tracking\.loggers=cvs: no such logger; .* did you mean csv\?"),
        ("trainer.callbacks.EarlyStopping=3", r"EarlyStopping=3 must be a mapping of options, \{\} for none"),
        ("trainer.profiler=fast", r"trainer\.profiler"),
    ],
)
def test_what_nobody_knows_is_refused_with_the_nearest_name(overrides, override, message):
    with pytest.raises(UsageError, match=message):
        compose(RunConfig, [*overrides, override])


def test_new_keys_leave_a_runs_identity_unless_they_change_its_result(overrides):
    same = [[], ["tracking.loggers=[csv]"], ["trainer.profiler=simple"]]
    other = [["optim.name=SGD"], ["optim.name=muon"], ["optim.name=muon", "optim.options.ns_steps=3"], STOP]
    names = [run_directory(compose(RunConfig, [*overrides, *more])).name for more in (*same, *other)]
    assert len(set(names[:3])) == 1 and len(set(names)) == 5


def test_another_lightning_is_refused(monkeypatch):
    monkeypatch.setattr(recorded_trainer.pl, "__version__", "2.7.0")
    with pytest.raises(RunError, match=r"^lightning 2\.7\.0 is installed, .* pip install 'lightning==2\.6\.\*'$"):
        recorded_trainer.RecordedTrainer()


def test_lightning_touches_neither_signals_nor_loggers(tmp_path):
    import signal

    before = signal.getsignal(signal.SIGTERM)
    made = recorded_trainer.RecordedTrainer(accelerator="cpu", logger=trainer.csv_logger(RunRecord(tmp_path)))
    made._signal_connector.register_signal_handlers()
    made._logger_connector.log_metrics({"a": 1.0}, 0)
    assert signal.getsignal(signal.SIGTERM) is before and not list(tmp_path.rglob("metrics.csv"))


@pytest.fixture
def registered_parts():
    """A model and an optimizer of one's own."""

    @register.model("halved")
    def halved(config, seed, factor: float = 0.5):
        model = Decoder(config, seed)
        if seed is not None:
            with torch.no_grad():
                model.embedding.weight.mul_(factor)
        return model

    @register.optimizer("momentum")
    def momentum(module, config, momentum: float = 0.9):
        return torch.optim.SGD(parameter_groups(module, config), lr=config.lr, momentum=momentum)

    yield
    del register.model._parts["halved"], register.optimizer._parts["momentum"]


def test_a_model_and_an_optimizer_of_ones_own_train_continue_and_load(overrides, registered_parts, monkeypatch):
    more = ["model.name=halved", "model.options.factor=0.1", "optim.name=momentum", "optim.options.momentum=0.5"]
    whole = run(overrides, *more)
    assert losses(whole) != losses(run(overrides, "name=other"))
    config = freeze(compose(RunConfig, [*overrides, *more, "name=cut"]))
    cut = train(config, cut_at(6, config, monkeypatch).path)
    assert losses(cut) == losses(whole)
    loaded = LanguageModel.load_from_checkpoint(cut.checkpoints / "final.ckpt")
    assert loaded.model.config.options == {"factor": 0.1} and loaded.optim.name == "momentum"


def test_muon_continues_to_the_same_losses(overrides, monkeypatch):
    whole = run(overrides, "optim.name=muon")
    config = freeze(compose(RunConfig, [*overrides, "optim.name=muon", "name=cut"]))
    assert losses(train(config, cut_at(6, config, monkeypatch).path)) == losses(whole)
    assert whole.final()["val_loss"] < whole.metrics()[0]["train/loss"]
