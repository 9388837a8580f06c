"""results/index.html: every experiment on one static page, from the reports in results/ alone, without any script."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from moepp.records import read_json
from moepp.reports.experiment import SCALES, Experiment
from moepp.reports.report import markdown
from moepp.statistics.tables import NONE

TEMPLATE = Path(__file__).with_name("page.html")
OPEN = ("Verdict", "Quality", "Tables", "Figures", "Compute and speed")  # the other sections of a report begin folded
VERDICTS = ("holds", "fails", "undecided")


@dataclass(frozen=True)
class Report:
    """A report.md by its parts. `about` is what stands above the first section."""

    folder: Path
    title: str
    about: str
    sections: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> "Report":
        head, *parts = re.split(r"^## ", (folder / "report.md").read_text(), flags=re.MULTILINE)
        title, _, about = head.removeprefix("# ").partition("\n")
        sections = {name: text.strip() for name, _, text in (part.partition("\n") for part in parts)}
        return cls(folder, title.strip(), about.strip(), sections)

    @property
    def scale(self) -> str:
        return self.folder.name


def write_page(experiments: Sequence[Experiment], results: Path) -> Path:
    """Writes and returns `results`/index.html: `experiments` in their order, those not run yet too, then every other
    report below `results`, such as benchmarks. A sweep without a report is left out where another experiment has its
    runs.
    """
    covered = {runs.sweep for experiment in experiments for runs in experiment.runs if runs.sweep != experiment.name}
    experiments = [e for e in experiments if e.name not in covered or (results / e.name).is_dir()]
    known = {experiment.name for experiment in experiments}
    others = sorted({path.parent.parent for path in results.glob("*/*/report.md")} - {results / name for name in known})
    entries = [_entry(experiment, _reports(results / experiment.name)) for experiment in experiments]
    entries += [_other(folder, _reports(folder)) for folder in others]
    rows = "".join(entry.row for entry in entries)
    page = Template(TEMPLATE.read_text()).substitute(
        links="".join(f'<li><a href="#{entry.anchor}">{entry.label}</a></li>' for entry in entries),
        rows=rows,
        body="".join(entry.body for entry in entries),
        run=sum(entry.run for entry in entries),
        all=len(entries),
    )
    out = results / "index.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page)
    return out


@dataclass(frozen=True)
class Entry:
    anchor: str
    label: str
    row: str  # of the overview
    body: str
    run: bool


def _entry(experiment: Experiment, reports: list[Report]) -> Entry:
    label = html.escape(f"{experiment.reference}: {experiment.title}" if experiment.reference else experiment.title)
    body = []
    if not reports:
        body.append(f"<p><strong>{html.escape(experiment.question)}</strong></p>")
        body.append(f"<p class=missing>Not run yet. {_command(experiment)}</p>")
        if experiment.paper:
            paper = _html(markdown(experiment.paper))
            body.append(f"<details><summary>The paper's numbers</summary>{paper}</details>")
    body += [_report(report, opened=report is reports[0]) for report in reports]
    found = _findings(reports[0]) if reports else "not run yet"
    return _assemble(experiment.name, experiment.reference, label, experiment.title, reports, found, body)


def _other(folder: Path, reports: list[Report]) -> Entry:
    body = [_report(report, opened=report is reports[0]) for report in reports]
    title = reports[0].title
    return _assemble(folder.name, "", html.escape(title), title, reports, "see the tables", body)


def _assemble(
    anchor: str, reference: str, label: str, title: str, reports: list[Report], found: str, body: list[str]
) -> Entry:
    scales = " ".join(f'<a href="#{anchor}-{report.scale}">{html.escape(report.scale)}</a>' for report in reports)
    row = (
        f'<tr><td>{html.escape(reference)}</td><td><a href="#{anchor}">{html.escape(title)}</a></td>'
        f"<td>{scales or NONE}</td><td>{found}</td></tr>"
    )
    section = f'<section id="{anchor}"><h2><a href="#{anchor}">{label}</a></h2>{"".join(body)}</section>'
    return Entry(anchor, label, row, section, bool(reports))


def _reports(folder: Path) -> list[Report]:
    """Of all scales, the largest first; `gpu-1b`, of another size than the scale's own, after `gpu`."""
    found = [Report.read(path.parent) for path in sorted(folder.glob("*/report.md"))]
    order = {scale: rank for rank, scale in enumerate(reversed(SCALES))}
    return sorted(found, key=lambda report: order.get(report.scale.partition("-")[0], len(order)))


def _report(report: Report, opened: bool) -> str:
    parts = [_html(report.about, report.folder), _commit(report.folder)]
    for name, text in report.sections.items():
        state = " open" if name in OPEN else ""
        heading = html.escape(name)
        parts.append(f"<details{state}><summary>{heading}</summary>{_html(text, report.folder)}</details>")
    anchor = f"{report.folder.parent.name}-{report.scale}"
    state = " open" if opened else ""
    summary = f"Scale {html.escape(report.scale)}"
    return f'<details class=scale id="{anchor}"{state}><summary>{summary}</summary>{"".join(parts)}</details>'


def _findings(report: Report) -> str:
    """Counts of verdicts where the report has them, else its first statement."""
    said = report.sections.get("Verdict", "")
    counts = {verdict: len(re.findall(rf"^- \*\*{verdict}\*\*", said, re.MULTILINE)) for verdict in VERDICTS}
    if any(counts.values()):
        return ", ".join(f'<strong class="{verdict}">{n} {verdict}</strong>' for verdict, n in counts.items() if n)
    first = said.partition("\n")[0].removeprefix("- ").partition(". ")[0]
    return html.escape(first.rstrip(".") + ".") if first else "see the tables"


def _commit(folder: Path) -> str:
    """The commit and the time of the runs, as far as provenance.json tells one."""
    provenance = read_json(folder / "provenance.json") or {}
    git = provenance.get("git")
    commit = f"commit {git['sha'][:10]}" if isinstance(git, dict) and git.get("sha") else ""
    when = provenance.get("last_run_ended", "")
    said = ", ".join(part for part in (commit, when) if part)
    return f"<p class=made>{html.escape(said)}</p>" if said else ""


def _command(experiment: Experiment) -> str:
    options = "" if experiment.runs else "".join(f" {key}=..." for key in experiment.options)
    return f"<code>python run.py reproduce {html.escape(experiment.name + options)}</code>"


def _html(text: str, folder: Path | None = None) -> str:
    """Markdown as HTML: figures inlined as images (as elements their ids would clash), links to data files made
    relative to the page, tables in boxes that scroll.
    """
    from markdown_it import MarkdownIt

    def image(renderer: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
        caption = html.escape(tokens[index].content, quote=True)
        svg = folder / str(tokens[index].attrs["src"])
        data = base64.b64encode(svg.read_bytes()).decode() if svg.exists() else ""
        return f'<span class="figure"><img alt="{caption}" src="data:image/svg+xml;base64,{data}"></span>'

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.add_render_rule("image", image)
    rendered = (
        parser.render(text).replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")
    )
    for verdict in VERDICTS:
        rendered = rendered.replace(f"<strong>{verdict}</strong>", f'<strong class="{verdict}">{verdict}</strong>')
    if folder is None:
        return rendered
    here = f"{folder.parent.name}/{folder.name}"
    return re.sub(r'href="([\w.-]+\.(?:csv|json))"', rf'href="{here}/\1"', rendered)
