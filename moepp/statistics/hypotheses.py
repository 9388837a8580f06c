"""Stated tests of one or several trained models: effects with intervals, corrected as a family, and what they decide.

One model is judged over its examples: the verdict is about this model and other examples. Several models, of different
seeds, are judged over the models by Student's t: the verdict is then about another training run too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moepp.statistics.claims import Claim, judge
from moepp.statistics.resampling import Interval, bootstrap_chance, percentile_interval
from moepp.statistics.seeds import SIGNIFICANCE, holm, mean_interval


@dataclass(frozen=True)
class Effect:
    """A statistic of one model with its interval over examples, and p against the bound of its hypothesis."""

    interval: Interval
    p: float

    @classmethod
    def of(cls, value: float, draws_D: np.ndarray, bound: float = 0.0, p: float | None = None) -> "Effect":
        """`draws_D` are bootstrap draws; they give p where no permutation test does."""
        return cls(percentile_interval(value, draws_D), bootstrap_chance(draws_D, bound) if p is None else p)


@dataclass(frozen=True)
class Hypothesis:
    """What is claimed: that the effect lies above a bound, or below it (one of the two is given)."""

    statement: str
    unit: str
    above: float | None = None
    below: float | None = None
    paper: str = ""
    note: str = ""

    @property
    def bound(self) -> float:
        return self.above if self.above is not None else self.below


def over_models(intervals: Sequence[Interval]) -> Interval:
    """One model's own interval over examples, or the t-interval of the mean over several models; NaN throughout where
    a model has no value.
    """
    if len(intervals) == 1:
        return intervals[0]
    if not all(np.isfinite(interval.value) for interval in intervals):
        return Interval(float("nan"), float("nan"), float("nan"))
    estimate = mean_interval([interval.value for interval in intervals])
    return Interval(estimate.mean, estimate.low, estimate.high)


def decide(tests: Sequence[tuple[Hypothesis, Sequence[Effect]]]) -> tuple[Claim, ...]:
    """The claims of a family of tests, each with the effects of all models, p by Holm over the family.

    `holds` and `fails` need both: an interval that leaves out the bound, and p below 5 % after correction.
    """
    found = []
    for hypothesis, effects in tests:
        interval = over_models([effect.interval for effect in effects])
        p = effects[0].p
        if not np.isfinite(interval.value):
            p = 1.0
        elif len(effects) > 1:
            p = mean_interval([effect.interval.value - hypothesis.bound for effect in effects]).p_value
        found.append((hypothesis, len(effects), interval, p))
    corrected = holm([p for *_, p in found])
    return tuple(_claim(*test, p_holm=p) for test, p in zip(found, corrected, strict=True))


def _claim(hypothesis: Hypothesis, models: int, interval: Interval, p: float, p_holm: float) -> Claim:
    verdict = judge(interval.low, interval.high, above=hypothesis.above, below=hypothesis.below)
    known, over = np.isfinite(interval.low), "interval over its examples"
    units = f"t-interval over {models} models" if models > 1 else f"one model, {over if known else 'no ' + over}"
    claim = Claim(
        statement=hypothesis.statement,
        verdict=verdict if p_holm < SIGNIFICANCE else "undecided",
        effect=interval.value,
        low=interval.low if known else None,
        high=interval.high if known else None,
        unit=hypothesis.unit,
        p=p_holm,
        paper=hypothesis.paper,
        note="; ".join(filter(None, [hypothesis.note, units])),
    )
    return claim if np.isfinite(interval.value) else replace(claim, verdict="undecided", effect=None)
