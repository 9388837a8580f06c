import csv
import json
from dataclasses import dataclass
from typing import ClassVar

import pytest

from moepp.benchmarks import folder
from moepp.benchmarks.failures import DeviceLost
from moepp.benchmarks.folder import run_benchmark
from moepp.errors import UsageError

MEASURED = []


@dataclass
class Squares:
    """Measures the square of three numbers; what is in `ends` ends it at that number."""

    numbers: tuple[int, ...] = (1, 2, 3)
    TITLE: ClassVar[str] = "Squares"
    ends: ClassVar[dict[int, BaseException]] = {}

    def groups(self):
        return list(self.numbers)

    def measure(self, group, before, device, out):
        if before:
            return []
        MEASURED.append(group)
        if group in self.ends:
            raise self.ends.pop(group)
        return [{"number": group, "square": group**2}]

    def setup(self):
        return "All at once."

    def table(self, rows):
        return rows

    def report(self, rows):
        return (f"{row['number']}: {row['square']}" for row in rows)


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    MEASURED.clear()
    monkeypatch.setattr(Squares, "ends", {})


def squares(out):
    with open(out / "table.csv") as file:
        return [row["square"] for row in csv.DictReader(file)]


def test_what_was_measured_before_a_kill_is_kept_and_not_measured_again(tmp_path):
    Squares.ends = {3: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(Squares(), tmp_path)
    assert squares(tmp_path) == ["1", "4"]
    assert "2: 4" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "provenance.json").read_text())["benchmark"]["numbers"] == [1, 2, 3]
    assert run_benchmark(Squares(), tmp_path) == (["1: 1", "2: 4", "3: 9"], 0)
    assert MEASURED == [1, 2, 3, 3] and squares(tmp_path) == ["1", "4", "9"]
    run_benchmark(Squares(), tmp_path)
    assert MEASURED == [1, 2, 3, 3]


def test_other_settings_are_refused(tmp_path):
    run_benchmark(Squares(), tmp_path)
    with pytest.raises(UsageError, match=r"holds a benchmark with numbers=\[1, 2, 3\], not \[1, 2\]: give another"):
        run_benchmark(Squares((1, 2)), tmp_path)


def test_a_group_that_would_not_fit_is_left_out_and_named(tmp_path, monkeypatch):
    now = iter(range(0, 10_000, 20))  # every look at the clock is 20 s after the one before
    monkeypatch.setattr(folder.time, "perf_counter", lambda: next(now))
    lines, missing = run_benchmark(Squares(), tmp_path, minutes=1.5)
    assert MEASURED == [1]  # looks: begin 0, free 20, group from 40 to 60; at 80 another 20 s would end at 100
    assert missing == 2
    assert lines == ["1: 1", "", "Left out for lack of time:", "", "- 2", "- 3"]
    assert (tmp_path / "report.md").read_text().endswith("- 2\n- 3\n")
    assert run_benchmark(Squares(), tmp_path) == (["1: 1", "2: 4", "3: 9"], 0)


def test_no_time_at_all_still_leaves_every_file(tmp_path):
    assert run_benchmark(Squares(), tmp_path, minutes=0)[0][0] == "Nothing was measured."
    assert {path.name for path in tmp_path.iterdir()} == {"table.csv", "report.md", "provenance.json"}


def test_what_took_the_device_away_is_kept_and_left_alone_by_the_next_call(tmp_path):
    Squares.ends = {2: DeviceLost("illegal access", [{"number": 2, "square": "lost"}])}
    with pytest.raises(DeviceLost, match="illegal access; the same command goes on without it"):
        run_benchmark(Squares(), tmp_path)
    assert run_benchmark(Squares(), tmp_path) == (["1: 1", "2: lost", "3: 9"], 0)
    assert MEASURED == [1, 2, 3]
