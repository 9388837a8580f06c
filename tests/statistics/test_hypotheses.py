import numpy as np
import pytest
from scipy import stats

from moepp.statistics.hypotheses import Effect, Hypothesis, decide, over_models
from moepp.statistics.resampling import Interval

RISES = Hypothesis("it rises", "units", above=0.0)
FALLS = Hypothesis("it falls", "units", below=0.0)


def effect(value, half_width=0.1, p=0.01):
    return Effect(Interval(value, value - half_width, value + half_width), p)


def test_one_model_is_judged_over_its_examples():
    [claim] = decide([(RISES, [effect(0.5)])])
    assert (claim.verdict, claim.effect, claim.low, claim.high, claim.p) == ("holds", 0.5, 0.4, 0.6, 0.01)
    assert "one model" in claim.note
    assert decide([(FALLS, [effect(0.5)])])[0].verdict == "fails"


def test_several_models_are_judged_by_students_t_over_them():
    values = [0.5, 0.4, 0.7, 0.45]
    [claim] = decide([(RISES, [effect(value, p=1.0) for value in values])])
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert claim.verdict == "holds" and (claim.low, claim.high) == pytest.approx((low, high))
    assert claim.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert "4 models" in claim.note


def test_p_is_corrected_over_the_family_and_can_undo_a_verdict():
    tests = [(RISES, [effect(0.5, p=0.02)])] * 3
    assert [claim.verdict for claim in decide(tests)] == ["undecided"] * 3
    assert [claim.p for claim in decide(tests)] == pytest.approx([0.06] * 3)


def test_a_bound_other_than_zero_is_what_p_is_about():
    weak = Hypothesis("no strong correlation", "rho", below=0.5)
    values = [0.1, 0.12, 0.08, 0.11]
    [claim] = decide([(weak, [effect(value) for value in values])])
    assert claim.verdict == "holds" and claim.p == pytest.approx(stats.ttest_1samp(values, 0.5).pvalue)


def test_an_effect_that_is_not_defined_decides_nothing():
    [claim] = decide([(RISES, [Effect(Interval(np.nan, np.nan, np.nan), 1.0)])])
    assert claim.verdict == "undecided" and claim.effect is None
    undefined = [effect(0.5), Effect(Interval(np.nan, np.nan, np.nan), 1.0)]
    claims = decide([(RISES, undefined), (RISES, [effect(0.5, p=0.02)])])
    assert [claim.verdict for claim in claims] == ["undecided", "holds"]


def test_bootstrap_draws_give_p_where_no_permutation_does():
    draws = np.random.default_rng(0).normal(0.2, 0.1, 4000)
    assert Effect.of(0.2, draws).p == pytest.approx(2 * stats.norm.sf(2), abs=0.01)
    assert Effect.of(0.2, draws, p=0.3).p == 0.3
    assert Effect.of(0.2, draws, bound=0.2).p > 0.5


def test_over_models_keeps_the_interval_of_a_single_one():
    assert over_models([Interval(1.0, 0.7, 1.2)]) == Interval(1.0, 0.7, 1.2)
