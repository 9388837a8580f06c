"""The site's pages, without building it."""

import importlib.util
import re
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/docs.py"
SPEC = importlib.util.spec_from_file_location("site_docs", SCRIPT)
docs = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(docs)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "pages"
    docs.lay_out(folder)
    return folder


def test_every_link_of_a_page_leads_to_a_page_or_a_copy(pages):
    for page in (pages / "index.md", *pages.glob("docs/*.md")):
        targets = [target for _, _, target, _ in docs.LINK.findall(page.read_text()) if target and ":" not in target]
        assert all((page.parent / target).is_file() for target in targets), page


def test_the_reference_has_every_key_and_command(pages):
    keys, commands = ((pages / f"reference/{name}.md").read_text() for name in ("keys", "commands"))
    assert re.search(r"^\| `model\.top_k` \| `2` \| whole number; .* \| experts per token \|$", keys, re.MULTILINE)
    assert "## sweep\n" in commands and "## trial\n" not in commands
    assert "### moepp.MoELayer" in (pages / "reference/api.md").read_text()
