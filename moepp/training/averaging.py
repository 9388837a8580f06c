"""The mean of a run's late weights, which is scored beside its last ones: less of it is the noise of the last steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim.swa_utils import AveragedModel

from moepp.training.module import LanguageModel
from moepp.training.recorded_trainer import within_step

LATE_SHARE = 0.2  # of all steps: the snapshots lie in these


class LateAverage(Callback):
    """Averages the weights after `count` steps, evenly spaced over the last fifth of `steps`, the last step included
    (Izmailov et al. 2018; of the latest checkpoints: Kaddour 2022). The mean is saved with every checkpoint.
    """

    state_key = "LateAverage"

    def __init__(self, count: int, steps: int):
        every = max(1, int(LATE_SHARE * steps) // count)
        self.taken_at = frozenset(range(steps, 0, -every)[:count])
        self.mean: AveragedModel | None = None
        self.resumed: dict[str, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        self.mean = AveragedModel(pl_module.model)
        if self.resumed:
            self.mean.load_state_dict(self.resumed)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LanguageModel, *_: Any) -> None:
        if not within_step(trainer) and trainer.global_step in self.taken_at:
            self.mean.update_parameters(pl_module.model)

    def state_dict(self) -> dict[str, Any]:
        return self.mean.state_dict() if self.mean is not None and self.mean.n_averaged else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.resumed = state_dict

    @contextmanager
    def in_place(self, module: LanguageModel) -> Iterator[None]:
        """The module has the mean for its weights inside; buffers are those of the last snapshot."""
        last = {name: value.clone() for name, value in module.model.state_dict().items()}
        module.model.load_state_dict(self.mean.module.state_dict())
        try:
            yield
        finally:
            with torch.no_grad():
                module.model.load_state_dict(last)
