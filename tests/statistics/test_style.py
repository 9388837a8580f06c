import re
from io import StringIO
from itertools import combinations
from xml.etree import ElementTree

import pytest
from matplotlib.colors import to_rgb

from moepp.statistics.style import (
    BASELINE,
    COLOURS,
    axes_of,
    compact_svg,
    counted,
    label_points,
    looks,
    plain_log,
    spread,
    styled,
    whole_ticks,
)

ARMS = [f"arm_{number}" for number in range(20)]
# Machado, Oliveira and Fernandes 2009, severity 1: linear RGB as a reader without red or green cones sees it
PROTAN = ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052))
DEUTAN = ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969))


def test_twenty_arms_differ_without_any_colour():
    shapes = [(look["marker"], look["ls"]) for look in looks(ARMS).values()]
    assert len(set(shapes)) == 20 and all(marker != BASELINE["marker"] for marker, _ in shapes)


def test_seventy_arms_differ():
    found = looks(map(str, range(70)))
    assert len({(look["color"], look["marker"]) for look in found.values()}) == 70


@pytest.mark.parametrize("baseline", [ARMS[0], ARMS[7], ARMS[19]])
def test_the_baseline_looks_as_ever_and_takes_no_others_place(baseline):
    found = looks(ARMS, baseline)
    assert found[baseline] == BASELINE and list(found) == ARMS
    others = [arm for arm in ARMS if arm != baseline]
    assert [found[arm] for arm in others] == list(looks(others).values())


def test_colours_are_told_apart_by_every_reader():
    def seen(colour, matrix):
        return [sum(w * c for w, c in zip(row, to_rgb(colour), strict=True)) for row in matrix]

    for matrix in (PROTAN, DEUTAN, ((1, 0, 0), (0, 1, 0), (0, 0, 1))):
        for one, other in combinations(COLOURS, 2):
            apart = max(abs(a - b) for a, b in zip(seen(one, matrix), seen(other, matrix), strict=True))
            assert apart > 0.1, (one, other)


def test_labels_move_apart_no_further_than_they_must():
    assert spread({"a": 0.1, "b": 0.9}, 0.2) == pytest.approx({"a": 0.1, "b": 0.9})
    found = spread({"b": 0.5, "a": 0.5, "c": 0.9}, 0.2)
    assert sorted([found["a"], found["b"]]) == pytest.approx([0.4, 0.6]) and found["c"] == pytest.approx(0.9)
    crowded = sorted(spread({str(i): 0.99 for i in range(5)}, 0.2).values())
    assert crowded == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_ticks_of_counts_are_whole_and_those_of_rates_plain():
    with styled():
        figure, axes = axes_of(3, 2)
        axes.plot([2, 3, 4], [0.03, 0.1, 0.4])
        axes.set_yscale("log")
        whole_ticks(axes.xaxis)
        plain_log(axes.yaxis)
        figure.draw_without_rendering()
    assert all(float(label.get_text()).is_integer() for label in axes.get_xticklabels() if label.get_text())
    assert {"0.05", "0.1", "0.2"} <= {label.get_text() for label in axes.get_yticklabels()}
    assert not axes.yaxis.get_minorticklocs().size


def test_names_of_points_cover_no_other():
    with styled():
        figure, axes = axes_of(3, 3)
        points = {f"task {i}": (i % 3 / 100, i / 20) for i in range(6)} | {"far": (1.0, 1.0)}
        axes.plot(*zip(*points.values(), strict=True), "o")
        label_points(axes, points, 2.4, 2.4)
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_numbers_of_seeds_are_said():
    assert counted([3, 3], "seed") == "n = 3 seeds" and counted([3, 5, 4], "seed") == "n = 3 to 5 seeds"
    assert counted([1], "paired seed") == "n = 1 paired seed" and counted([1, 2], "seed") == "n = 1 to 2 seeds"


def test_a_figure_is_written_in_few_bytes_and_draws_what_matplotlib_drew():
    def elements(svg):
        """Tag, text and geometry of everything that is drawn."""
        kept = ("x", "y", "d", "href", "clip-path")
        for element in ElementTree.fromstring(svg).iter():
            tag = element.tag.rpartition("}")[2]
            if tag not in ("RDF", "Work", "type", "format", "metadata", "style"):
                known = {key.rpartition("}")[2]: " ".join(value.split()) for key, value in element.items()}
                yield tag, (element.text or "").strip(), {key: known[key] for key in kept if key in known}

    with styled():
        canvas, axes = axes_of(3, 3)
        axes.plot([0.123, 1.456], [0.2, 1.9], label="a  name")
        axes.set_ylabel("turned")
        axes.legend()
        canvas.savefig(plain := StringIO(), format="svg", metadata={"Date": None, "Creator": None})
    ours = compact_svg(plain.getvalue())
    rounded = re.sub(r"(\d\.\d\d)\d+", r"\1", plain.getvalue())
    assert list(elements(ours)) == list(elements(rounded))
    assert 9 * len(ours) < 5 * len(rounded) and ours.count("font-family") == 1 and "rotate(-90" in ours
    assert compact_svg(ours) == ours
    assert list(_styles(ours)) == list(_styles(plain.getvalue()))


def test_a_style_that_points_to_an_id_stays_with_its_element():
    """Ids are renamed where a picture becomes part of a page; a class of two pictures would then have two contents."""
    shared, hatched = "fill: #ffffff; stroke: #000000", "fill: url(#h1); stroke: #000000"
    paths = "".join(f'<path style="{style}"/>' for style in (shared, hatched) * 2)
    ours = compact_svg(f'<svg xmlns="http://www.w3.org/2000/svg"><style>*{{}}</style>{paths}</svg>')
    assert ours.count(shared) == 1 and ours.count(hatched) == 2
    assert list(_styles(ours)) == [shared, hatched] * 2


def _styles(svg):
    """What each element is drawn with, of its own or by its class, but for the font of all texts."""
    classes = dict(re.findall(r"\.(s\w+)\{([^}]*)\}", svg))
    for element in ElementTree.fromstring(svg).iter():
        said = element.get("style") or classes.get(element.get("class"))
        if said:
            yield re.sub(r"; font-family: [^;\"]*", "", re.sub(r"(\d\.\d\d)\d+", r"\1", said))
