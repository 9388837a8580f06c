"""Writes what an experiment found: report.md, every table as csv, every figure with its data, provenance.json."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moepp.records import write_text
from moepp.reports.experiment import Experiment, Findings
from moepp.statistics.markup import code, escaped
from moepp.statistics.seeds import spans
from moepp.statistics.style import Figure, save_figure
from moepp.statistics.tables import Table, as_csv, as_lines, as_markdown
from moepp.statistics.wording import several

MECHANICS = "mechanics only: models that end above a bigram of their own training tokens"


def write_report(experiment: Experiment, found: Findings, folder: Path, provenance: Mapping[str, Any]) -> list[Path]:
    """Fills `folder` and returns the files, report.md first; what else lies there stays. `provenance` holds at least
    `command`, `scale` and `hardware`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = [path for figure in found.figures for path in save_figure(figure, folder)]
    parts = [
        *found.tables,
        *found.data,
        *(standing.table() for standing in found.standing),
        *(part for section in found.sections.values() for part in section),
    ]
    tables = [part for part in (*parts, *(f.data for f in found.figures)) if isinstance(part, Table) and part.name]
    texts = {
        "report.md": _markdown(experiment, found, provenance),
        "provenance.json": json.dumps({**provenance, **found.setup}, indent=1, default=str) + "\n",
        **{f"{table.name}.csv": as_csv(table) for table in tables},
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return [*(folder / name for name in texts), *images]


def terminal(found: Findings) -> str:
    """For the end of a command: the summary and what follows from it."""
    table = _summary(found)
    lines = [found.answer, ""] if found.answer else []
    lines += [*map(str, found.standing), *([""] if found.standing else [])]
    lines += [*as_lines(table), *([] if table in found.tables else [table.caption])] if table else []
    said = [*found.verdict, *(f"{claim.verdict}: {claim}" for claim in found.claims)]
    return "\n".join([*lines, "", *said]).strip("\n")


def note(experiment: Experiment, found: Findings, command: str) -> str:
    """The short report for a tracker's page, in markdown; the rest is in report.md."""
    table = _summary(found)
    made = f"Made by {code(command)}; the whole report is the artifact `{experiment.name}/report.md`."
    parts = [
        _answer(found),
        f"**{escaped(experiment.question)}**",
        _verdict(found),
        as_markdown(table) if table else "",
        made,
    ]
    return "\n\n".join(part for part in parts if part)


def _answer(found: Findings) -> str:
    return f"**{escaped(found.answer)}**" if found.answer else ""


def _summary(found: Findings) -> Table | None:
    return found.summary or next(iter(found.tables), None)


def _verdict(found: Findings) -> str:
    claims = [f"- **{claim.verdict}**: {escaped(str(claim))}" for claim in found.claims]
    return "\n".join([bullets(found.verdict), *claims]).strip("\n")


def _markdown(experiment: Experiment, found: Findings, provenance: Mapping[str, Any]) -> str:
    beside = f" Beside the paper's {experiment.reference} (MoE++, arXiv 2410.07348)." if experiment.reference else ""
    about = [
        f"**{escaped(experiment.question)}**{beside}",
        f"Expected: {escaped(experiment.expected)}" if experiment.expected else "",
        _made(provenance),
        f"Hardware: {escaped(_hardware(provenance['hardware']))}.",
    ]
    sections = {
        "Verdict": _verdict(found),
        "Tables": markdown(found.tables),
        **{title: markdown(parts) for title, parts in found.sections.items()},
        "Figures": "\n\n".join(_figure(figure) for figure in found.figures),
        "The paper's numbers": markdown(experiment.paper),
        "Notes": bullets([*experiment.notes, *found.notes]),
    }
    body = [
        f"# {escaped(_title(experiment, found))}",
        _answer(found),
        *(escaped(str(standing)) for standing in found.standing),
        *about,
        *(f"## {title}\n\n{text}" for title, text in sections.items() if text),
    ]
    return "\n\n".join(part for part in body if part) + "\n"


def _title(experiment: Experiment, found: Findings) -> str:
    mechanics = experiment.of_routing and any(standing.mechanics_only for standing in found.standing)
    return f"{experiment.title} ({MECHANICS})" if mechanics else experiment.title


def _made(provenance: Mapping[str, Any]) -> str:
    sweeps = [f"Sweep {code(name)}, baseline {code(base)}, " for name, base in provenance.get("sweeps", {}).items()]
    seeds = {run["seed"] for run in provenance.get("runs", [])}
    said = "".join(sweeps) + f"scale {code(provenance['scale'])}"
    said += f", seeds {spans(seeds)}" if seeds else ""
    date = f", {provenance['started'][:10]}" if "started" in provenance else ""
    return f"{said[0].upper()}{said[1:]}. Made by {code(provenance['command'])}{date}."


def _hardware(hardware: Any) -> str:
    if isinstance(hardware, list):  # runs that went on elsewhere
        return "; ".join(f"{_hardware(each['value'])} ({several(len(each['runs']), 'run')})" for each in hardware)
    return ", ".join(f"{name} {value}" for name, value in hardware.items() if value)


def markdown(parts: Iterable[str | Table]) -> str:
    """Paragraphs, which are Markdown already, and tables with their captions."""
    return "\n\n".join(as_markdown(part) if isinstance(part, Table) else part for part in parts)


def bullets(lines: Iterable[str]) -> str:
    """Of lines that are plain text."""
    return "\n".join(f"- {escaped(line)}" for line in lines)


def _figure(figure: Figure) -> str:
    caption, name = escaped(figure.data.caption), figure.data.name
    return f"![{caption}]({name}.svg)\n\n{caption} [Data]({name}.csv)."
