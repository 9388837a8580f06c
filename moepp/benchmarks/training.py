"""Times whole training steps, optimizer included, of vanilla MoE and MoE++, of the released layer in the same decoder,
and of transformers' models.
"""

import gc
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from math import inf
from pathlib import Path
from typing import ClassVar

import torch

from moepp.benchmarks.failures import DeviceLost, attempt, describe_failure
from moepp.benchmarks.memory import counts_pages, grown_since, resident_before
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
class TrainingGroup:
    """One model, alone on the device."""

    size: str
    model: str
    compiled: bool
    overrides: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"size={self.size}, {self.model}, {'compiled' if self.compiled else 'eager'}"

    def config(self) -> RunConfig:
        arm = "vanilla" if self.model in TRANSFORMERS else self.model.removesuffix(RELEASED)
        compiled = f"trainer.compile={str(self.compiled).lower()}"
        return compose(RunConfig, [f"size={self.size}", f"model={arm}", "tracking=jsonl", compiled, *self.overrides])

    def subject(self, config: RunConfig, device: torch.device) -> Subject:
        build = TRANSFORMERS.get(self.model) or partial(decoder, released=self.model.endswith(RELEASED))
        return build(config, device)


@dataclass
class TrainingBenchmark:
    """What is measured. Defaults are the laptop scale's model."""

    sizes: list[str] = field(default_factory=lambda: ["tiny"])  # fragments of conf/size
    # A fragment of conf/model, with or without RELEASED, or one of TRANSFORMERS; and whether it is compiled.
    models: list[tuple[str, bool]] = field(default_factory=lambda: [*EAGER, *OURS_COMPILED, (MIXTRAL, True)])
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
            "most_tokens": 2048,
            "overrides": ["recipe=tuned", "trainer.precision=32-true"],
            "races": {"tiny": Race(loss=5.0, seeds=3)},
            "repeats": 7,
        },
        "gpu": {"sizes": ["small", "0.6b"]},
    }

    def groups(self) -> list[TrainingGroup]:
        """All eager ones first: a compilation takes up to a minute."""
        groups = [TrainingGroup(size, *model, tuple(self.overrides)) for size in self.sizes for model in self.models]
        return sorted(groups, key=lambda group: group.compiled)

    def measure(self, group: TrainingGroup, before: list[Row], device: torch.device, out: Path) -> list[Row]:
        if before:  # its failure
            return []
        row = {"size": group.size, "model": group.model, "compiled": "yes" if group.compiled else "no"}
        try:
            measured, failure = attempt(partial(self._largest, group, device))
        except torch.AcceleratorError as error:
            raise DeviceLost(
                f"{group}: {describe_failure(error)}", [row | {"failure": describe_failure(error)}]
            ) from error
        return [row | (measured or {}) | {"failure": failure}]

    def _largest(self, group: TrainingGroup, device: torch.device) -> Row:
        """Of the size's batch, or of as many sequences as fit into the device's memory: halved until they do."""
        config = group.config()
        sequences = max(1, min(config.data.batch_size, self.most_tokens // config.data.seq_len))
        while True:
            try:
                return self._steps(config, group, sequences, device)
            except torch.OutOfMemoryError:
                if sequences == 1:
                    raise
            sequences //= 2  # outside of the except clause, which keeps the tensors of the failed step alive

    def _steps(self, config: RunConfig, group: TrainingGroup, sequences: int, device: torch.device) -> Row:
        _free(device)
        before = resident_before() if device.type == "cpu" and counts_pages() else None
        subject = group.subject(config, device)
        shape, generator = (sequences, config.data.seq_len + 1), torch.Generator(device).manual_seed(self.seed)

        def draw() -> torch.Tensor:
            return torch.randint(config.model.vocab_size, shape, generator=generator, device=device)

        times = interleaved_times(
            [group],
            lambda *_: partial(subject.step, draw(), config.optim.grad_clip),
            device, self.repeats, self.warmup, self.seed,
        )[group]  # fmt: skip
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else before and grown_since(before)
        row = self._row(config, subject, sequences * config.data.seq_len, times, draw(), device)
        return row | {"gib": peak and peak / 2**30} | self._race(group, config, row["step_ms"], device)

    def _race(self, group: TrainingGroup, config: RunConfig, step_ms: float, device: torch.device) -> Row:
        """The median over seeds, of which those count as slowest that do not get there."""
        race = self.races.get(group.size)
        if race is None:
            return {}
        build = partial(group.subject, device=device)
        steps = [steps_to_loss(build, config, race.loss, seed) for seed in range(race.seeds)]
        row: Row = {"steps_of_seeds": " ".join(map(str, steps))}
        median = statistics.median(inf if each is None else each for each in steps)
        return row if median == inf else row | {"steps_to_loss": median, "seconds_to_loss": median * step_ms / 1000}

    def _row(
        self, config: RunConfig, subject: Subject, batch: int, times: list[float], tokens: torch.Tensor,
        device: torch.device,
    ) -> Row:  # fmt: skip
        """`batch` is in tokens, `times` in milliseconds."""
        ffn_per_token = subject.ffn_per_token(tokens)
        tokens_per_s = batch / statistics.median(times) * 1000
        flops = 3 * sum(forward_flops(config.model, config.data.seq_len, ffn_per_token).values())
        return {
            "batch": batch,
            "step_ms": statistics.median(times),
            "step_min_ms": min(times),
            "tokens_per_s": tokens_per_s,
            "ffn_per_token": ffn_per_token,
            "tflops": flops * tokens_per_s / 1e12,
            "mfu": ratio(flops * tokens_per_s, peak_flops(device)),
        }

    def setup(self) -> str:
        return (
            "Whole steps on random token ids, gradient clipping and AdamW included, one model after the other: medians "
            f"of {self.repeats} after {self.warmup}. A step takes the size's batch, at most {self.most_tokens:,} "
            "tokens, and no more than fit into memory. MFU: three times the forward FLOPs, with the measured FFN "
            "experts per token, over the device's dense bfloat16 peak. Where ours runs under autocast, "
            "Mixtral's weights and moments are bfloat16 (its grouped products ignore autocast), so its steps move less."
            " On a CPU the peak is by how much the process grew."
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
        torch.cuda.reset_peak_memory_stats(device)
