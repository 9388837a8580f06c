"""The Lightning Trainer of a run: what its record needs otherwise than Lightning does it. All that reaches into inner
parts of Lightning stands here.
"""

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch

from moepp.errors import RunError

WRITTEN_FOR = "2.6"  # the releases of Lightning whose inner parts are known here


class RecordedTrainer(pl.Trainer):
    """A Trainer that leaves signals and loggers to a run's own callbacks.

    Lightning would broadcast in its handler of SIGTERM, wherever that interrupts a rank, and before every batch, with
    all errors hidden: ResumeCheckpoint has the ranks agree at the end of a step instead. And it would hand metrics to
    the loggers after checkpoints are saved, with steps counted from 0: `write` does so in time.
    """

    def __init__(self, **options: Any):
        _refuse_another_lightning()
        _quiet()
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


def within_step(trainer: pl.Trainer) -> bool:
    """At the end of a micro-batch: whether others of its optimizer step are still to come."""
    return trainer.fit_loop._should_accumulate()


def _refuse_another_lightning() -> None:
    if not pl.__version__.startswith(f"{WRITTEN_FOR}."):
        raise RunError(
            f"lightning {pl.__version__} is installed, and runs reach into what only {WRITTEN_FOR} is known to "
            f"have: pip install 'lightning=={WRITTEN_FOR}.*'"
        )


def _quiet() -> None:
    """Lightning's tips and notices would drown the progress bar; errors still pass."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
