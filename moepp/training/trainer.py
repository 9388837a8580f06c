"""A run's trainer: its strategy, its callbacks, and the callbacks, loggers and profiler that a config names."""

import inspect
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler

from moepp import register
from moepp.data.token_files import TokenFiles
from moepp.data.windows import window_count
from moepp.errors import UsageError
from moepp.layers.bounds import Whole
from moepp.layers.registry import Registry
from moepp.records import RunRecord
from moepp.strategies import CheckpointsOfAnyForm, make_strategy
from moepp.tracking.settings import TrackingConfig
from moepp.training.averaging import LateAverage
from moepp.training.awakening import Awakening
from moepp.training.bar import StepBar
from moepp.training.callbacks import CollectTogether, MetricsReporter, ResumeCheckpoint
from moepp.training.cloze import ClozeScorer
from moepp.training.pruning import Pruner, Pruning
from moepp.training.record_logger import RecordLogger
from moepp.training.recorded_trainer import RecordedTrainer
from moepp.training.settings import RunConfig
from moepp.training.totals import TrainingTotals

RANGES = {"patience": Whole}  # of options that Lightning takes whatever they are: -1 does not mean never there
PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}


def make_trainer(
    record: RunRecord, config: RunConfig, tokens: TokenFiles, pruner: Pruner | None, joined: bool
) -> RecordedTrainer:
    """`joined` says that this process has joined others of its run (ranks/)."""
    settings = config.trainer
    return RecordedTrainer(
        strategy=make_strategy(**asdict(config.strategy)),
        plugins=[TorchElasticEnvironment() if joined else LightningEnvironment(), CheckpointsOfAnyForm()],
        accelerator=settings.accelerator,
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        precision=settings.precision,
        deterministic=settings.deterministic,
        max_steps=settings.steps,
        max_epochs=-1,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=config.optim.grad_clip or None,
        val_check_interval=settings.val_every * settings.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        profiler=make_profiler(settings.profiler, record),
        logger=[RecordLogger(record), *make_loggers(config.tracking, record)],
        log_every_n_steps=settings.log_every,
        callbacks=[
            *make_callbacks(settings.callbacks),
            *_own_callbacks(record, config, tokens, pruner),
            *([CollectTogether(settings.collect_every)] if settings.collect_every else []),
            *([StepBar()] if settings.progress else []),
        ],
        default_root_dir=record.path,
        use_distributed_sampler=False,
        enable_progress_bar=settings.progress,
        enable_model_summary=False,
    )


def _own_callbacks(record: RunRecord, config: RunConfig, tokens: TokenFiles, pruner: Pruner | None) -> list[Callback]:
    """After those of the config, whose metrics belong into the same lines and whose state into the same checkpoints."""
    data, every, steps = config.data, config.trainer.val_every, config.trainer.steps
    epoch_steps = window_count(tokens.header.train.tokens, data.seq_len) // data.batch_size
    averaged, added = config.trainer.average_checkpoints, config.model.retrofit
    return [
        TrainingTotals(steps, epoch_steps),
        *([LateAverage(averaged, steps)] if averaged else []),
        *([Awakening(added)] if added.wakes else []),
        *([ClozeScorer(config.cloze, data.seq_len, every)] if config.cloze.points else []),
        MetricsReporter(data.batch_size * data.seq_len, data.seq_len),
        *([Pruning(pruner)] if pruner else []),
        ResumeCheckpoint(record, config.trainer.checkpoint_every, every, config.trainer.keep_at),
    ]


def make_callbacks(named: Mapping[str, Mapping[str, Any]]) -> list[Callback]:
    """The callbacks that `trainer.callbacks` names, with their options."""
    return [
        _made(register.callback, name, f"trainer.callbacks.{name}", Callback, **(options or {}))
        for name, options in named.items()
    ]


def make_profiler(name: str, record: RunRecord) -> Profiler | None:
    """Lightning's, with its report in the record's folder as fit-profile*; None without a name."""
    return PROFILERS[name](dirpath=record.path, filename="profile") if name else None


def make_loggers(config: TrackingConfig, record: RunRecord) -> list[Logger]:
    """The loggers that `tracking.loggers` names, with the options of `tracking.logger_options`."""
    return [
        _made(register.logger, name, f"tracking.loggers={name}", Logger, record, **config.logger_options.get(name, {}))
        for name in config.loggers
    ]


def refused_by_callback(error: Exception) -> str | None:
    """What one of Lightning's callbacks that a config names says of its options while it runs, of a `monitor` that
    nothing logs, say; None where none of them raised this.
    """
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    name = type(frame.f_locals.get("self")).__name__
    if name not in register.CALLBACKS or not frame.f_globals["__name__"].startswith(lightning_callbacks.__name__):
        return None
    return f"trainer.callbacks.{name}: {' '.join(str(error).split())}"


def _made(parts: Registry, name: str, key: str, needed: type, *given: Any, **options: Any) -> Any:
    try:
        made = parts[name](*given, **options)
    except (TypeError, ValueError, ImportError) as error:
        raise UsageError(f"{key}: {' '.join(str(error).split())}") from None
    if not isinstance(made, needed):
        raise parts.unusable(name, made, f"a Lightning {needed.__name__}")
    return made


@register.logger("csv")
def csv_logger(record: RunRecord) -> Logger:
    return CSVLogger(record.path / "loggers", name="csv")


@register.logger("tensorboard")
def tensorboard_logger(record: RunRecord) -> Logger:
    return TensorBoardLogger(record.path / "loggers", name="tensorboard", version="")


@register.logger("wandb")
def wandb_logger(record: RunRecord, project: str = "moepp", offline: bool = False) -> Logger:
    """A run that is continued goes on in its own W&B run."""
    identity = record.path.name
    name = f"{record.path.parent.name}/{identity}"
    return WandbLogger(name, id=identity, save_dir=record.path, project=project, offline=offline)


def _from_lightning(made: type[Callback]) -> Callable[..., Callback]:
    """`made` as a registered callback."""

    def build(**options: Any) -> Callback:
        return made(**options)

    signature = inspect.signature(made, eval_str=True)
    own = [p.replace(annotation=RANGES.get(p.name, p.annotation)) for p in signature.parameters.values()]
    build.__signature__ = signature.replace(parameters=own)
    return build


register.callback.attempt = lambda name, options: register.callback[name](**options)

for _name in register.CALLBACKS:
    register.callback(_name)(_from_lightning(getattr(lightning_callbacks, _name)))
