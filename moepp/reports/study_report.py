"""Writes what a study found: report.md, a CSV per table and figure, the figures, provenance.json."""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moepp.records import write_text
from moepp.reports.study import Cell, Claim, Plot, Study, StudyReport, Table
from moepp.reports.tables import NONE, Rows, aligned, markdown
from moepp.statistics import style


def write_study(study: Study, report: StudyReport, out: Path, provenance: Mapping[str, Any]) -> list[Path]:
    """Fills `out` and returns the files, report.md first; tables and figures of an earlier report are removed.
    `provenance` says how it was made: at least `command`, `scale`, `started` (ISO date) and
    `hardware`.
    """
    out.mkdir(parents=True, exist_ok=True)
    for old in out.iterdir():
        if old.suffix in (".csv", ".svg", ".png"):
            old.unlink()
    images = []
    with style.styled():
        for plot in report.plots:
            images += style.save(plot.draw(), out / plot.data.name)
    texts = {
        "report.md": _markdown(study, report, provenance),
        "provenance.json": json.dumps({**provenance, **report.setup}, indent=1, default=str) + "\n",
        **{f"{table.name}.csv": _csv(table) for table in (*report.tables, *(plot.data for plot in report.plots))},
    }
    for name, text in texts.items():
        write_text(out / name, text)
    return [*(out / name for name in texts), *images]


def terminal_study(report: StudyReport) -> str:
    """The first table and every claim."""
    lines = aligned(_rows(report.tables[0])) if report.tables else []
    return "\n".join([*lines, "", *(f"{claim.verdict:>9}: {_plain(claim)}" for claim in report.claims)]).strip("\n")


def study_note(study: Study, report: StudyReport, command: str) -> str:
    """The short report for a tracker's page, in markdown: question, claims, first table; the rest is in report.md."""
    made = f"Made by `{command}`; the whole report is the artifact `{study.name}/report.md`."
    parts = [f"**{study.question}**", _claims(report), markdown_tables(report.tables[:1]), made]
    return "\n\n".join(part for part in parts if part)


def _claims(report: StudyReport) -> str:
    return "\n".join(f"- **{claim.verdict}**: {_plain(claim)}" for claim in report.claims)


def _markdown(study: Study, report: StudyReport, provenance: Mapping[str, Any]) -> str:
    beside = f" Beside the paper's {study.reference} (MoE++, arXiv 2410.07348)." if study.reference else ""
    about = [
        f"**{study.question}**{beside}",
        f"Expected: {study.expected}",
        f"Scale `{provenance['scale']}`. Made by `{provenance['command']}`, {provenance['started'][:10]}.",
        f"Hardware: {', '.join(f'{name} {value}' for name, value in provenance['hardware'].items() if value)}.",
    ]
    sections = {
        "Verdict": _claims(report),
        "Tables": markdown_tables(report.tables),
        "Figures": "\n\n".join(_figure(plot) for plot in report.plots),
        "The paper's numbers": markdown_tables(study.paper),
        "Notes": "\n".join(f"- {note}" for note in (*study.notes, *report.notes)),
    }
    body = [f"# {study.title}", *about, *(f"## {title}\n\n{text}" for title, text in sections.items() if text)]
    return "\n\n".join(body) + "\n"


def markdown_tables(tables: tuple[Table, ...]) -> str:
    """Each with its caption above."""
    return "\n\n".join(f"{table.caption}\n\n{markdown(_rows(table))}" for table in tables)


def _figure(plot: Plot) -> str:
    caption, name = plot.data.caption, plot.data.name
    return f"![{caption}]({name}.svg)\n\n{caption} [Data]({name}.csv)."


def _plain(claim: Claim) -> str:
    said = claim.statement
    if claim.effect is not None:
        interval = "" if claim.low is None else f" [{claim.low:.4g}, {claim.high:.4g}]"
        corrected = "" if claim.p is None else f", p {claim.p:.3f}" if claim.p >= 0.001 else ", p <0.001"
        said += f": {claim.effect:.4g}{interval}{f' {claim.unit}' if claim.unit else ''}{corrected}"
    said += f". Paper: {claim.paper}" if claim.paper else ""
    return f"{said}. {claim.note}" if claim.note else f"{said}."


def _rows(table: Table) -> Rows:
    return [list(table.columns), *([_cell(value) for value in row] for row in table.rows)]


def _cell(value: Cell) -> str:
    if value is None:
        return NONE
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else value


def _csv(table: Table) -> str:
    text = io.StringIO()
    rows = [["" if value is None else value for value in row] for row in table.rows]
    csv.writer(text, lineterminator="\n").writerows([table.columns, *rows])
    return text.getvalue()
