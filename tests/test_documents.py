"""Pages hold what they promise: links and anchors lead somewhere, and commands can be typed as they stand."""

import re
import shlex
from functools import cache

import click
import pytest

from moepp.cli import commands
from moepp.config import CONF

ROOT = CONF.parent
PAGES = [
    path for pattern in ("*.md", "docs/*.md", "results/LOG.md") for path in sorted(ROOT.glob(pattern)) if path.is_file()
]
LINK = re.compile(r"\[(?:[^][]|\[[^][]*\])*\]\(([^)#\s]*)(?:#([^)\s]*))?\)")
FENCE = re.compile(r"^```.*?^```|^ {4}.*?$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^ {4}(?:python run\.py|moepp) (\w.*?)(?:  +#.*)?$|`python run\.py (\w[^`]*)`", re.MULTILINE)
MOST_LINES = 80  # of README, which is one page


@cache
def anchors(page):
    """The names of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    broken = []
    for target, anchor in LINK.findall(FENCE.sub("", page.read_text())):
        if ":" in target:
            continue
        there = (page.parent / target).resolve() if target else page
        if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
            broken.append(f"{target}#{anchor}")
    assert not broken


def words_of(line):
    """With a value for what stands for one, and without a shell's own."""
    words = shlex.split(line.replace("...", "x").rstrip("\\"), comments=True)
    return ["1" if word in ("M", "N") else word for word in words if word != "&"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_can_be_typed(page):
    for line in (first or second for first, second in COMMAND.findall(page.read_text())):
        name, *words = words_of(line)
        if name.isupper():  # COMMAND stands for any
            continue
        with click.Context(commands, info_name="moepp") as context:
            command = commands.get_command(context, name)
            assert command is not None, line
            if words and "..." not in line and "help" not in line:
                try:
                    command.make_context(name, words, parent=context)
                except click.ClickException as error:
                    pytest.fail(f"{line}: {error.format_message()}")


def test_readme_is_one_page_and_names_the_answer_and_the_retrofit_first():
    lines = (ROOT / "README.md").read_text().splitlines()
    first = "\n".join(lines[:24])
    assert len(lines) <= MOST_LINES
    assert "retrofit" in first and "Does MoE++ beat vanilla MoE?" in first and "make demo" in first


def test_every_guide_is_within_two_clicks_of_readme():
    near, seen = {ROOT / "README.md"}, {ROOT / "README.md"}
    for _ in range(2):
        links = {(page.parent / target).resolve() for page in near for target, _ in LINK.findall(page.read_text())}
        near = {page for page in links if page.suffix == ".md" and page.is_file()} - seen
        seen |= near
    assert {page for page in PAGES if page.parent.name == "docs"} <= seen
