"""Cloze questions made from the held-out text, scored a few times while a model trains.

Validation loss weighs every token alike; which of four continuations a model prefers is the form in which tasks ask.
Nothing here draws random numbers or changes the model's mode, so a run trains the same with and without it.

Shape suffixes: Q questions, C choices, L tokens of context and answer, A tokens of an answer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from moepp.errors import UsageError
from moepp.training.settings import CLOZE_CHOICES, ClozeConfig
from moepp.training.throughput import StepTimer

if TYPE_CHECKING:
    from moepp.data.token_files import TokenFiles
    from moepp.training.module import LanguageModel

CONTEXT, ANSWER = 32, 8  # tokens, less where a training sequence is short


@dataclass(frozen=True)
class Questions:
    """`ids_QCL`: a context, then one of its choices; the first choice is the text's own. `bytes_Q`: of that answer."""

    ids_QCL: Tensor
    bytes_Q: Tensor
    answer: int  # tokens


def questions(tokens: "TokenFiles", seq_len: int, count: int) -> Questions:
    """Places evenly spread over the held-out tokens; the wrong choices are the answers of other questions, of which
    there must be enough.
    """
    answer = min(ANSWER, max(1, seq_len // 4))
    length = min(CONTEXT, seq_len - answer) + answer
    count = min(count, len(tokens.val) // length)
    if count < CLOZE_CHOICES:
        raise UsageError(
            f"{len(tokens.val)} held-out tokens are too few for {CLOZE_CHOICES} cloze questions of {length}, whose"
            " answers are each other's wrong choices: hold out more text, or set cloze.points=0"
        )
    starts_Q = np.arange(count) * (len(tokens.val) - length) // max(1, count - 1)
    places_QL = starts_Q[:, None] + np.arange(length)
    ids_QL = torch.from_numpy(tokens.val[places_QL].astype(np.int64))
    bytes_QL = torch.from_numpy(tokens.val_lengths[places_QL].astype(np.int64))
    ids_QCL = ids_QL[:, None].repeat(1, CLOZE_CHOICES, 1)
    for choice in range(1, CLOZE_CHOICES):
        ids_QCL[:, choice, -answer:] = ids_QL.roll(choice * count // CLOZE_CHOICES, 0)[:, -answer:]
    return Questions(ids_QCL, bytes_QL[:, -answer:].sum(1), answer)


def score(logits_of: Callable[[Tensor], Tensor], asked: Questions, device: torch.device) -> dict[str, float]:
    """`accuracy`: how often the text's own answer is the likeliest; `bits_per_byte` of that answer. `logits_of` maps
    ids [B, S] to logits [B, S, V].
    """
    ids_BL = asked.ids_QCL.flatten(0, 1).to(device)
    nats_BA = torch.gather(
        logits_of(ids_BL[:, :-1])[:, -asked.answer :].float().log_softmax(-1), 2, ids_BL[:, -asked.answer :, None]
    ).squeeze(2)
    nats_QC = nats_BA.sum(1).view(asked.ids_QCL.shape[:2]).cpu()
    right = (nats_QC[:, :1] > nats_QC[:, 1:]).all(1)
    bits = -nats_QC[:, 0].double().sum() / math.log(2)
    return {"accuracy": float(right.double().mean()), "bits_per_byte": float(bits / asked.bytes_Q.sum())}


class ClozeScorer(Callback):
    """Scores at the end of a validation, while the model is still in its mode and the step timer rests: it belongs
    before MetricsReporter in the list of callbacks.
    """

    def __init__(self, settings: ClozeConfig, seq_len: int, val_every: int):
        self.settings, self.seq_len, self.val_every = settings, seq_len, val_every

    def on_fit_start(self, trainer: pl.Trainer, pl_module: "LanguageModel") -> None:
        self.asked = questions(trainer.datamodule.files, self.seq_len, self.settings.questions)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: "LanguageModel") -> None:
        validation, validations = trainer.global_step // self.val_every, trainer.max_steps // self.val_every
        if trainer.state.fn != "fit" or not _due(validation, validations, self.settings.points):
            return

        def logits_of(ids_BS: Tensor) -> Tensor:
            # Not inference_mode: FSDP would train on what it gathers here.
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                return pl_module.model(ids_BS).logits

        timer = StepTimer(pl_module.device)
        found = {f"val/cloze_{name}": v for name, v in score(logits_of, self.asked, pl_module.device).items()}
        found["perf/cloze_seconds"] = timer.lap()
        for logger in trainer.loggers:
            logger.log_metrics(found, trainer.global_step)


def _due(validation: int, validations: int, points: int) -> bool:
    """Whether the `validation`-th of all (from 1) is one of `points` evenly spread ones."""
    return validation * points // validations > (validation - 1) * points // validations
