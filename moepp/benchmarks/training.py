"""Times whole training steps, optimizer included, of vanilla MoE and MoE++, of the released layer in the same decoder,
and of transformers' models.
"""

import gc
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from math import inf
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch

from moepp.benchmarks.failures import DeviceLost, attempt, describe_failure
from moepp.benchmarks.memory import memory_growth
from moepp.benchmarks.race import SMOOTHED, Race, steps_to_loss
from moepp.benchmarks.subjects import Subject, decoder, mixtral, qwen3_moe
from moepp.benchmarks.tables import Columns, Row, markdown_table, ratio
from moepp.config import compose
from moepp.models.budget import forward_flops
from moepp.training.interleaved import interleaved_times
from moepp.training.settings import RunConfig
from moepp.training.throughput import peak_flops

MIXTRAL, QWEN = "transformers Mixtral", "transformers Qwen3-MoE"
TRANSFORMERS = {MIXTRAL: mixtral, QWEN: qwen3_moe}
RELEASED = ", released layer"  # after the model in which it takes the place of ours
OURS_COMPILED = [("moepp", True), ("vanilla", True)]
EAGER = [(MIXTRAL, False), ("moepp", False), ("vanilla", False)]
COLUMNS: Columns = {
    "size": ("size", ""), "model": ("model", ""), "compiled": ("compiled", ""),
    "batch": ("tokens per step", ""), "step_ms": ("step, ms", ",.1f"), "tokens_per_s": ("tokens/s", ",.0f"),
    "mfu": ("MFU", ".1%"), "gib": ("peak, GiB", ".2f"), "ffn_per_token": ("FFN experts per token", ".2f"),
    "over_vanilla": ("over vanilla", ".2f"), "over_released": ("over the released layer", ".2f"),
    "over_transformers": ("over transformers", ".2f"), "steps_to_loss": ("steps to the loss", ",.0f"),
    "seconds_to_loss": ("seconds to it", ",.1f"),
}  # fmt: skip


@dataclass(frozen=True)
class Entrant:
    """A model whose steps are timed."""

    size: str
    model: str
    compiled: bool
    overrides: tuple[str, ...] = ()

    def config(self) -> RunConfig:
        arm = "vanilla" if self.model in TRANSFORMERS else self.model.removesuffix(RELEASED)
        compiled = f"trainer.compile={str(self.compiled).lower()}"
        return compose(RunConfig, [f"size={self.size}", f"model={arm}", "tracking=jsonl", compiled, *self.overrides])

    def subject(self, config: RunConfig, device: torch.device) -> Subject:
        build = TRANSFORMERS.get(self.model) or partial(decoder, released=self.model.endswith(RELEASED))
        return build(config, device)

    def cells(self) -> Row:
        return {"size": self.size, "model": self.model, "compiled": "yes" if self.compiled else "no"}


@dataclass(frozen=True)
class TrainingGroup:
    """Models of one size, timed in turn; or one, alone on the device."""

    entrants: tuple[Entrant, ...]

    def __str__(self) -> str:
        first, names = self.entrants[0], ", ".join(entrant.model for entrant in self.entrants)
        return f"size={first.size}, {names}, {'compiled' if first.compiled else 'eager'}"


class Running(NamedTuple):
    """A model that has taken its first steps, and the most bytes that it held above what stood there before it."""

    subject: Subject
    peak: int | None


@dataclass
class TrainingBenchmark:
    """What is measured. Defaults are the laptop scale's model."""

    sizes: list[str] = field(default_factory=lambda: ["tiny"])  # fragments of conf/size
    # A fragment of conf/model, with or without RELEASED, or one of TRANSFORMERS; and whether it is compiled.
    models: list[tuple[str, bool]] = field(default_factory=lambda: [*EAGER, *OURS_COMPILED, (MIXTRAL, True)])
    together: bool = False  # all models of a size in one process and in turn, for which they must fit beside each other
    most_tokens: int = 65_536  # of a step, where the size's batch has more
    overrides: list[str] = field(default_factory=list)  # of every config
    races: dict[str, Race] = field(default_factory=dict)  # by size
    repeats: int = 10
    warmup: int = 3
    seed: int = 0

    TITLE: ClassVar[str] = "The speed of training"
    SCALES: ClassVar[dict[str, Row]] = {
        "laptop": {},
        "smoke": {
            "sizes": ["smoke"],
            "models": EAGER,
            "repeats": 2,
            "warmup": 1,
        },
        "cpu": {  # minutes on one thread
            "models": [(name, False) for arm in ("moepp", "vanilla") for name in (arm, f"{arm}{RELEASED}")]
            + [(name, False) for name in TRANSFORMERS],
            "sizes": ["tiny", "mini", "small"],
            "together": True,
            "most_tokens": 2048,
            "overrides": ["recipe=tuned", "trainer.precision=32-true"],
            "races": {"tiny": Race(loss=5.0, seeds=3)},
            "repeats": 7,
        },
        "gpu": {"sizes": ["small", "0.6b"]},
    }

    def groups(self) -> list[TrainingGroup]:
        """All eager ones first: a compilation takes up to a minute."""
        entrants = [Entrant(size, *model, tuple(self.overrides)) for size in self.sizes for model in self.models]
        entrants.sort(key=lambda entrant: entrant.compiled)
        if not self.together:
            return [TrainingGroup((entrant,)) for entrant in entrants]
        alike = groupby(entrants, key=lambda entrant: (entrant.compiled, entrant.size))
        return [TrainingGroup(tuple(group)) for _, group in alike]

    def measure(self, group: TrainingGroup, before: list[Row], device: torch.device, out: Path) -> list[Row]:
        if before:  # its failure
            return []
        try:
            rows, failure = attempt(partial(self._largest, group, device))
        except torch.AcceleratorError as error:
            reason = describe_failure(error)
            lost = [entrant.cells() | {"failure": reason} for entrant in group.entrants]
            raise DeviceLost(f"{group}: {reason}", lost) from error
        return rows or [entrant.cells() | {"failure": failure} for entrant in group.entrants]

    def _largest(self, group: TrainingGroup, device: torch.device) -> list[Row]:
        """Of the size's batch, or of as many sequences as fit into the device's memory: halved until they do."""
        data = group.entrants[0].config().data
        sequences = max(1, min(data.batch_size, self.most_tokens // data.seq_len))
        while True:
            try:
                return self._rows(group, sequences, device)
            except torch.OutOfMemoryError:
                if sequences == 1:
                    raise
            sequences //= 2  # outside of the except clause, which keeps the tensors of the failed step alive

    def _rows(self, group: TrainingGroup, sequences: int, device: torch.device) -> list[Row]:
        rows = self._timed(group, sequences, device)
        for entrant, row in rows.items():
            if "step_ms" in row:
                row |= self._race(entrant, row["step_ms"], device)
        return list(rows.values())

    def _timed(self, group: TrainingGroup, sequences: int, device: torch.device) -> dict[Entrant, Row]:
        """Once it returns, the memory of all is free again."""
        _free(device)
        config = group.entrants[0].config()
        shape, generator = (sequences, config.data.seq_len + 1), torch.Generator(device).manual_seed(self.seed)
        draws = [
            torch.randint(config.model.vocab_size, shape, generator=generator, device=device)
            for _ in range(self.repeats)
        ]
        rows, running = {}, {}
        for each in group.entrants:
            begin = partial(self._begin, each, draws[0], device)
            running[each], failure = attempt(begin, passing=(torch.OutOfMemoryError,))
            rows[each] = each.cells() | {"failure": failure}
        running = {each: begun for each, begun in running.items() if begun}
        times = interleaved_times(
            running,
            lambda each, repeat: partial(running[each].subject.step, draws[repeat], config.optim.grad_clip),
            device, self.repeats, warmup=0, seed=self.seed,
        )  # fmt: skip
        for each, begun in running.items():
            rows[each] |= self._row(each.config(), begun, times[each], draws[0], device)
        return rows

    def _begin(self, entrant: Entrant, tokens: torch.Tensor, device: torch.device) -> Running:
        """Built and warm. Its rate is 0: all keep the routing of untrained routers, so that what is compared computes
        as much.
        """
        config, grown = entrant.config(), memory_growth(device)
        subject = entrant.subject(config, device)
        for group in subject.optimizer.param_groups:
            group["lr"] = 0.0
        for _ in range(self.warmup):
            subject.step(tokens, config.optim.grad_clip)
        return Running(subject, grown())

    def _race(self, entrant: Entrant, step_ms: float, device: torch.device) -> Row:
        """The median over seeds, of which those count as slowest that do not get there."""
        race, config = self.races.get(entrant.size), entrant.config()
        if race is None:
            return {}
        build = partial(entrant.subject, device=device)
        steps = [steps_to_loss(build, config, race.loss, seed) for seed in range(race.seeds)]
        row: Row = {"steps_of_seeds": " ".join(map(str, steps))}
        median = statistics.median(inf if each is None else each for each in steps)
        return row if median == inf else row | {"steps_to_loss": median, "seconds_to_loss": median * step_ms / 1000}

    def _row(
        self, config: RunConfig, running: Running, times: list[float], tokens: torch.Tensor, device: torch.device
    ) -> Row:
        """`times` in milliseconds, of steps over as many `tokens` [B, S+1]."""
        batch, ffn_per_token = tokens[:, 1:].numel(), running.subject.ffn_per_token(tokens)
        tokens_per_s = batch / statistics.median(times) * 1000
        flops = 3 * sum(forward_flops(config.model, config.data.seq_len, ffn_per_token).values())
        return {
            "batch": batch,
            "step_ms": statistics.median(times),
            "step_min_ms": min(times),
            "gib": running.peak and running.peak / 2**30,
            "tokens_per_s": tokens_per_s,
            "ffn_per_token": ffn_per_token,
            "tflops": flops * tokens_per_s / 1e12,
            "mfu": ratio(flops * tokens_per_s, peak_flops(device)),
        }

    def setup(self) -> str:
        order = "all models of a size in turn" if self.together else "one model after the other"
        return (
            f"Whole steps on random token ids, gradient clipping and AdamW at a rate of 0 included, {order}: "
            f"medians of {self.repeats} after {self.warmup}. A step takes the size's batch, at most "
            f"{self.most_tokens:,} tokens, and no more than fit into memory. MFU: three times the forward FLOPs, with "
            "the measured FFN experts per token, over the device's dense bfloat16 peak. Where ours runs under "
            "autocast, Mixtral's weights and moments are bfloat16 (its grouped products ignore autocast), so its steps "
            "move less. On a CPU the peak is by how much the process grew."
            + (f" All with {' '.join(self.overrides)}." if self.overrides else "")
            + "".join(
                f" To the loss at {size}: until the mean cross-entropy of {SMOOTHED} steps on the size's own text is "
                f"{race.loss}, the median of {race.seeds} seeds, at the time that a step takes here."
                for size, race in self.races.items()
            )
        )

    def table(self, rows: list[Row]) -> list[Row]:
        """Each beside vanilla MoE compiled as it is, and ours beside the released layer and transformers' fastest."""
        speeds = {(row["size"], row["model"], row["compiled"]): row.get("tokens_per_s") for row in rows}
        return [row | _ratios(row, speeds) for row in rows]

    def report(self, rows: list[Row]) -> Iterator[str]:
        yield from markdown_table(self.table(rows), COLUMNS | {"failure": ("failure", "")})


def _ratios(row: Row, speeds: dict[tuple[str, str, str], float | None]) -> Row:
    size, own = row["size"], row.get("tokens_per_s")
    if row["model"] in TRANSFORMERS:
        return {"over_vanilla": None, "over_released": None, "over_transformers": None}
    theirs = [speed for (of, model, _), speed in speeds.items() if of == size and model in TRANSFORMERS and speed]
    return {
        "over_released": ratio(own, speeds.get((size, f"{row['model']}{RELEASED}", row["compiled"]))),
        "over_vanilla": ratio(own, speeds.get((size, "vanilla", row["compiled"]))),
        "over_transformers": ratio(own, max(theirs, default=None)),
    }


def _free(device: torch.device) -> None:
    """What models before left: compiled code keeps their memory."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
