"""Every text is shown as it was written, and nothing is drawn in."""

import html
import re

import pytest

from moepp.statistics.markup import cell, code, escaped

markdown_it = pytest.importorskip("markdown_it")

TEXTS = [
    "a|b", "![x](/etc/passwd)", "[a](b) [c][d] [e]: f", "<script>alert(1)</script> a < b <= c", "*x* _y_ a_b_c __z__",
    "&lt;b&gt; & c", "\\<b>", "a\\|b|c", "- x", "-0.5 [-1, 0]", "1. x", "# x", "> x", "<http://x>", "~~~ x", "= x",
    "one ` alone", "```", "`` ` ``", "<!-- x", "[x]: y", "***", "+ x", "8 + 1/1/2", "moepp_ _x", "",
]  # fmt: skip


def shown(markdown: str, element: str) -> str:
    rendered = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)
    return html.unescape(re.search(f"<{element}>(.*?)</{element}>", rendered, re.DOTALL)[1])


@pytest.mark.parametrize("text", TEXTS)
def test_text_means_itself_in_a_table_and_in_a_list(text):
    assert shown(f"| h |\n|---|\n| {cell(text)} |", "td") == text
    assert shown(f"- {escaped(text)}", "li") == text


def test_line_ends_are_spaces_and_code_stays_code():
    assert escaped("a\n\n# b\n![c](d)") == r"a # b ![c]\(d)"
    assert escaped("set `model.dim=<b>` and `x`") == "set `model.dim=<b>` and `x`"
    assert escaped("`a` and `b") == r"`a` and \`b"
    assert cell("`a|b`") == r"`a\|b`"


@pytest.mark.parametrize("text", ["run.py train tags.note=x", "a`b", "`", "``a``", "<b>"])
def test_code_holds_anything(text):
    assert shown(code(text), "code") == text
