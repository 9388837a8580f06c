"""The one table of all reports, and how it is written: csv to seven digits, markdown and terminal as text."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

from moepp.statistics import markup
from moepp.terminal import painted, width

NONE = "–"  # no value: never NaN, never 0
DIGITS = 7  # of what is saved, as many as a float32 has; the records have all of them

Cell = str | int | float | None
Rows = Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Table:
    """Saved as `name`.csv, to seven digits; shown with four significant digits, None as a dash, text as it stands.

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
    rows = [["" if cell is None else rounded(cell) for cell in row] for row in table.rows]
    csv.writer(text, lineterminator="\n").writerows([table.columns, *rows])
    return text.getvalue()


def rounded(cell: str | int | float) -> str | int | float:
    """To `DIGITS`, but for whole numbers."""
    return float(f"{cell:.{DIGITS}g}") if isinstance(cell, float) and not cell.is_integer() else cell


def as_markdown(table: Table) -> str:
    """With the caption above, where it has one."""
    head, *body = (f"| {' | '.join(map(markup.cell, row))} |" for row in _text(table))
    lines = "\n".join([head, "|---|" + "---:|" * (len(table.columns) - 1), *body])
    return f"{markup.escaped(table.caption)}\n\n{lines}" if table.caption else lines


def as_lines(table: Table) -> list[str]:
    """For the terminal: first column left, the others right; without the caption. Columns that do not fit into its
    width are left out, the last first, and a line says so; `--wide` shows all.
    """
    columns = list(zip(*_text(table), strict=True))
    widths = [max(map(len, column)) for column in columns]
    kept = _fitting(widths, width())
    shown = [[cell.rjust(n) for cell in column] for column, n in zip(columns[:kept], widths, strict=False)]
    shown[0] = [cell.ljust(widths[0]) for cell in columns[0]]
    head, *body = ("  ".join(row).rstrip() for row in zip(*shown, strict=True))
    left_out = f"{kept} of {len(columns)} columns; --wide shows all"
    return [painted(head, bold=True), *body, *([left_out] if kept < len(columns) else [])]


def on_terminal(lines: Iterable[str]) -> Iterator[str]:
    """Markdown as `as_lines` shows its tables."""
    for is_table, group in groupby(lines, lambda line: line.startswith("|")):
        if not is_table:
            yield from group
            continue
        head, _, *rows = (tuple(cell.strip() for cell in line.strip("|").split("|")) for line in group)
        yield from as_lines(Table("", "", head, tuple(rows)))


def _fitting(widths: Sequence[int], most: int | None) -> int:
    """How many columns fit into a line; two at least, for a label alone says nothing."""
    ends = accumulate(widths, lambda end, column: end + 2 + column)
    return max(2, sum(most is None or end <= most for end in ends))


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
