"""A benchmark's folder: what was measured so far, and the files that show it.

    rows.jsonl        one line a group of measurements: its name, the seconds it took, its rows
    table.csv, report.md, provenance.json    written anew after every group

A kill loses the group that was being measured; the same command continues with what is missing.
"""

import json
import sys
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from tqdm import tqdm

from moepp.benchmarks.failures import DeviceLost
from moepp.benchmarks.machine import describe_machine, device_facts
from moepp.benchmarks.tables import Row, write_benchmark, write_csv
from moepp.errors import UsageError
from moepp.records import read_json, write_json, write_text
from moepp.statistics.markup import code
from moepp.training.allocator import keep_freed_memory
from moepp.training.provenance import collect, continued


class Benchmark(Protocol):
    """A dataclass whose fields are the settings."""

    TITLE: ClassVar[str]

    def groups(self) -> Sequence[Hashable]:
        """What is measured together, in the order of measurement; `str` of a group is its name."""

    def measure(self, group: Any, before: list[Row], device: torch.device, out: Path) -> list[Row]:
        """Rows of the group, without those that were measured `before`. Raises DeviceLost."""

    def setup(self) -> str:
        """One sentence or more on what was measured."""

    def table(self, rows: list[Row]) -> list[Row]:
        """The rows of table.csv."""

    def report(self, rows: list[Row]) -> Iterator[str]:
        """Lines of Markdown."""


class Folder:
    """Raises UsageError for a folder that holds a benchmark with other settings."""

    def __init__(self, path: Path, benchmark: Benchmark):
        self.path, self.benchmark = path, benchmark
        settings = {"device": device_facts()["device"], **asdict(benchmark)}
        self.settings = json.loads(json.dumps(settings))  # as it is read back
        self.earlier = read_json(path / "provenance.json") or {}
        self._refuse_other_settings()
        self.lines = self._read()

    def _refuse_other_settings(self) -> None:
        found = self.earlier.get("benchmark", self.settings)
        for key in [*self.settings, *found]:
            if found.get(key) != self.settings.get(key):
                raise UsageError(
                    f"{self.path} holds a benchmark with {key}={found.get(key)}, not {self.settings.get(key)}: give "
                    "another folder with --out, or remove that one"
                )

    def _read(self) -> list[dict[str, Any]]:
        path = self.path / "rows.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def rows(self) -> list[Row]:
        return [row for line in self.lines for row in line["rows"]]

    @property
    def longest(self) -> float:
        """Seconds of the group that took longest so far."""
        return max((line["seconds"] for line in self.lines), default=0.0)

    def missing(self) -> list[Hashable]:
        finished = {line["group"] for line in self.lines if not line["lost"]}
        return [group for group in self.benchmark.groups() if str(group) not in finished]

    def measure(self, group: Hashable, device: torch.device) -> None:
        """One group, whose rows are kept before this returns or raises."""
        before = [row for line in self.lines if line["group"] == str(group) for row in line["rows"]]
        begin = time.perf_counter()
        try:
            self._keep(group, self.benchmark.measure(group, before, device, self.path), begin)
        except DeviceLost as error:
            self._keep(group, error.rows, begin, lost=True)
            raise

    def _keep(self, group: Hashable, rows: list[Row], begin: float, lost: bool = False) -> None:
        seconds = time.perf_counter() - begin
        self.lines.append({"group": str(group), "seconds": seconds, "lost": lost, "rows": rows})
        write_text(self.path / "rows.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines))
        self.write([])

    def write(self, left_out: Sequence[Hashable]) -> None:
        """`left_out`: groups for which there was no time."""
        today = datetime.now(UTC).date().isoformat()
        found = collect({}) | device_facts() | {"benchmark": self.settings, "date": today}
        write_json(self.path / "provenance.json", continued(self.earlier, found))
        write_csv(self.benchmark.table(self.rows), self.path / "table.csv")
        setup = f"{describe_machine()}, {today}. {self.benchmark.setup()} Made by {code(found['command'])}."
        write_benchmark(self.path / "report.md", self.benchmark.TITLE, setup, self.report(left_out))

    def report(self, left_out: Sequence[Hashable]) -> list[str]:
        lines = list(self.benchmark.report(self.rows)) if self.rows else ["Nothing was measured."]
        if left_out:
            lines += ["", "Left out for lack of time:", "", *(f"- {group}" for group in left_out)]
        return lines


def run_benchmark(benchmark: Benchmark, out: Path, minutes: float | None = None) -> tuple[list[str], int]:
    """Measures what `out` lacks and writes its files; returns the report's lines and how many groups are missing yet.

    Stops before a group for which `minutes` would not suffice if it took as long as the longest before it.
    """
    folder, begin = Folder(out, benchmark), time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()  # for all alike, as training does
    missing = folder.missing()
    with tqdm(total=len(missing), unit="group", disable=not sys.stderr.isatty()) as bar:
        while missing and (minutes is None or time.perf_counter() - begin + folder.longest <= 60 * minutes):
            bar.set_description(str(missing[0]))
            folder.measure(missing.pop(0), device)
            bar.update()
    folder.write(missing)
    return folder.report(missing), len(missing)
