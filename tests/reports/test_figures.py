import io
import math
from pathlib import Path

import pytest
from drawn_text import faults

from moepp.reports.figures import curves_figure, differences_figure, equal_time_figure, speedup_figure
from moepp.reports.trend import trend_figure
from moepp.statistics.style import styled

RESULTS = Path(__file__).parents[2] / "results"
COMMITTED = sorted(path for path in RESULTS.glob("*/*/*.svg") if path.parent.name != "smoke")
BASELINE = "vanilla_of_the_same_size"


def drawn(figure):
    out = io.StringIO()
    with styled():
        figure.draw().savefig(out, format="svg")
    return out.getvalue()


def rows_of(arms):
    """Of `arms` arms that end close together, as sweeps do."""
    names = [BASELINE, *(f"arm_{i}_with_a_long_name" for i in range(1, arms))]
    gaps = {name: 0.01 * math.sin(i) if i else 0.0 for i, name in enumerate(names)}
    curve = [(name, f"{t:.0f}", 5 + gap - t / 1e6, gap) for name, gap in gaps.items() for t in (9e4, 18e4)]
    by_seed = "0:0.01 1:-0.01"
    difference = [(f"{n} – {BASELINE}", 2, g, g - 0.1, g + 0.1, 0.5, by_seed) for n, g in list(gaps.items())[1:]]
    difference += [(f"effect of {'many words ' * 8}", 2, 0.0, -0.1, 0.1, 0.5, by_seed)]
    speed = [(name, routing, 1.3, 1.7) for routing in ("learned", "balanced") for name in names[1:]]
    return curve, difference, speed


def timed(arms):
    names = [BASELINE, BASELINE, *(f"arm_{i}_with_a_long_name" for i in range(1, arms))]
    return [(name, 0.8 + 0.1 * i, 2, 5 - 0.1 * i, None, None) for i, name in enumerate(names)]


@pytest.mark.parametrize("arms", [2, 8, 20])
def test_no_text_is_cut_or_covered_however_many_arms_there_are(arms):
    curve, difference, speed = rows_of(arms)
    assert faults(drawn(curves_figure(curve, BASELINE, [2] * arms))) == []
    assert faults(drawn(differences_figure(difference, BASELINE))) == []
    assert faults(drawn(speedup_figure(speed, BASELINE))) == []
    assert faults(drawn(equal_time_figure(timed(arms), BASELINE))) == []


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: "-".join(path.relative_to(RESULTS).parts))
def test_no_text_of_a_committed_figure_is_cut_or_covered(path):
    assert faults(path.read_text()) == []


def test_what_is_cut_or_covered_is_told():
    word = '<text style="font-size: 10px" x="{}" y="{}">word</text>'
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 50">{}</svg>'
    assert faults(svg.format(word.format(20, 20))) == []
    assert faults(svg.format(word.format(90, 20))) == ["cut: word"]
    assert faults(svg.format(word.format(20, 20) + word.format(30, 22))) == ["overlap: word / word"]


def test_captions_name_unit_n_and_interval():
    curve, difference, speed = rows_of(3)
    trend = [("tau", f"tau_{x}", x, 3 + place, 5.0, 4.9, 5.1, None) for place, x in enumerate((0.25, 0.75))]
    said = {
        "curves": curves_figure(curve, BASELINE, [2, 2, 3]).data.caption,
        "differences": differences_figure(difference, BASELINE).data.caption,
        "trend": trend_figure(trend, "tau").data.caption,
    }
    assert "n = 2 to 3 paired seeds" in said["curves"] and "n = 2 paired seeds" in said["differences"]
    assert "n = 3 to 4 seeds" in said["trend"] and all("nats per token" in caption for caption in said.values())
    assert all(
        "interval" in caption.lower() for caption in (*said.values(), speedup_figure(speed, BASELINE).data.caption)
    )
