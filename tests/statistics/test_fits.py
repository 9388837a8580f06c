import numpy as np
import pytest
from scipy import stats

from moepp.statistics.fits import fit_line


def test_a_line_and_its_intervals_are_scipys():
    generator = np.random.default_rng(0)
    x = [0.1, 0.3, 0.5, 0.6, 0.8, 1.0]
    y = [2 + 3 * a + e for a, e in zip(x, generator.normal(0, 0.1, len(x)), strict=True)]
    line, theirs = fit_line(x, y), stats.linregress(x, y)
    t = stats.t.ppf(0.975, len(x) - 2)
    assert (line.slope, line.intercept) == pytest.approx((theirs.slope, theirs.intercept))
    assert line.slope_half_width == pytest.approx(t * theirs.stderr)
    assert line.intercept_half_width == pytest.approx(t * theirs.intercept_stderr)
    assert line.at(2.0) == pytest.approx(theirs.intercept + 2 * theirs.slope)


@pytest.mark.parametrize(("x", "y"), [([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3])])
def test_too_little_for_a_line_is_refused(x, y):
    with pytest.raises(ValueError, match="three points at two different x"):
        fit_line(x, y)


def test_the_papers_times_are_nearly_a_line_with_a_fixed_part():
    """Table 3 at 1B: the fixed part is a quarter of vanilla MoE's time, no residual is above 10 ms."""
    from experiments.table1 import paper_points
    from experiments.table3 import PAPER

    line = fit_line(*paper_points()["paper, 1B"])
    rows = PAPER["1b"].values()
    times, shares = [row.expert_forward_ms for row in rows], [row.ffn_share for row in rows]
    assert (line.intercept * times[0], line.slope * times[0]) == pytest.approx((160.5, 455.3), abs=0.1)
    assert all(abs(t - times[0] * line.at(s)) < 10 for t, s in zip(times, shares, strict=True))
