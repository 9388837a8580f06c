"""The Lightning Trainer of a run: what its record needs otherwise than Lightning does it, and the callbacks and loggers
that a config names.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler

from moepp import register
from moepp.errors import RunError, UsageError
from moepp.records import RunRecord
from moepp.tracking.settings import TrackingConfig

PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
WRITTEN_FOR = "2.6"  # the releases of Lightning whose inner parts RecordedTrainer knows


class RecordedTrainer(pl.Trainer):
    """A Trainer that leaves signals and loggers to a run's own callbacks.

    Lightning would broadcast in its handler of SIGTERM, wherever that interrupts a rank, and before every batch, with
    all errors hidden: ResumeCheckpoint has the ranks agree at the end of a step instead. And it would hand metrics to
    the loggers after checkpoints are saved, with steps counted from 0: `write` does so in time.
    """

    def __init__(self, **options: Any):
        _refuse_another_lightning()
        super().__init__(**options)
        self._signal_connector.register_signal_handlers = lambda: None
        self.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        self._logger_connector.log_metrics = lambda metrics, step=None: None

    def write(self, metrics: Mapping[str, float]) -> None:
        """One line for every logger, under the number of finished steps: these metrics, and what else was logged by
        `self.log` in the step or validation that ends here.
        """
        self.callback_metrics.update({name: torch.as_tensor(value) for name, value in metrics.items()})
        logged = {name: value for name, value in self._logger_connector.metrics["log"].items() if name not in metrics}
        for logger in self.loggers:
            logger.log_metrics({**metrics, **{name: float(value) for name, value in logged.items()}}, self.global_step)


def _refuse_another_lightning() -> None:
    if not pl.__version__.startswith(f"{WRITTEN_FOR}."):
        raise RunError(
            f"lightning {pl.__version__} is installed, and runs reach into what only {WRITTEN_FOR} is known to "
            f"have: pip install 'lightning=={WRITTEN_FOR}.*'"
        )


def make_callbacks(named: Mapping[str, Mapping[str, Any]]) -> list[Callback]:
    """The callbacks that `trainer.callbacks` names, with their options."""
    return [
        _made(f"trainer.callbacks.{name}", register.callback[name], **(options or {}))
        for name, options in named.items()
    ]


def make_profiler(name: str, record: RunRecord) -> Profiler | None:
    """Lightning's, with its report in the record's folder as fit-profile*; None without a name."""
    return PROFILERS[name](dirpath=record.path, filename="profile") if name else None


def make_loggers(config: TrackingConfig, record: RunRecord) -> list[Logger]:
    """The loggers that `tracking.loggers` names, with the options of `tracking.logger_options`."""
    return [
        _made(f"tracking.loggers={name}", register.logger[name], record, **config.logger_options.get(name, {}))
        for name in config.loggers
    ]


def _made(key: str, part: Any, *given: Any, **options: Any) -> Any:
    try:
        return part(*given, **options)
    except (TypeError, ValueError, ImportError) as error:
        raise UsageError(f"{key}: {' '.join(str(error).split())}") from None


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

    build.__signature__ = inspect.signature(made, eval_str=True)
    return build


for _name in register.CALLBACKS:
    register.callback(_name)(_from_lightning(getattr(lightning_callbacks, _name)))
