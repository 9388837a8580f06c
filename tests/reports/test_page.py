from html.parser import HTMLParser

import pytest

from moepp.reports.experiment import Experiment, Findings, Runs
from moepp.reports.page import write_page
from moepp.reports.paper import PaperRow, PaperScores
from moepp.reports.report import write_report
from moepp.statistics import style
from moepp.statistics.claims import Claim
from moepp.statistics.style import Figure
from moepp.statistics.tables import Table

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Outline(HTMLParser):
    """Ids, link targets, images, and whether every element is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.images, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"]] if tag == "a" else []
        self.images += [attrs["src"]] if tag == "img" else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("p", "li", "tr", "td", "th"):
            while self.open[-1] in ("p", "li", "tr", "td", "th"):
                self.open.pop()
        assert self.open.pop() == tag, tag


def draw():
    figure, axes = style.axes_of(2, 1)
    axes.plot([1, 2])
    return figure


def measure(context):
    raise AssertionError("a page measures nothing")


EXPERIMENT = Experiment("fig9", "A & <b>figure</b>", "Does it grow?", measure, "it does.", reference="Fig. 9")
SCORES = PaperScores(
    ("PIQA", "BoolQ"), "BoolQ", {"1b": {"a": PaperRow((50.0, 40.0), 1.0), "b": PaperRow((51.25, 40.0), 0.5)}}, "1b"
)
ABSENT = Experiment(
    "table9", "Not run", "Why not?", measure, reference="Table 9", runs=(Runs("covered"),), paper=(SCORES.table(),)
)
COVERED = Experiment("covered", "A sweep", "What of it?", measure, runs=(Runs("covered"),))


@pytest.fixture
def page(tmp_path):
    table = Table("counts", "Counts.", ("what", "n"), (("<script>", 1),))
    data = Table("line", "A line.", ("x",), ((1,),))
    claims = (Claim("it grows", "holds"), Claim("it ends", "undecided"), Claim("it goes on", "holds"))
    made = {
        "command": "python run.py",
        "started": "2026-01-02",
        "hardware": {"cpu": "two cores"},
        "git": {"sha": "0" * 40},
    }
    for scale in ("smoke", "gpu"):
        report = Findings((table,), (Figure(data, draw),), claims)
        write_report(EXPERIMENT, report, tmp_path / "fig9" / scale, {**made, "scale": scale})
    (tmp_path / "bench/quick").mkdir(parents=True)
    (tmp_path / "bench/quick/report.md").write_text("# A benchmark\n\nTimes.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n")
    return write_page([EXPERIMENT, ABSENT, COVERED], tmp_path).read_text()


def test_the_page_is_well_formed_and_every_link_leads_somewhere(page, tmp_path):
    outline = Outline(page)
    assert outline.open == [] and len(set(outline.ids)) == len(outline.ids)
    for link in outline.links:
        if link.startswith("#"):
            assert link[1:] in outline.ids
        elif not link.startswith("https://arxiv.org/"):
            assert (tmp_path / link).exists(), link
    assert "fig9/gpu/line.csv" in outline.links


def test_nothing_is_fetched(page):
    assert all(
        source.startswith("data:image/svg+xml;base64,") and len(source) > 1000 for source in Outline(page).images
    )
    assert len(Outline(page).images) == 2 and "<script" not in page and "@import" not in page and "url(" not in page


def test_the_overview_counts_verdicts_and_names_what_has_not_run(page):
    overview = page[page.index("<tbody>") : page.index("</tbody>")]
    assert '<strong class="holds">2 holds</strong>, <strong class="undecided">1 undecided</strong>' in overview
    assert overview.count("not run yet") == 1 and "2 of 3 have been run" in page
    assert "<code>python run.py reproduce table9</code>" in page and ">51.2</td>" in page
    assert "A benchmark" in overview


def test_text_is_escaped_and_the_largest_scale_comes_first(page):
    assert "A &amp; &lt;b&gt;figure&lt;/b&gt;" in page and "&lt;script&gt;" in page
    assert page.index('id="fig9-gpu" open') < page.index('id="fig9-smoke"')
    assert '<strong class="holds">holds</strong>' in page and "commit 0000000000" in page


def test_runs_of_another_size_come_after_those_of_the_scales_own(tmp_path):
    made = {"command": "python run.py", "started": "2026-01-02", "hardware": {}}
    for scale in ("smoke", "gpu-1b", "gpu", "paper"):
        report = Findings((Table("counts", "Counts.", ("n",), ((1,),)),))
        write_report(EXPERIMENT, report, tmp_path / "fig9" / scale, {**made, "scale": scale})
    ids = Outline(write_page([EXPERIMENT], tmp_path).read_text()).ids
    assert [name for name in ids if name.startswith("fig9-")] == [
        "fig9-paper", "fig9-gpu", "fig9-gpu-1b", "fig9-smoke",
    ]  # fmt: skip
