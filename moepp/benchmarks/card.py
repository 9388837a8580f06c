"""What the device gives today: a copy within its memory and a dense product, and the clocks at which it ran them."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch

from moepp.benchmarks.failures import DeviceLost, attempt, describe_failure
from moepp.benchmarks.machine import nvidia_smi
from moepp.benchmarks.tables import Columns, Row, markdown_table
from moepp.training.interleaved import Call, interleaved_times

CardGroup = Literal["copy", "product"]
UNITS = {"copy": "GB/s", "product": "TFLOP/s"}
COLUMNS: Columns = {
    "what": ("what", ""), "median": ("median", ".4g"), "min": ("min", ".4g"), "max": ("max", ".4g"),
    "unit": ("unit", ""),
    **{f"{name}_{when}": (f"{title} {when}", "")
       for name, title in (("sm_mhz", "SM, MHz"), ("memory_mhz", "memory, MHz"), ("watts", "W"), ("celsius", "°C"))
       for when in ("before", "after")},
    "failure": ("failure", ""),
}  # fmt: skip


def _size(gpu: float, cpu: float) -> float:
    return field(default_factory=lambda: gpu if torch.cuda.is_available() else cpu)


@dataclass
class CardBenchmark:
    """Random numbers copied, and two square bfloat16 matrices of them multiplied; small ones without a GPU."""

    copy_gib: float = _size(2.0, 1 / 16)
    size: int = _size(8192, 512)  # of the matrices
    repeats: int = _size(30, 5)
    warmup: int = _size(5, 1)
    seed: int = 0

    TITLE: ClassVar[str] = "What the device gives"
    SCALES: ClassVar[dict[str, Row]] = {}  # the device decides

    def groups(self) -> list[CardGroup]:
        return ["copy", "product"]

    def measure(self, group: CardGroup, before: list[Row], device: torch.device, out: Path) -> list[Row]:
        if before:  # its failure
            return []
        state = {f"{name}_before": value for name, value in nvidia_smi().items()}
        try:
            rates, failure = attempt(partial(self._rates, group, device))
        except torch.AcceleratorError as error:
            raise DeviceLost(f"{group}: {error}", [{"what": group, "failure": describe_failure(error)}]) from error
        state |= {f"{name}_after": value for name, value in nvidia_smi().items()}
        return [{"what": group, "unit": UNITS[group], **(rates or {}), "failure": failure, **state}]

    def _rates(self, group: CardGroup, device: torch.device) -> Row:
        call, work = self._copy(device) if group == "copy" else self._product(device)
        times = interleaved_times([group], lambda *_: call, device, self.repeats, self.warmup, self.seed)[group]
        rates = [work / milliseconds * 1000 for milliseconds in times]
        return {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}

    def _copy(self, device: torch.device) -> tuple[Call, float]:
        """And the GB that it reads and writes."""
        source = torch.rand(int(self.copy_gib * 2**30) // 4, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source), 2 * source.nbytes / 1e9

    def _product(self, device: torch.device) -> tuple[Call, float]:
        """And its TFLOP. Random numbers: a product of constants takes less power, and so runs at higher clocks."""
        a, b = torch.randn(2, self.size, self.size, device=device, dtype=torch.bfloat16)
        product = torch.empty_like(a)
        return lambda: torch.mm(a, b, out=product), 2 * self.size**3 / 1e12

    def setup(self) -> str:
        return (
            f"A copy of {self.copy_gib:g} GiB, bytes read and written counted, and a bfloat16 product of two random "
            f"{self.size} x {self.size} matrices: {self.repeats} calls each after {self.warmup}. Clocks, power and "
            "temperature as nvidia-smi shows them right before and after."
        )

    def table(self, rows: list[Row]) -> list[Row]:
        return rows

    def report(self, rows: list[Row]) -> Iterator[str]:
        return markdown_table(rows, COLUMNS)
