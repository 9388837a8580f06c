"""Means, paired differences and their intervals for a handful of seeds: Student's t, since n is small, and for seeds of
which some failed the median with an interval that holds for any distribution.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

SIGNIFICANCE = 0.05  # level of every test and report
POWER = 0.8  # with which a detectable difference would be found


@dataclass(frozen=True)
class SharedError:
    """A standard error that all seeds share, for they are judged on the same examples, and its degrees of freedom."""

    error: float
    freedom: int


NO_ERROR = SharedError(0.0, 1)


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval `mean ± half_width`. One value has no spread: `std` and `half_width` are then None.

    `shared` is the error of what the seeds are judged on, which crosses that of the seeds: the interval holds for other
    seeds and other examples. Each has a half width of its own, Student's t; together they are the root of the sum of
    their squares (Howe 1974). One t-interval of the joint error, with degrees of freedom after Satterthwaite, is too
    narrow where few seeds scatter more than the examples do: three seeds alarm falsely seven times as often as a test
    at 0.3 % should. This one is never below its level, and above it where few seeds and the examples weigh alike.
    """

    mean: float
    std: float | None
    n: int
    shared: SharedError = NO_ERROR
    level: float = 0.95

    @property
    def error(self) -> float | None:
        """The standard error over seeds alone."""
        return None if self.std is None else self.std / math.sqrt(self.n)

    @property
    def half_width(self) -> float | None:
        return None if self.std is None else self._half_width(1 - self.level)

    def _half_width(self, significance: float) -> float:
        from scipy.special import stdtrit

        parts = (self.error, self.n - 1), (self.shared.error, self.shared.freedom)
        return math.hypot(*(error * float(stdtrit(freedom, significance / 2)) for error, freedom in parts))

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
        """Two-sided p of the test that the true mean is 0, the level at which the interval ends there; None with one
        value.
        """
        if self.std is None:
            return None
        if self.mean == 0:
            return 1.0
        from scipy.optimize import brentq

        least = max(_two_sided(self.mean, self.error, self.n - 1), _two_sided(self.mean, *astuple(self.shared)))

        def beyond(log_p: float) -> float:
            return self._half_width(math.exp(log_p)) - abs(self.mean)

        if not least or beyond(math.log(least)) <= 0:  # one error alone, but for rounding
            return least
        return math.exp(brentq(beyond, math.log(least), 0.0))

    def detectable_difference(self, level: float = 0.95, power: float = POWER) -> float | None:
        """The true mean that the test of this mean would find with probability `power`, were its two errors the true
        ones; None with one value.
        """
        if self.std is None:
            return None
        parts = (self.error, self.n - 1), (self.shared.error, self.shared.freedom)
        return math.hypot(*(_detectable(error, freedom, level, power) for error, freedom in parts))


def _two_sided(mean: float, error: float, freedom: int) -> float:
    """The p of a t-test that a mean is 0, which it is not."""
    from scipy.special import stdtr

    return float(2 * stdtr(freedom, -abs(mean) / error)) if error else 0.0


def mean_interval(values: Sequence[float], level: float = 0.95, shared: SharedError = NO_ERROR) -> Estimate:
    """The mean of independent `values` with its interval. Raises ValueError when there is no value."""
    if not values:
        raise ValueError("the mean of no values")
    std = statistics.stdev(values) if len(values) > 1 else None
    return Estimate(statistics.fmean(values), std, len(values), shared, level)


def paired_difference(
    a: Sequence[float], b: Sequence[float], level: float = 0.95, shared: SharedError = NO_ERROR
) -> Estimate:
    """The mean of `a - b`, where a[i] and b[i] share a seed: what the seed does to both cancels."""
    return mean_interval([x - y for x, y in zip(a, b, strict=True)], level, shared)


@dataclass(frozen=True)
class Ratio:
    """A geometric mean with its interval; None where there is one value."""

    value: float
    low: float | None
    high: float | None


def ratio_interval(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Ratio:
    """Of `a / b`, positive and paired by seed: the t-interval of the logarithms."""
    found = mean_interval([math.log(x / y) for x, y in zip(a, b, strict=True)], level)
    low, high = (None if end is None else math.exp(end) for end in (found.low, found.high))
    return Ratio(math.exp(found.mean), low, high)


@dataclass(frozen=True)
class MedianInterval:
    """A median between two of its values; the interval covers the true one with probability `level`, whatever the
    distribution of the values.
    """

    median: float
    low: float
    high: float
    level: float
    p_value: float  # of the sign test that the true median is 0, two-sided


def median_interval(values: Sequence[float], level: float = 0.95) -> MedianInterval:
    """The narrowest pair of order statistics that covers with `level`, or the widest there is: few values do not reach
    it, three come to 75 %, six to 97 %. Raises ValueError when there is no value.
    """
    ordered, n = sorted(values), len(values)
    below = [sum(math.comb(n, i) for i in range(k + 1)) / 2**n for k in range((n + 1) // 2)]
    out = max((k for k, tail in enumerate(below) if 1 - 2 * tail >= level), default=0)
    signs = [value for value in values if value]
    fewer = min(sum(value > 0 for value in signs), sum(value < 0 for value in signs))
    p = min(1.0, sum(math.comb(len(signs), i) for i in range(fewer + 1)) / 2 ** (len(signs) - 1)) if signs else 1.0
    covered = max(0.0, 1 - 2 * below[out])
    return MedianInterval(statistics.median(values), ordered[out], ordered[n - 1 - out], covered, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: below 0.05 means significant at 5 % over the whole family of tests."""
    adjusted = [0.0] * len(p_values)
    worst = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = worst
    return adjusted


def minimal_detectable_difference(
    std: float, n: int, level: float = 0.95, power: float = POWER, paired: bool = True
) -> float | None:
    """The true mean that a t-test on `n` differences with deviation `std` finds with probability `power`.

    `paired` differences share their seed; others are of two independent samples of `n` each (n - 1 and 2n - 2 degrees
    of freedom). Exact (noncentral t), which matters here: at n = 3 the normal approximation gives half of it. None when
    n < 2.
    """
    if n < 2:
        return None
    return _detectable(std / math.sqrt(n), n - 1 if paired else 2 * (n - 1), level, power)


def _detectable(error: float, freedom: int, level: float, power: float) -> float:
    from scipy.special import nctdtrinc, stdtrit

    return float(nctdtrinc(freedom, 1 - power, stdtrit(freedom, (1 + level) / 2))) * error


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


def spans(seeds: Iterable[int]) -> str:
    """In ascending order, three and more in a row as `420 to 439`."""
    runs: list[list[int]] = []
    for seed in sorted(seeds):
        if runs and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    said = (f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
    return ", ".join(said)
