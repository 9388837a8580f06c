"""Means, paired differences and their intervals for a handful of seeds: Student's t throughout, since n is 3 to 5."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

SIGNIFICANCE = 0.05  # level of every test and report
POWER = 0.8  # with which a detectable difference would be found


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval `mean ± half_width`. One value has no spread: `std` and `half_width` are then None."""

    mean: float
    std: float | None
    half_width: float | None
    n: int

    @property
    def low(self) -> float | None:
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        return None if self.half_width is None else self.mean + self.half_width

    @property
    def excludes_zero(self) -> bool:
        return self.half_width is not None and abs(self.mean) > self.half_width

    @property
    def p_value(self) -> float | None:
        """Two-sided p of the t-test that the true mean is 0; None with one value."""
        if self.std is None:
            return None
        if self.std == 0:
            return 1.0 if self.mean == 0 else 0.0
        from scipy.special import stdtr

        return float(2 * stdtr(self.n - 1, -abs(self.mean) * math.sqrt(self.n) / self.std))


def mean_interval(values: Sequence[float], level: float = 0.95) -> Estimate:
    """The mean of independent `values` with its t-interval. Raises ValueError when there is no value."""
    if not values:
        raise ValueError("the mean of no values")
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return Estimate(mean, None, None, 1)
    from scipy.special import stdtrit

    std = statistics.stdev(values)
    return Estimate(mean, std, float(stdtrit(n - 1, (1 + level) / 2)) * std / math.sqrt(n), n)


def paired_difference(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Estimate:
    """The mean of `a - b`, where a[i] and b[i] share a seed: what the seed does to both cancels."""
    return mean_interval([x - y for x, y in zip(a, b, strict=True)], level)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: below 0.05 means significant at 5 % over the whole family of tests."""
    adjusted = [0.0] * len(p_values)
    worst = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = worst
    return adjusted


def minimal_detectable_difference(
    std: float, n: int, level: float = 0.95, power: float = 0.8, paired: bool = True
) -> float | None:
    """The true mean that a t-test on `n` differences with deviation `std` finds with probability `power`.

    `paired` differences share their seed; others are of two independent samples of `n` each (n - 1 and 2n - 2 degrees
    of freedom). Exact (noncentral t), which matters here: at n = 3 the normal approximation gives half of it. None when
    n < 2.
    """
    if n < 2:
        return None
    from scipy.special import nctdtrinc, stdtrit

    freedom = n - 1 if paired else 2 * (n - 1)
    critical = stdtrit(freedom, (1 + level) / 2)
    return float(nctdtrinc(freedom, 1 - power, critical)) * std / math.sqrt(n)


def variance_ratio_interval(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The interval of the variance of `a` over that of `b`, where a[i] and b[i] belong together (Pitman 1939, Morgan
    1939): exact for normal pairs of any correlation. Raises ValueError with fewer than three pairs or without spread.
    """
    n = len(a)
    if n < 3 or len(set(a)) < 2 or len(set(b)) < 2:
        raise ValueError("an interval of two variances needs three pairs that differ")
    from scipy.special import stdtrit

    ratio, r = statistics.variance(a) / statistics.variance(b), statistics.correlation(a, b)
    t = float(stdtrit(n - 2, (1 + level) / 2))
    k = 1 + 2 * (1 - r * r) * t * t / (n - 2)
    high = k + math.sqrt(k * k - 1)
    return ratio / high, ratio * high
