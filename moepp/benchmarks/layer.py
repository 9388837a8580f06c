"""Times the expert layer against its floors and its peers, with routing that changes at every call."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch

from moepp.benchmarks.cases import SETS, Case
from moepp.benchmarks.contest import Contest, Sizes
from moepp.benchmarks.failures import DeviceLost, attempt, describe_failure
from moepp.benchmarks.layer_tables import layer_report, layer_table
from moepp.benchmarks.tables import Row
from moepp.layers.settings import MoEConfig

TRACE = "trace.json.gz"
PEERS = ["loop", "transformers_eager", "transformers_grouped_mm"]


@dataclass(frozen=True)
class LayerGroup:
    """Cases that are timed in turn: vanilla MoE and MoE++ at `taus`, under every kind of routing."""

    tokens: int
    ffn: int
    taus: tuple[float, ...]
    dtype: str
    direction: str
    trace: bool = False  # profile one call of ours at the first tau, and time nothing

    def __str__(self) -> str:
        what = "trace" if self.trace else f"{self.dtype} {self.direction}"
        return f"{what}, {self.tokens} tokens, {self.ffn} FFN experts, tau {', '.join(map(str, self.taus))}"


@dataclass
class LayerBenchmark:
    """What is measured. Defaults are the paper's 0.6B layer at 4096 tokens, everything of Table 3, dropless."""

    tokens: list[int] = field(default_factory=lambda: [4096])
    dim: int = 768
    hidden: int = 2048
    fine_hidden: int = 512  # of the set of 64
    ffn: list[int] = field(default_factory=lambda: [8, 16, 32])  # FFN experts of the sets
    taus: list[list[float]] = field(default_factory=lambda: [[0.10, 0.25, 0.50, 0.75, 1.0]])  # each list beside vanilla
    passes: list[tuple[str, str]] = field(
        default_factory=lambda: [(d, p) for d in ("float32", "bfloat16") for p in ("forward", "forward+backward")]
    )
    routings: list[str] = field(default_factory=lambda: ["learned", "balanced"])
    capacity_factor: float | None = None
    implementations: list[str] = field(default_factory=lambda: ["moepp", "floor", "zero_computation", *PEERS])
    repeats: int = 5
    warmup: int = 1
    seed: int = 0
    trace: bool = False  # of ours, forward and backward, for the first group

    TITLE: ClassVar[str] = "The expert layer's speed"
    ON_GPU: ClassVar[Row] = {
        "taus": [[0.75, 0.10, 0.25, 1.0]],
        "passes": [("bfloat16", "forward+backward"), ("bfloat16", "forward")],
        "routings": ["learned"],
        "capacity_factor": MoEConfig.capacity_factor,
        "implementations": [
            "moepp", "triton", "grouped", "floor", "zero_computation", "loop", "transformers_grouped_mm",
            "whole_layer",
        ],
        "trace": True,
    }  # fmt: skip
    SCALES: ClassVar[dict[str, Row]] = {
        "paper": {},
        "laptop": {  # under a minute on two cores
            "ffn": [8], "taus": [[0.75]], "passes": [("float32", "forward"), ("bfloat16", "forward+backward")],
            "routings": ["learned"], "repeats": 3,
        },
        "cpu": {  # half an hour on one thread
            "tokens": [512, 1024, 4096], "ffn": [8, 16, 32, 64], "taus": [[0.10, 0.25, 0.75, 1.0]],
            "passes": [("float32", "forward"), ("float32", "forward+backward")], "routings": ["learned"],
            "implementations": ["moepp", "expert_floor", "loop", "transformers_grouped_mm"], "repeats": 5,
        },
        "smoke": ON_GPU | {
            "tokens": [64], "dim": 16, "hidden": 32, "fine_hidden": 16, "ffn": [8, 64], "taus": [[0.75]], "repeats": 2,
        },
        "gpu": ON_GPU | {"tokens": [65536, 16384, 4096], "ffn": [8, 16, 32, 64], "repeats": 7, "warmup": 2},
    }  # fmt: skip

    def groups(self) -> list[LayerGroup]:
        """The first taus of all sizes come before others, and so do the first number of tokens and both passes."""
        groups = [
            LayerGroup(tokens, ffn, tuple(taus), *one)
            for taus in self.taus
            for tokens in self.tokens
            for one in self.passes
            for ffn in self.ffn
        ]
        first = groups[0]
        traced = LayerGroup(first.tokens, first.ffn, first.taus[:1], first.dtype, "forward+backward", trace=True)
        return [first, *([traced] if self.trace else []), *groups[1:]]

    def measure(self, group: LayerGroup, before: list[Row], device: torch.device, out: Path) -> list[Row]:
        if group.trace:
            return self._trace(group, device, out / TRACE) if not before else []
        cases = [Case(group.ffn, tau, routing) for routing in self.routings for tau in (None, *group.taus)]
        done = [(Case(row["ffn"], row["tau"], row["routing"]), row["implementation"]) for row in before]
        contest = Contest(self._sizes(group), cases, self.implementations, device, self.seed, done)
        shared = {"tokens": group.tokens, "dtype": group.dtype, "direction": group.direction, "group": str(group)}
        try:
            return [row | shared for row in contest.run(self.repeats, self.warmup)]
        except DeviceLost as error:
            error.rows = [row | shared for row in error.rows]
            raise

    def _trace(self, group: LayerGroup, device: torch.device, path: Path) -> list[Row]:
        case = Case(group.ffn, group.taus[0], self.routings[0])
        contest = Contest(self._sizes(group), [case], ["moepp"], device, self.seed)
        try:
            _, failure = attempt(partial(contest.trace, path))
        except torch.AcceleratorError as error:
            raise DeviceLost(
                f"{group}: {error}", [{"trace": str(group), "failure": describe_failure(error)}]
            ) from error
        return [{"trace": str(group), "failure": failure}]

    def _sizes(self, group: LayerGroup) -> Sizes:
        hidden = self.fine_hidden if group.ffn == max(SETS) else self.hidden
        backward = "backward" in group.direction
        return Sizes(group.tokens, self.dim, hidden, group.dtype, backward, self.capacity_factor)

    def setup(self) -> str:
        fine = f" ({self.fine_hidden} with {max(SETS)} experts)" if max(SETS) in self.ffn else ""
        limit = "dropless" if self.capacity_factor is None else f"slots over capacity {self.capacity_factor} dropped"
        return (
            f"{' and '.join(map(str, self.tokens))} tokens, width {self.dim}, hidden {self.hidden}{fine}, top-"
            f"{MoEConfig.top_k}, {limit}. Medians of {self.repeats} interleaved calls, every call with new routing; on "
            "one thread of a CPU of its own time, so that other processes do not count."
        )

    def table(self, rows: list[Row]) -> list[Row]:
        return layer_table([row for row in rows if "trace" not in row])

    def report(self, rows: list[Row]) -> Iterator[str]:
        yield from layer_report([row for row in rows if "trace" not in row])
        for row in rows:
            if "trace" in row:
                yield ""
                yield f"Profile of one call ({row['trace']}): {row['failure'] or f'{TRACE}, for Perfetto'}."
