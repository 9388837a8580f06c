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
from moepp.training.settings import LATE_SHARE


class LateAverage(Callback):
    """Averages the weights after `count` steps, evenly spaced over the last fifth of `steps`, the last step included
    (Izmailov et al. 2018; of the latest checkpoints: Kaddour 2022). The mean is saved with every checkpoint, and with
    it the steps that it is of: a run that branches off from one of another length has no use for the other's.
    """

    state_key = "LateAverage"

    def __init__(self, count: int, steps: int):
        every = int(LATE_SHARE * steps) // count
        self.due = sorted(range(steps, 0, -every)[:count])
        self.taken: list[int] = []
        self.mean: AveragedModel | None = None
        self.resumed: dict[str, Any] = {}

    def is_whole(self, step: int) -> bool:
        """Whether the mean is of something, and of all that was due until `step`: a run that ended early may have come
        to no snapshot, and one that branched off after its own were due has missed them.
        """
        return bool(self.taken) and self.taken == [due for due in self.due if due <= step]

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:
        self._begin(pl_module)

    def _begin(self, module: LanguageModel) -> None:
        if self.mean is None:
            self.mean = AveragedModel(module.model)
            if self.resumed:
                self.mean.load_state_dict(self.resumed)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LanguageModel, *_: Any) -> None:
        if not within_step(trainer) and trainer.global_step in self.due:
            self.mean.update_parameters(pl_module.model)
            self.taken.append(trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return {"taken": list(self.taken), "mean": self.mean.state_dict()} if self.taken else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        taken = state_dict.get("taken", [])
        if taken and set(taken) <= set(self.due):
            self.taken, self.resumed = list(taken), state_dict["mean"]

    @contextmanager
    def in_place(self, module: LanguageModel) -> Iterator[None]:
        """The module has the mean for its weights inside; buffers are those of the last snapshot. No training need have
        come before: a run that was stopped in its last step is continued without any.
        """
        self._begin(module)
        last = {name: value.clone() for name, value in module.model.state_dict().items()}
        module.model.load_state_dict(self.mean.module.state_dict())
        try:
            yield
        finally:
            with torch.no_grad():
                module.model.load_state_dict(last)
