"""How benchmarks show what they measured: CSV for machines, Markdown for people."""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moepp.records import write_text
from moepp.statistics.markup import cell

Row = dict[str, Any]
Columns = Mapping[str, tuple[str, str]]  # a row's key -> the column's title and the format of its numbers


def write_csv(rows: list[Row], path: Path) -> None:
    """A column for every key of any row; numbers with six digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def markdown_table(rows: list[Row], columns: Columns) -> Iterator[str]:
    """The rows as a Markdown table; columns that no row fills are left out."""
    kept = {key: column for key, column in columns.items() if any(row.get(key) is not None for row in rows)}
    yield "| " + " | ".join(title for title, _ in kept.values()) + " |"
    yield "|" + "---|" * len(kept)
    for row in rows:
        yield "| " + " | ".join(_cell(row.get(key), numbers) for key, (_, numbers) in kept.items()) + " |"


def _cell(value: Any, numbers: str) -> str:
    if value is None:
        return "–"
    return format(value, numbers) if isinstance(value, int | float) else cell(str(value))


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """None where one of them was not measured."""
    return None if numerator is None or denominator is None else numerator / denominator


def write_benchmark(path: Path, title: str, setup: str, lines: list[str]) -> None:
    write_text(path, "\n".join([f"# {title}", "", setup, "", *lines]) + "\n")
