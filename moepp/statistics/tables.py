"""The one table of all reports, and how it is written: csv at full precision, markdown and terminal as text."""

import csv
import io
from dataclasses import dataclass

NONE = "–"  # no value: never NaN, never 0

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Saved as `name`.csv at full precision; shown with four significant digits, None as a dash, text as it stands.

    One without a name is only shown: its numbers are rounded or carry intervals, and another table has them in full.
    """

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def as_text(cell: Cell) -> str:
    if cell is None:
        return NONE
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:.4g}" if isinstance(cell, float) else cell


def as_csv(table: Table) -> str:
    text = io.StringIO()
    rows = [["" if cell is None else cell for cell in row] for row in table.rows]
    csv.writer(text, lineterminator="\n").writerows([table.columns, *rows])
    return text.getvalue()


def as_markdown(table: Table) -> str:
    """With the caption above, where it has one."""
    head, *body = (f"| {' | '.join(row)} |" for row in _text(table))
    lines = "\n".join([head, "|---|" + "---:|" * (len(table.columns) - 1), *body])
    return f"{table.caption}\n\n{lines}" if table.caption else lines


def as_lines(table: Table) -> list[str]:
    """For the terminal: first column left, the others right; without the caption."""
    rows = _text(table)
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows]


def _text(table: Table) -> list[list[str]]:
    return [list(table.columns), *([as_text(cell) for cell in row] for row in table.rows)]


def number(value: float | None, form: str = ".4f") -> str:
    return NONE if value is None else format(value, form)


def quantity(value: float | None) -> str:
    """1234567 -> 1.23M."""
    if value is None:
        return NONE
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"
