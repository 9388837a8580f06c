"""Times whole training steps of MoE++ with and without what a step may do otherwise: compile, take the loss in chunks,
fuse the optimizer, read batches ahead in another process.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from moepp.benchmarks.failures import DeviceLost, attempt, describe_failure
from moepp.benchmarks.memory import peak_bytes
from moepp.benchmarks.subjects import Subject, decoder
from moepp.benchmarks.tables import Columns, Row, markdown_table
from moepp.config import compose
from moepp.models import cross_entropy
from moepp.training.interleaved import Call, interleaved_times
from moepp.training.settings import RunConfig

CHUNKS = 4  # of a step's loss
COLUMNS: Columns = {
    "size": ("size", ""), "batch": ("tokens per step", ""), "choice": ("choice", ""), "default": ("by default", ""),
    "with_ms": ("with, ms", ",.1f"), "without_ms": ("without, ms", ",.1f"), "gain": ("without / with", ".3f"),
    "with_gib": ("with, GiB", ".3f"), "without_gib": ("without, GiB", ".3f"), "failure": ("failure", ""),
}  # fmt: skip
NextBatch = Callable[[], Tensor]  # the next batch, [B, S+1]


@dataclass(frozen=True)
class ChoiceGroup:
    """One choice, made and not made, at one size."""

    size: str
    choice: str  # of CHOICES

    def __str__(self) -> str:
        return f"size={self.size}, {self.choice}"


@dataclass(frozen=True)
class ChoiceSide:
    """A model of `config` and what it trains on, on `device`: with a choice or without."""

    chosen: bool
    config: RunConfig
    device: torch.device
    seed: int

    def subject(self) -> Subject:
        return decoder(self.config, self.device)

    def random_tokens(self) -> NextBatch:
        data, generator = self.config.data, torch.Generator(self.device).manual_seed(self.seed)
        shape, entries = (data.batch_size, data.seq_len + 1), self.config.model.vocab_size
        return lambda: torch.randint(entries, shape, generator=generator, device=self.device)

    def steps(
        self, subject: Subject, draw: NextBatch, around: Callable[[], AbstractContextManager] = nullcontext
    ) -> Call:
        """A call that reads a batch and trains on it."""

        def step() -> None:
            with around():
                subject.step(draw().to(self.device, non_blocking=True), self.config.optim.grad_clip)

        return step


def compiled(side: ChoiceSide) -> Call:
    config = replace(side.config, trainer=replace(side.config.trainer, compile=side.chosen))
    return side.steps(decoder(config, side.device), side.random_tokens())


def loss_in_chunks(side: ChoiceSide) -> Call:
    data = side.config.data
    logits = data.batch_size * data.seq_len * side.config.model.vocab_size
    most = logits // CHUNKS if side.chosen else logits
    return side.steps(side.subject(), side.random_tokens(), partial(_whole_logits, most))


@contextmanager
def _whole_logits(most: int) -> Iterator[None]:
    """Takes the loss of more logits in chunks."""
    before, cross_entropy.WHOLE = cross_entropy.WHOLE, most
    try:
        yield
    finally:
        cross_entropy.WHOLE = before


def fused_optimizer(side: ChoiceSide) -> Call:
    """Beside torch's other form of AdamW, an operation for all parameters at a time (foreach)."""
    subject = side.subject()
    if not side.chosen:
        groups, defaults = subject.optimizer.param_groups, subject.optimizer.defaults
        plain = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups]
        shared = {key: defaults[key] for key in ("lr", "betas", "eps")}
        subject.optimizer = torch.optim.AdamW(plain, **shared, foreach=True)
    return side.steps(subject, side.random_tokens())


def loader_process(side: ChoiceSide) -> Call:
    """Batches of the size's own text, as training reads them."""
    from torch.utils.data import DataLoader

    from moepp.data.batches import StepSampler, TrainWindows  # imports Lightning, which other timings do without
    from moepp.data.prepare import prepare

    data = side.config.data
    windows = TrainWindows(prepare(data, progress=False), data.seq_len)
    sampler = StepSampler(len(windows), data.batch_size, side.seed, order=data.order)
    loader = DataLoader(windows, batch_size=None, sampler=sampler, num_workers=int(side.chosen))
    return side.steps(side.subject(), partial(next, iter(loader)))


CHOICES: dict[str, tuple[Callable[[ChoiceSide], Call], str]] = {  # and where training makes them by itself
    "compiled": (compiled, "no: trainer.compile"),
    "loss in chunks": (loss_in_chunks, f"above {cross_entropy.WHOLE:,} logits"),
    "fused optimizer": (fused_optimizer, "yes"),
    "a loader process": (loader_process, "no: data.workers"),
}


@dataclass
class ChoicesBenchmark:
    """What is measured. Defaults are the laptop scale's model."""

    sizes: list[str] = field(default_factory=lambda: ["tiny"])  # fragments of conf/size
    choices: list[str] = field(default_factory=lambda: list(CHOICES))
    most_tokens: int = 65_536  # of a step, where the size's batch has more
    overrides: list[str] = field(default_factory=list)  # of every config
    repeats: int = 15
    warmup: int = 3
    seed: int = 0

    TITLE: ClassVar[str] = "What a training step may do otherwise"
    SCALES: ClassVar[dict[str, Row]] = {
        "laptop": {},
        "smoke": {"sizes": ["smoke"], "choices": list(CHOICES)[1:], "repeats": 2, "warmup": 1},
        "cpu": {  # minutes on one thread
            "sizes": ["tiny", "mini", "small"],
            "most_tokens": 2048,
            "overrides": ["recipe=tuned", "trainer.precision=32-true"],
            "repeats": 7,
        },
        "gpu": {"sizes": ["mini", "small"]},
    }

    def groups(self) -> list[ChoiceGroup]:
        return [ChoiceGroup(size, choice) for size in self.sizes for choice in self.choices]

    def measure(self, group: ChoiceGroup, before: list[Row], device: torch.device, out: Path) -> list[Row]:
        if before:  # its failure
            return []
        row = {"size": group.size, "choice": group.choice, "default": CHOICES[group.choice][1]}
        try:
            measured, failure = attempt(partial(self._both, group, device))
        except torch.AcceleratorError as error:
            raise DeviceLost(f"{group}: {error}", [row | {"failure": describe_failure(error)}]) from error
        return [row | (measured or {}) | {"failure": failure}]

    def _both(self, group: ChoiceGroup, device: torch.device) -> Row:
        """In turn, each side with a model of its own."""
        torch.compiler.reset()
        config, (made, _) = self.config(group.size), CHOICES[group.choice]
        calls = {name: made(ChoiceSide(name == "with", config, device, self.seed)) for name in ("with", "without")}
        times = interleaved_times(
            calls, lambda name, repeat: calls[name], device, self.repeats, self.warmup, self.seed
        )  # fmt: skip
        medians = {name: statistics.median(of_one) for name, of_one in times.items()}
        row: Row = {"batch": config.data.batch_size * config.data.seq_len}
        row |= {f"{name}_ms": median for name, median in medians.items()}
        row["gain"] = medians["without"] / medians["with"]
        if device.type == "cuda" or group.choice != "compiled":  # compiled code allocates behind the counter's back
            row |= {f"{name}_gib": peak_bytes(call, device) / 2**30 for name, call in calls.items()}
        return row

    def config(self, size: str) -> RunConfig:
        chosen: list[Any] = [f"size={size}", "model=moepp", "data=sotu", "tracking=jsonl", *self.overrides]
        config = compose(RunConfig, chosen)
        sequences = max(1, min(config.data.batch_size, self.most_tokens // config.data.seq_len))
        return replace(config, data=replace(config.data, batch_size=sequences))

    def setup(self) -> str:
        return (
            "Whole steps of MoE++, gradient clipping and AdamW included, with a choice and without it in turn, "
            f"each with a model of its own: medians of {self.repeats} after {self.warmup}, the compilation not "
            f"counted. A step takes the size's batch, at most {self.most_tokens:,} tokens, of random ids; with a "
            f"loader process and without one, of the size's text. In chunks: {CHUNKS} of a step. On a CPU with one "
            "thread a time is the CPU's of this process, and memory is that of the tensors."
            + (f" All with {' '.join(self.overrides)}." if self.overrides else "")
        )

    def table(self, rows: list[Row]) -> list[Row]:
        return rows

    def report(self, rows: list[Row]) -> Iterator[str]:
        return markdown_table(rows, COLUMNS)
