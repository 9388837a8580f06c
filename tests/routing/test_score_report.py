import numpy as np
import pytest

from moepp.routing.score_report import histogram_plot, layer_scores, score_claims, score_table
from moepp.routing.scores import RoutingScores

SEEDS = 6


def scores_of(means, deviations, seed, tokens=4000):
    """Two layers of normally distributed scores around the two `means`."""
    generator = np.random.default_rng(seed)
    found = RoutingScores.empty(2)
    for _ in range(2):
        found.add(np.clip(generator.normal(means, deviations, (2, tokens // 2, 2)), 0, 1))
    return found


def arm(means, deviations, spread=0.0, offset=0):
    generator = np.random.default_rng(offset)
    shifts = generator.normal(0, spread, SEEDS)
    return {
        f"seed {s}": scores_of(np.array(means) * (1 + shifts[s]), deviations, 100 * offset + s) for s in range(SEEDS)
    }


def verdicts(on, off):
    found = score_claims({"on": on, "off": off}, on="on", off="off")
    return {(c.statement.split()[4], " ".join(c.statement.split()[7:9])): c for c in found}


def test_a_smaller_variance_at_the_same_mean_is_what_the_paper_says():
    found = verdicts(arm((0.4, 0.2), (0.04, 0.02), offset=1), arm((0.4, 0.2), (0.05, 0.025), offset=2))
    assert [found[rank, "smaller variance"].verdict for rank in ("highest", "second")] == ["holds", "holds"]
    assert found["highest", "smaller variance"].effect == pytest.approx(0.8**2 - 1, abs=0.03)
    assert [found[rank, "the same"].verdict for rank in ("highest", "second")] == [
        "fails",
        "fails",
    ]  # the range shrinks


def test_means_within_the_margin_are_the_same_and_means_beyond_it_are_not():
    base = arm((0.4, 0.2), (0.04, 0.02), offset=1)
    near, far = (arm((0.4 * f, 0.2 * f), (0.04, 0.02), offset=2) for f in (1.02, 1.3))
    mean = [claim for claim in score_claims({"on": near, "off": base}, "on", "off") if "mean" in claim.statement]
    assert [claim.verdict for claim in mean] == ["holds", "holds"]
    assert mean[0].effect == pytest.approx(0.02, abs=0.005) and "within 10%" in mean[0].note
    mean = [claim for claim in score_claims({"on": far, "off": base}, "on", "off") if "mean" in claim.statement]
    assert [claim.verdict for claim in mean] == ["fails", "fails"]


def test_means_that_scatter_over_seeds_are_not_called_the_same():
    noisy, base = arm((0.4, 0.2), (0.04, 0.02), spread=0.15, offset=1), arm((0.4, 0.2), (0.04, 0.02), offset=2)
    mean = [claim for claim in score_claims({"on": noisy, "off": base}, "on", "off") if "mean" in claim.statement]
    assert [claim.verdict for claim in mean] == ["undecided", "undecided"]


def test_one_pair_decides_nothing():
    one = {"seed 0": scores_of((0.4, 0.2), (0.04, 0.02), 0)}
    found = score_claims({"on": one, "off": one}, on="on", off="off")
    assert {claim.verdict for claim in found} == {"undecided"} and all(claim.effect is None for claim in found)


def test_pairs_are_made_by_model_and_the_rest_is_left_out():
    on, off = arm((0.4, 0.2), (0.04, 0.02), offset=1), arm((0.4, 0.2), (0.04, 0.02), offset=2)
    del on["seed 0"], off["seed 5"]
    assert "4 pairs of runs" in score_claims({"on": on, "off": off}, on="on", off="off")[0].note


def test_tables_and_histogram_hold_what_was_added():
    scores = {"on": arm((0.4, 0.2), (0.04, 0.02), offset=1)}
    table = score_table(scores, {"on": (0.23, 0.105)})
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert rows[0]["mean"] == pytest.approx(0.4, abs=0.01) and rows[1]["variance"] == pytest.approx(0.0004, rel=0.1)
    assert rows[0]["range98"] == pytest.approx(2 * 2.326 * 0.04, rel=0.1) and rows[0]["range"] > rows[0]["range98"]
    assert [row["mode"] for row in rows] == pytest.approx([0.4, 0.2], abs=0.02)
    assert [row["paper: mode"] for row in rows] == [0.23, 0.105]
    assert [row[1] for row in layer_scores(scores).rows] == [1, 2]
    assert sum(row[3] for row in histogram_plot(scores).data.rows) == pytest.approx(2)


def test_a_mode_is_the_middle_of_the_fullest_bin_of_its_rank():
    found = RoutingScores.empty(1)
    highest = [0.301, 0.302, 0.304, 0.7, 0.7]  # the narrow bin at 0.7 holds two, the wide one at 0.3 three
    found.add(np.array([[[score, 0.1012] for score in highest]]))
    assert found.statistics()["mode"] == pytest.approx(np.array([[0.3025, 0.1025]]))
    assert found.pooled().coarse().sum() == 2 * len(highest)
