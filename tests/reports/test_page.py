from html.parser import HTMLParser

import pytest

from moepp.reports.experiment import Experiment, Findings, Runs
from moepp.reports.page import one_report, write_page
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
        self.images += [attrs["src"]] if tag == "img" else [attrs["data"]] if tag == "object" else []
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
    style.hover(axes, [(0, 1, "1 & more")])
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
    table = Table("counts", "Counts.", ("what", "n"), (("<script>", 1), *((f"row {i}", i) for i in range(19))))
    data = Table("line", "A line.", ("x",), ((1,),))
    claims = (
        Claim("it grows", "holds"),
        Claim("it ends", "undecided"),
        Claim("it goes on", "holds"),
        Claim("it shrinks", "fails", -0.25, -0.5, -0.1),
    )
    made = {
        "command": "python run.py",
        "started": "2026-01-02",
        "hardware": {"cpu": "two cores"},
        "git": {"sha": "0" * 40},
        "runs": [{"arm": "a", "seed": seed} for seed in (3, 4)],
    }
    for scale in ("smoke", "gpu"):
        report = Findings((table,), (Figure(data, draw),), claims)
        write_report(EXPERIMENT, report, tmp_path / "fig9" / scale, {**made, "scale": scale})
    (tmp_path / "bench/quick").mkdir(parents=True)
    (tmp_path / "bench/quick/report.md").write_text("# A benchmark\n\nTimes.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n")
    return write_page([EXPERIMENT, ABSENT, COVERED], tmp_path).read_text()


def pages_of(folder):
    return sorted(folder.glob("**/index.html"))


def test_every_page_is_well_formed_and_every_link_leads_somewhere(page, tmp_path):
    assert [str(path.relative_to(tmp_path)) for path in pages_of(tmp_path)] == [
        "bench/index.html", "fig9/index.html", "index.html",
    ]  # fmt: skip
    for path in pages_of(tmp_path):
        outline = Outline(path.read_text())
        assert outline.open == [] and len(set(outline.ids)) == len(outline.ids)
        for link in (*outline.links, *outline.images):
            file, _, anchor = link.partition("#")
            if not link.startswith("https://arxiv.org/"):
                assert (path.parent / file).exists(), link
            if anchor:
                assert anchor in Outline((path.parent / file).read_text()).ids


def test_nothing_is_fetched(page, tmp_path):
    for path in pages_of(tmp_path):
        text = path.read_text()
        assert not any(word in text for word in ("<script src", "@import", "<link", "http://localhost", 'src="http'))


def test_the_front_page_shows_a_figure_and_that_of_an_experiment_holds_them(page, tmp_path):
    assert Outline(page).images == ["fig9/gpu/line.svg"]
    own = (tmp_path / "fig9/index.html").read_text()
    assert Outline(own).images == ["gpu/line.svg", "smoke/line.svg"] and "gpu/line.csv" in Outline(own).links
    assert "<title>1 &amp; more</title>" in (tmp_path / "fig9/gpu/line.svg").read_text() and "<svg" not in own
    assert own.index("<summary>Figures") < own.index("<summary>Tables")


def test_a_card_has_question_verdicts_by_name_scales_and_n(page):
    card = page[page.index('<article id="fig9"') : page.index('<article id="bench"')]
    assert "<strong>Does it grow?</strong>" in card and "Fig. 9" in card and "n = 2" in card
    assert '<strong class="holds">holds</strong>: 2' in card and '<strong class="fails">fails</strong>: 1' in card
    assert '<strong class="fails">fails</strong>: it shrinks</li>' in card and "-0.25" not in card
    assert 'href="fig9/index.html#gpu"' in card and 'href="fig9/index.html#smoke"' in card


def test_an_answer_stands_before_the_verdict(tmp_path):
    made = {"command": "python run.py", "scale": "gpu", "hardware": {}}
    found = Findings((Table("n", "", ("n",), ((1,),)),), answer="It grows by *half*.", verdict=("Something else.",))
    write_report(EXPERIMENT, found, tmp_path / "fig9/gpu", made)
    page = write_page([EXPERIMENT], tmp_path).read_text()
    assert "<p>It grows by *half*.</p>" in page and "Something else" not in page


def test_what_has_not_run_is_named_with_its_command(page):
    assert "2 of 3 have been run" in page
    assert "<code>python run.py reproduce table9</code>" in page and ">51.2</td>" in page


def test_text_is_escaped_and_the_largest_scale_comes_first(page, tmp_path):
    own = (tmp_path / "fig9/index.html").read_text()
    assert "A &amp; &lt;b&gt;figure&lt;/b&gt;" in page and "&lt;script&gt;" in own
    assert own.index('id="gpu" open') < own.index('id="smoke"')
    assert '<strong class="holds">holds</strong>' in own and "commit 0000000000" in own


def test_long_tables_fold(page, tmp_path):
    own = (tmp_path / "fig9/index.html").read_text()
    assert own.count("<summary>Table of 20 rows</summary>") == 2 and "Table of 1 rows" not in own


def test_a_report_is_one_file_that_says_what_its_marks_are(tmp_path):
    made = {"command": "python run.py", "scale": "gpu", "hardware": {}}
    write_report(EXPERIMENT, Findings((), (Figure(Table("line", "A line.", ("x",), ((1,),)), draw),)), tmp_path, made)
    text = one_report(tmp_path)
    assert "<title>1 &amp; more</title>" in text and 'xlink:href="1' not in text and Outline(text).images == []


def test_a_figure_that_would_run_something_is_an_image(tmp_path):
    folder = tmp_path / "bench/quick"
    folder.mkdir(parents=True)
    (folder / "report.md").write_text("# A\n\n![x](x.svg)\n")
    (folder / "x.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"><g onclick="alert(1)"/></svg>')
    text = one_report(folder)
    assert "onclick" not in text and Outline(text).images[0].startswith("data:image/svg+xml;base64,")
    write_page([], tmp_path)
    assert '<img alt="x" src="quick/x.svg">' in (tmp_path / "bench/index.html").read_text()


def test_runs_of_another_size_come_after_those_of_the_scales_own(tmp_path):
    made = {"command": "python run.py", "started": "2026-01-02", "hardware": {}}
    for scale in ("smoke", "gpu-1b", "gpu", "paper"):
        report = Findings((Table("counts", "Counts.", ("n",), ((1,),)),))
        write_report(EXPERIMENT, report, tmp_path / "fig9" / scale, {**made, "scale": scale})
    write_page([EXPERIMENT], tmp_path)
    assert Outline((tmp_path / "fig9/index.html").read_text()).ids == ["paper", "gpu", "gpu-1b", "smoke"]


@pytest.mark.parametrize(
    "source",
    ["../../secret.svg", "/etc/passwd", "%2e%2e/%2e%2e/secret.svg", "linked.svg", "notes.csv", "a\x00.svg", "."],
)
def test_a_reports_images_come_from_its_own_folder(tmp_path, source):
    folder = tmp_path / "results" / "bench" / "quick"
    folder.mkdir(parents=True)
    (tmp_path / "results" / "secret.svg").write_text("secret")
    (folder / "linked.svg").symlink_to(tmp_path / "results" / "secret.svg")
    (folder / "notes.csv").write_text("secret")
    (folder / "own figure.svg").write_text("<svg/>")
    (folder / "report.md").write_text(f"# A\n\n![own](own%20figure.svg) ![other]({source})\n")
    front = write_page([], tmp_path / "results").read_text()
    page = (tmp_path / "results/bench/index.html").read_text()
    assert Outline(page).images == ["quick/own%20figure.svg", ""] and "secret" not in page + front


def test_folders_and_texts_of_any_name_are_text(tmp_path):
    folder = tmp_path / "results" / '"><b>x' / "<i>y"
    folder.mkdir(parents=True)
    (folder / "report.md").write_text(
        "# <u>A</u>\n\n[d](d.csv) <script>alert(1)</script> [j](javascript:x) ![n](<b>)\n"
    )
    front = write_page([ABSENT], tmp_path / "results").read_text()
    page = (folder.parent / "index.html").read_text()
    for text in (front, page):
        assert not any(tag in text for tag in ("<b>", "<i>", "<u>", "<script>alert", 'href="javascript'))
    assert 'href="%3Ci%3Ey/d.csv"' in page and 'href="%22%3E%3Cb%3Ex/index.html"' in front
