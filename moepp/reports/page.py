"""results/index.html, a front page of all experiments, and results/<name>/index.html, a page of each, from the reports
in results/ alone. Pages need no network and open from disk.
"""

import base64
import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote, unquote

from moepp.records import read_json
from moepp.reports.experiment import SCALES, Experiment
from moepp.reports.report import markdown

TEMPLATE = Path(__file__).with_name("page.html")
FRONT = "MoE++: every table and figure"
# After the verdict comes what a reader sees first; the other sections follow in their order, and begin folded.
FIRST = ("Verdict", "Figures")
OPEN = (*FIRST, "Quality", "Tables", "Compute and speed")
LONG_TABLE = 14  # rows above which a table begins folded
IMAGES = {".svg": "image/svg+xml", ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
ACTIVE = re.compile(r"<script|<foreignObject|\son\w+\s*=|javascript:", re.IGNORECASE)
VERDICTS = ("holds", "fails", "undecided")
CLAIM = re.compile(rf"^- \*\*({'|'.join(VERDICTS)})\*\*: (.*)$", re.MULTILINE)
VALUE = re.compile(r": [-+]?\d|\. |, off by:|$")  # where a claim's numbers or notes begin
FIGURE = re.compile(r"^!\[[^\n]*\]\(([^)\n]+)\)$", re.MULTILINE)


@dataclass(frozen=True)
class Report:
    """A report.md by its parts. `about` is what stands above the first section."""

    folder: Path
    title: str
    about: str
    sections: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> "Report":
        head, *parts = re.split(r"^## ", (folder / "report.md").read_text("utf-8"), flags=re.MULTILINE)
        title, _, about = head.removeprefix("# ").partition("\n")
        sections = {name: text.strip() for name, _, text in (part.partition("\n") for part in parts)}
        return cls(folder, title.strip(), about.strip(), sections)

    @property
    def scale(self) -> str:
        return self.folder.name

    @property
    def provenance(self) -> dict[str, Any]:
        return read_json(self.folder / "provenance.json") or {}

    @property
    def seeds(self) -> int:
        """Of the runs it was made from; 0 where none are recorded."""
        runs = self.provenance.get("runs") or []
        runs = [run for group in runs.values() for run in group] if isinstance(runs, dict) else runs
        return len({run["seed"] for run in runs if isinstance(run, dict) and "seed" in run})

    @property
    def figure(self) -> Path | None:
        """The first one that it shows."""
        found = FIGURE.search(self.sections.get("Figures", ""))
        return _own_image(self.folder, found[1]) if found else None


def write_page(experiments: Sequence[Experiment], results: Path) -> Path:
    """Writes every page and returns `results`/index.html: `experiments` in their order, then every other report below
    `results`, such as benchmarks, then what has not run. A sweep without a report is left out where another experiment
    has its runs.
    """
    covered = {runs.sweep for experiment in experiments for runs in experiment.runs if runs.sweep != experiment.name}
    experiments = [e for e in experiments if e.name not in covered or (results / e.name).is_dir()]
    known = {experiment.name: _reports(results / experiment.name) for experiment in experiments}
    others = {path.parent.parent for path in results.glob("*/*/report.md")} - {results / name for name in known}
    cards = [_card(known[e.name], e.title, e.reference, e.question) for e in experiments if known[e.name]]
    cards += [_card(_reports(folder), _reports(folder)[0].title) for folder in sorted(others)]
    for folder in [*(results / name for name, reports in known.items() if reports), *others]:
        _write(folder / "index.html", _experiment_page(_reports(folder)))
    missing = [_missing(experiment) for experiment in experiments if not known[experiment.name]]
    out = results / "index.html"
    _write(out, _front_page(cards, missing))
    return out


def one_report(folder: Path) -> str:
    """One report with its figures as a page in one file."""
    report = Report.read(folder)
    return _page(report.title, f"<main>{_heading(report.title)}{_report(report)}</main>")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def _page(title: str, body: str) -> str:
    return Template(TEMPLATE.read_text("utf-8")).substitute(title=html.escape(title), body=body)


def _front_page(cards: Sequence[str], missing: Sequence[str]) -> str:
    have = "has" if len(cards) == 1 else "have"
    about = (
        '<p>The experiments of MoE++ (<a href="https://arxiv.org/abs/2410.07348">arXiv 2410.07348</a>) and questions of'
        f" our own, ours beside the paper's numbers. {len(cards)} of {len(cards) + len(missing)} {have} been run. Small"
        " scales show the method, not the paper's quality; n counts seeds.</p>"
    )
    search = '<p><input type="search" id="search" placeholder="Search" aria-label="Search the experiments"></p>'
    nothing = '<p id="nothing" class="made" hidden>Nothing holds all of these words.</p>'
    absent = f"<h2>Not run yet</h2>{''.join(missing)}" if missing else ""
    return _page(FRONT, f"<main>{_heading(FRONT)}{about}{search}{''.join(cards)}{nothing}{absent}</main>")


def _heading(title: str) -> str:
    return f"<h1>{html.escape(title)}</h1>"


def _card(reports: Sequence[Report], title: str, reference: str = "", question: str = "") -> str:
    """Question, answer, a figure, scales and n of an experiment, and the way to its page."""
    first = reports[0]
    name = first.folder.parent.name
    page = html.escape(f"{quote(name)}/index.html")
    scales = ", ".join(
        f'<a href="{page}#{html.escape(report.scale)}">{html.escape(report.scale)}</a>' for report in reports
    )
    n = f", n = {first.seeds}" if first.seeds else ""
    place = html.escape(f"{reference} · ") if reference else ""
    asked = f"<p><strong>{html.escape(question)}</strong></p>" if question else ""
    text = (
        f'<p class="made">{place}{scales}{n}</p><h2><a href="{page}">{html.escape(title)}</a></h2>'
        f'{asked}<div class="answer">{_answer(first)}</div>'
    )
    image = f'<a class="small" href="{page}">{_small(first)}</a>' if first.figure else ""
    return f'<article id="{html.escape(name)}"><div>{text}</div>{image}</article>'


def _small(report: Report) -> str:
    place = "/".join(quote(part) for part in (report.folder.parent.name, report.scale, report.figure.name))
    return f'<img loading="lazy" alt="{html.escape(report.figure.stem)}" src="{html.escape(place)}">'


def _answer(report: Report) -> str:
    """The report's own answer, which stands before its question, else the claims that fail, else how its verdict
    begins.
    """
    bold = [part for part in report.about.split("\n\n") if part.startswith("**")]
    if len(bold) > 1:
        return _html(bold[0].strip("*"))
    said = report.sections.get("Verdict", "")
    if claims := CLAIM.findall(said):
        return _claims(claims)
    return _html("\n".join(said.split("\n")[:2])) if said else ""


def _claims(claims: Iterable[tuple[str, str]]) -> str:
    """How many hold, and which do not."""
    by_verdict = {verdict: [text for found, text in claims if found == verdict] for verdict in VERDICTS}
    counts = ", ".join(f"**{verdict}**: {len(texts)}" for verdict, texts in by_verdict.items() if texts)
    names = [f"- **fails**: {VALUE.split(text, maxsplit=1)[0]}" for text in by_verdict["fails"]]
    return _html("\n".join([counts, "", *names]))


def _missing(experiment: Experiment) -> str:
    label = f"{experiment.reference}: {experiment.title}" if experiment.reference else experiment.title
    options = "" if experiment.runs else "".join(f" {key}=..." for key in experiment.options)
    command = f"<code>python run.py reproduce {html.escape(experiment.name + options)}</code>"
    paper = _html(markdown(experiment.paper)) if experiment.paper else ""
    numbers = f"<details><summary>The paper's numbers</summary>{paper}</details>" if paper else ""
    return (
        f'<article id="{html.escape(experiment.name)}"><div><h3>{html.escape(label)}</h3>'
        f"<p><strong>{html.escape(experiment.question)}</strong></p><p>{command}</p>{numbers}</div></article>"
    )


def _reports(folder: Path) -> list[Report]:
    """Of all scales, the largest first; `gpu-1b`, of another size than the scale's own, after `gpu`."""
    found = [Report.read(path.parent) for path in sorted(folder.glob("*/report.md"))]
    order = {scale: rank for rank, scale in enumerate(reversed(SCALES))}
    return sorted(found, key=lambda report: order.get(report.scale.partition("-")[0], len(order)))


def _experiment_page(reports: Sequence[Report]) -> str:
    """All scales of an experiment, the first one unfolded."""
    parts = []
    for report in reports:
        scale, state = html.escape(report.scale), " open" if report is reports[0] else ""
        folded = f"<summary>Scale {scale}</summary>{_report(report, f'{quote(report.scale)}/')}"
        parts.append(f'<details class="scale" id="{scale}"{state}>{folded}</details>')
    back = '<p><a href="../index.html">All experiments</a></p>'
    title = reports[0].title
    return _page(title, f"<main>{back}{_heading(title)}{''.join(parts)}</main>")


def _report(report: Report, beside: str = "") -> str:
    """`beside` leads from the page to the folder of the report."""
    order = [*(name for name in FIRST if name in report.sections), *(n for n in report.sections if n not in FIRST)]
    parts = [_html(report.about, report.folder, beside), _commit(report)]
    for name in order:
        state, text = " open" if name in OPEN else "", _html(report.sections[name], report.folder, beside)
        parts.append(f"<details{state}><summary>{html.escape(name)}</summary>{text}</details>")
    return "".join(parts)


def _commit(report: Report) -> str:
    """The commit and the time of the runs, as far as provenance.json tells one."""
    git = report.provenance.get("git")
    commit = f"commit {git['sha'][:10]}" if isinstance(git, dict) and git.get("sha") else ""
    said = ", ".join(part for part in (commit, report.provenance.get("last_run_ended", "")) if part)
    return f'<p class="made">{html.escape(said)}</p>' if said else ""


def _html(text: str, folder: Path | None = None, beside: str = "") -> str:
    """Markdown as HTML: figures and links to data files made relative to the page, tables in boxes that scroll, and
    folded where they are long.
    """
    from markdown_it import MarkdownIt

    def image(renderer: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
        caption = html.escape(tokens[index].content, quote=True)
        shown = _figure(folder, str(tokens[index].attrs["src"]), caption, beside) if folder else ""
        return f'<span class="figure">{shown}</span>'

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.add_render_rule("image", image)
    rendered = re.sub(r"<table>.*?</table>", _boxed, parser.render(text), flags=re.DOTALL)
    for verdict in VERDICTS:
        rendered = rendered.replace(f"<strong>{verdict}</strong>", f'<strong class="{verdict}">{verdict}</strong>')
    return re.sub(r'href="([\w.-]+\.(?:csv|json))"', lambda found: f'href="{html.escape(beside)}{found[1]}"', rendered)


def _boxed(table: re.Match[str]) -> str:
    rows = table[0].count("<tr>") - 1
    box = f'<div class="scroll">{table[0]}</div>'
    return box if rows <= LONG_TABLE else f"<details><summary>Table of {rows} rows</summary>{box}</details>"


def _own_image(folder: Path, source: str) -> Path | None:
    """The image of the report's folder that a Markdown source names; None where it leads elsewhere, or to no image."""
    path = folder / unquote(source)
    inside = path.resolve().is_relative_to(folder.resolve())
    return path if inside and path.suffix.lower() in IMAGES and path.is_file() else None


def _figure(folder: Path, source: str, caption: str, beside: str) -> str:
    """An SVG says more where one points: it stays a document of its own beside a page, and becomes part of one that has
    nothing beside it. One that would run something is an image, which runs nothing.
    """
    path = _own_image(folder, source)
    if path is None:
        return f'<img alt="{caption}" src="">'
    kind = IMAGES[path.suffix.lower()]
    speaks = kind == IMAGES[".svg"] and not ACTIVE.search(svg := path.read_text("utf-8"))
    place = html.escape(f"{beside}{quote(unquote(source))}")
    if beside:
        seen = f'<object type="{kind}" data="{place}" aria-label="{caption}"></object>'
        return seen if speaks else f'<img alt="{caption}" src="{place}">'
    if speaks:
        return _inlined(svg, path.stem, caption)
    return f'<img alt="{caption}" src="data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}">'


def _inlined(svg: str, prefix: str, caption: str) -> str:
    """Of several on one page no two share an id."""
    prefix = re.sub(r"[^\w-]", "_", prefix)
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r'((?:\bid="|href="#|url\(#))', rf"\g<1>{prefix}-", element)
    return element.replace("<svg", f'<svg role="img" aria-label="{caption}"', 1)
