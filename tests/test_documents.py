"""Pages hold what they promise: links and anchors lead somewhere, and commands can be typed as they stand."""

import re
import shlex
from functools import cache

import click
import pytest

from moepp.cli import _planned, commands
from moepp.config import CONF
from moepp.errors import UsageError
from moepp.reports.reproduce import find
from moepp.sweeps.launchers import split
from moepp.sweeps.reading import read_sweep
from moepp.training.asked import asked_for

ROOT = CONF.parent
PAGES = [
    path for pattern in ("*.md", "docs/*.md", "results/LOG.md") for path in sorted(ROOT.glob(pattern)) if path.is_file()
]
PAST = {ROOT / "CHANGELOG.md", ROOT / "results/LOG.md"}  # what was typed once
LINK = re.compile(r"\[(?:[^][]|\[[^][]*\])*\]\(([^)#\s]*)(?:#([^)\s]*))?\)")
FENCE = re.compile(r"^```.*?^```|^ {4}.*?$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^ {4}(?:python run\.py|moepp) (\w.*?)(?:  +#.*)?$|`python run\.py (\w[^`]*)`", re.MULTILINE)
WITHOUT_PROGRAM = re.compile(rf"`((?:{'|'.join(commands.commands)}) [^`\n]*)`")
OF_THE_READER = re.compile(r"<|\.\.\.|\bmine\b")  # who has a name or a value of their own for it
ARM = re.compile(r"runs/(\w+)-([a-z]+):([a-z][\w.]*)")
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
    words = shlex.split(line.rstrip("\\"), comments=True)
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


def refused(name, words):
    """Why a command cannot be meant, but for what the reader has to name; "" where it can."""
    if any(word.startswith("plugins=") for word in words):
        return ""
    words = [word for word in words if "..." not in word]
    with click.Context(commands, info_name="moepp") as context:
        command = commands.get_command(context, name)
        try:
            asked = command.make_context(name, [*words], parent=context).params  # click takes words off a list
            what = asked.get("experiment") or asked.get("sweep") or ""
            named = what.replace("_", "").isalnum() and not what.isupper()  # no path, no SWEEP
            if named and asked["scale"] not in (scales := find(what).scales) and len(scales) > 1:
                return f"{what} has the scales {', '.join(scales)}, not {asked['scale']}"
            for sweep, scale, arm in ARM.findall(" ".join(words)):
                if arm not in read_sweep(sweep).arms_at(scale):
                    return f"{sweep} has no arm {arm} at scale {scale}"
            options = find(what).options if named and name == "reproduce" else ()
            said = [word for word in asked.get("overrides", ()) if not OF_THE_READER.search(word)]
            _, values = split(word for word in said if word.partition("=")[0] not in options)
            asked_for(_planned(values) if asked.get("dry_run") else values)
        except click.MissingParameter:  # a command is named, not given
            return ""
        except (click.ClickException, UsageError) as error:
            return str(error)
    return ""


@pytest.mark.parametrize("page", [page for page in PAGES if page not in PAST], ids=lambda page: page.name)
def test_every_command_of_a_page_asks_for_what_there_is(page):
    text = page.read_text()
    lines = [*("".join(found) for found in COMMAND.findall(text)), *WITHOUT_PROGRAM.findall(text)]
    found = {line: words_of(line) for line in lines}
    wrong = {line: refused(name, words) for line, (name, *words) in found.items() if not name.isupper()}
    assert {line: why for line, why in wrong.items() if why} == {}


@pytest.mark.parametrize("name", [name for name, command in commands.commands.items() if not command.hidden])
def test_every_example_of_help_asks_for_what_there_is(name):
    examples = commands.commands[name].examples
    assert examples
    assert {line: why for line in examples if (why := refused(name, shlex.split(line)))} == {}


def test_the_sweep_file_of_a_page_is_one(tmp_path):
    text = (ROOT / "docs/experiments.md").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    sweep = read_sweep(str(path))
    assert {scale: len(sweep.trials(scale)) for scale in sweep.scales} == {"smoke": 3, "laptop": 9}


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
