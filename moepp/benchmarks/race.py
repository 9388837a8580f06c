"""How many steps a model trains until its loss has fallen to a given one."""

import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from moepp.benchmarks.subjects import Subject
from moepp.data.prepare import prepare
from moepp.training.optim import learning_rate_scale
from moepp.training.settings import RunConfig

SMOOTHED = 20  # steps whose mean has to reach the loss


@dataclass(frozen=True)
class Race:
    """To a mean cross-entropy in nats, on the run's own text, from several seeds of weights and order."""

    loss: float
    seeds: int


def steps_to_loss(build: Callable[[RunConfig], Subject], config: RunConfig, loss: float, seed: int) -> int | None:
    """With the run's batches, rate and schedule; None where its steps do not suffice."""
    from moepp.data.batches import StepSampler, TrainWindows  # imports Lightning, which other timings do without

    config = replace(config, seed=seed)
    torch.manual_seed(seed)
    subject, windows = build(config), TrainWindows(prepare(config.data, progress=False), config.data.seq_len)
    batches = StepSampler(len(windows), config.data.batch_size, seed, order=config.data.order)
    recent: deque[float] = deque(maxlen=SMOOTHED)
    scale = partial(learning_rate_scale, steps=config.trainer.steps, config=config.optim)
    schedule = torch.optim.lr_scheduler.LambdaLR(subject.optimizer, scale)
    for step, chosen in zip(range(config.trainer.steps), batches, strict=False):
        recent.append(float(subject.step(windows[chosen], config.optim.grad_clip)))
        schedule.step()
        if len(recent) == SMOOTHED and statistics.fmean(recent) <= loss:
            return step + 1
    return None
