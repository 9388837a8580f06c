"""`make docs`: lays out the pages of the site (zensical.toml) in .docs/pages, as they lie in the repository, with a
reference that is generated from the code. Links to code lead to a copy of the file; those to folders become text.
"""

import inspect
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ROOT / ".docs/pages"
GUIDES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "results/LOG.md", "results/*/*/report.md")
LINK = re.compile(r"(!?)\[((?:[^][]|\[[^][]*\])*)\]\(([^)#\s]*)(#[^)\s]*)?\)")
HOME = {ROOT / "README.md": "index.md"}  # what the site calls it


def lay_out(pages: Path) -> None:
    """Writes all pages below `pages`, and copies what they link to. Raises FileNotFoundError for a broken link."""
    shutil.rmtree(pages, ignore_errors=True)
    for page in (path for pattern in GUIDES for path in sorted(ROOT.glob(pattern))):
        put(pages / HOME.get(page, page.relative_to(ROOT)), linked(page, pages))
    for name, lines in (("keys", key_reference()), ("commands", command_reference()), ("api", api_reference())):
        put(pages / f"reference/{name}.md", "\n".join(lines) + "\n")


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def linked(page: Path, pages: Path) -> str:
    """A page's text with links that hold on the site; files that it names are copied there."""

    def link(match: re.Match[str]) -> str:
        image, text, target, anchor = match.groups(default="")
        if not target or ":" in target:
            return match.group()
        found = (page.parent / target).resolve()
        if found.is_dir():
            return text
        if found.suffix != ".md":
            (pages / found.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(found, pages / found.relative_to(ROOT))
        there = Path(HOME.get(found, found.relative_to(ROOT)))
        return f"{image}[{text}]({os.path.relpath(there, page.parent.relative_to(ROOT))}{anchor})"

    return LINK.sub(link, page.read_text())


def key_reference() -> Iterator[str]:
    """Every key with type, default, meaning and choices, a section for each group."""
    from moepp.config import fragment_names
    from moepp.keys import as_typed, keys
    from moepp.training.settings import RunConfig

    yield "# Keys\n\nGenerated from the schema; `keys [PREFIX]` prints the same, with the values of a config."
    yield from ("\n## Fragments\n", "| group | fragments |", "|---|---|")
    yield from (
        f"| `{group}=` | {', '.join(f'`{name}`' for name in names)} |" for group, names in fragment_names().items()
    )
    section = None
    for key in keys(RunConfig):
        if (group := key.name.rpartition(".")[0] or "run") != section:
            section = group
            yield from (f"\n## {group}\n", "| key | default | type | meaning |", "|---|---|---|---|")
        choices = f"; one of {', '.join(key.choices)}" if key.choices else ""
        cells = (f"`{key.name}`", f"`{as_typed(key.default)}`", f"{key.kind}{choices}", key.meaning)
        yield f"| {' | '.join(escaped(cells))} |"


def command_reference() -> Iterator[str]:
    """The help of every command that people call."""
    import click

    from moepp.cli import commands

    yield "# Commands\n\nGenerated: `python run.py COMMAND --help` prints the same."
    with click.Context(commands, info_name="python run.py", terminal_width=100) as context:
        for name, command in commands.commands.items():
            if not command.hidden:
                with click.Context(command, info_name=name, parent=context, terminal_width=100) as own:
                    yield f"\n## {name}\n\n```text\n{command.get_help(own)}\n```"


def api_reference() -> Iterator[str]:
    """Signature and docstring of what `moepp`, `moepp.layers` and `moepp.retrofit` give."""
    import moepp.layers
    import moepp.retrofit

    yield "# Python\n\nGenerated from the docstrings. [The tour](../docs/tour.ipynb) shows it at work."
    for face in (moepp, moepp.layers, moepp.retrofit):
        yield f"\n## {face.__name__}\n\n{text_of(face)}"
        for name in sorted(face.__all__):
            part = getattr(face, name)
            signature = f"{name}{inspect.signature(part)}" if callable(part) else name
            yield f"\n### {face.__name__}.{name}\n\n```python\n{signature}\n```\n\n{text_of(part)}"


def text_of(part: object) -> str:
    """A docstring as it stands, for it is written to be read unformatted."""
    doc = inspect.getdoc(part) if not isinstance(part, (int, str, tuple)) else None
    return f"```text\n{doc}\n```" if doc else ""


def escaped(cells: Iterable[str]) -> Iterator[str]:
    return (cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    lay_out(PAGES)
