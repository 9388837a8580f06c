"""One group of the layer benchmark: all implementations on all its cases, in one process and in turn."""

import gc
import statistics
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from moepp.benchmarks.cases import Case, Draw, Inputs, RoutingSource
from moepp.benchmarks.failures import DeviceLost, attempt, describe_failure
from moepp.benchmarks.memory import counts_pages, peak_bytes, resident_bytes
from moepp.benchmarks.peers import IMPLEMENTATIONS, Forward
from moepp.benchmarks.tables import Row
from moepp.layers.moe import MoELayer
from moepp.layers.settings import BalanceConfig, MoEConfig
from moepp.training.interleaved import Call, interleaved_times

Contender = tuple[Case, str]  # and the name of an implementation


@dataclass(frozen=True)
class Sizes:
    """What all cases of a group have in common."""

    tokens: int
    dim: int
    hidden: int
    dtype: str
    backward: bool
    capacity_factor: float | None

    def layer(self, case: Case, device: torch.device, generator: torch.Generator) -> MoELayer:
        """`generator` is on the device."""
        config = MoEConfig(
            dim=self.dim,
            hidden=self.hidden,
            experts=case.counts,
            balance=BalanceConfig(tau=case.tau or 1.0),
            capacity_factor=self.capacity_factor,
        )
        with device:
            layer = MoELayer(config, first=True).to(getattr(torch, self.dtype))
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
        return layer


class Contest:
    """All `names` on all `cases` but what was measured before. What fails leaves the reason, and the others go on."""

    def __init__(
        self, sizes: Sizes, cases: Sequence[Case], names: Sequence[str], device: torch.device, seed: int,
        before: Collection[Contender] = (),
    ):  # fmt: skip
        self.sizes, self.device, self.seed = sizes, device, seed
        self.source, generator = RoutingSource(seed, device), torch.Generator(device).manual_seed(seed)
        self.layers = {case: sizes.layer(case, device, generator) for case in cases}
        self.keys = [(case, name) for case in cases for name in names if (case, name) not in before]
        self.running: Contender | None = None
        self.forwards: dict[Contender, Forward] = {}
        self.failures: dict[Contender, str] = {}
        self.gib: dict[Contender, float] = {}  # most memory that a call held above what stood there before it
        self.resident_gib: dict[Contender, float] = {}  # by how much the process grew, on CPUs whose system tells
        # Random numbers: with constant ones a product takes less power, and so runs at higher clocks.
        shape, dtype = (sizes.tokens * MoEConfig.top_k, sizes.dim), getattr(torch, sizes.dtype)
        self.x_SD, self.gradient_SD = (
            torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2)
        )

    def run(self, repeats: int, warmup: int) -> list[Row]:
        """A row per case and implementation. Raises DeviceLost with the rows of the implementation that was running."""
        try:
            self._warm_up(warmup)
            draws = [self._draws() for _ in range(repeats)]
            alive = [key for key in self.keys if key not in self.failures]
            timed = partial(
                interleaved_times, alive, lambda key, repeat: self._call(key, draws[repeat][key[0]]), self.device,
                repeats, warmup=0, seed=self.seed,
            )  # fmt: skip
            times, of_device = timed(), timed(ahead=True) if self.device.type == "cuda" else {}
        except torch.AcceleratorError as error:
            raise self._lost(describe_failure(error)) from error
        return [
            self._row(key, times.get(key, []), of_device.get(key, []), [each[key[0]] for each in draws])
            for key in self.keys
        ]

    def _lost(self, reason: str) -> DeviceLost:
        """Where it failed on one case it is not tried on the others: each could cost another process."""
        case, culprit = self.running
        self.failures |= {key: reason for key in self.keys if key[1] == culprit}
        rows = [self._row(key, [], [], []) for key in self.keys if key[1] == culprit]
        return DeviceLost(f"{culprit} on {case}: {reason}", rows)

    def _draws(self) -> dict[Case, Draw]:
        """One routing per case, for all implementations."""
        return {case: self.source.draw(layer, case.routing, self.sizes.tokens) for case, layer in self.layers.items()}

    def _warm_up(self, rounds: int) -> None:
        """Builds, compiles and allocates, and shows what fails; the last round's memory is kept."""
        for draws in (self._draws() for _ in range(rounds)):
            for key in self.keys:
                self.gib[key] = peak_bytes(self._call(key, draws[key[0]]), self.device) / 2**30
        if self.device.type == "cpu" and counts_pages():
            draws = self._draws()
            gc.collect()
            for key in self.keys:
                self.resident_gib[key] = resident_bytes(self._call(key, draws[key[0]])) / 2**30

    def _call(self, key: Contender, draw: Draw) -> Call:
        return partial(self._guarded, key, self._inputs(draw))

    def _inputs(self, draw: Draw) -> Inputs:
        return Inputs.of(draw, self.x_SD, self.sizes.backward)

    def _guarded(self, key: Contender, inputs: Inputs) -> None:
        self.running = key
        if key not in self.failures:
            _, failure = attempt(partial(self._pass, key, inputs))
            if failure:
                self.failures[key] = failure

    def _pass(self, key: Contender, inputs: Inputs) -> None:
        """Forward, and backward to all inputs and weights; nothing keeps the gradients."""
        layer = self.layers[key[0]]
        if key not in self.forwards:
            self.forwards[key] = IMPLEMENTATIONS[key[1]](layer)
        with torch.set_grad_enabled(self.sizes.backward):
            forward = self.forwards[key]
            y = forward(inputs)
            if self.sizes.backward:
                owner = forward if isinstance(forward, nn.Module) else layer
                leaves = [inputs.x_TD, inputs.x_RD, inputs.routing.gate_TK, *owner.parameters()]
                torch.autograd.grad(y, leaves, self.gradient_SD[: len(y)], allow_unused=True)

    def _row(self, key: Contender, times: list[float], of_device: list[float], draws: list[Draw]) -> Row:
        case, name = key
        failure = self.failures.get(key)
        measured: Row = {}
        if times and not failure:
            measured = {"ms": statistics.median(times), "min_ms": min(times), "calls_ms": [round(t, 3) for t in times]}
        if of_device and not failure:
            measured["device_ms"] = statistics.median(of_device)
        work = self._work(draws) if draws else {}
        memory = {"gib": self.gib.get(key), "resident_gib": self.resident_gib.get(key)}
        return asdict(case) | {"implementation": name, "failure": failure} | memory | measured | work

    def _work(self, draws: list[Draw]) -> Row:
        """The FFN experts' share of all slots, and the TFLOP of their products in one call, on average."""
        sizes, rows = self.sizes, statistics.fmean(draw.ffn_rows for draw in draws)
        tflop = 6 * rows * sizes.dim * sizes.hidden * (3 if sizes.backward else 1) / 1e12
        return {"ffn_share": statistics.fmean(draw.ffn_share for draw in draws), "tflop": tflop}

    def trace(self, path: Path) -> None:
        """Profiles one call of the first implementation on the first case, once it is warm, into `path`, in Chrome's
        format.
        """
        key, unfinished = self.keys[0], path.with_name(f"unfinished.{path.name}")
        for _ in range(2):
            self._pass(key, self._inputs(self._draws()[key[0]]))
        inputs = self._inputs(self._draws()[key[0]])
        with torch.profiler.profile() as profiler:
            self._pass(key, inputs)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        profiler.export_chrome_trace(str(unfinished))
        unfinished.replace(path)
