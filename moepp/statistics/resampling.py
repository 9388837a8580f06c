"""Intervals and tests by resampling, for hundreds or thousands of examples. For a handful of seeds use statistics.py: a
bootstrap over five values covers far less than it says.

Everything is deterministic by `seed`. One seed resamples equal numbers of rows alike, so that statistics of the same
rows, computed in several calls, belong together.

Shape suffixes: N examples, M columns, D draws, G groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

DRAWS = 2000
BLOCK = 2**22  # random numbers held at a time

NumpySeed = int | Sequence[int]


@dataclass(frozen=True)
class Interval:
    """A value with its interval, which need not be symmetric."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def bootstrap_sums(values_NM: np.ndarray, draws: int = DRAWS, seed: NumpySeed = 0) -> np.ndarray:
    """Sums of every column over N rows drawn with replacement, [D, M]. Any statistic of means or of ratios of sums
    follows from them. Raises ValueError when there is no row.
    """
    rows = len(values_NM)
    if rows == 0:
        raise ValueError("cannot resample no examples")
    generator = np.random.default_rng(seed)
    sums_DM = np.empty((draws, values_NM.shape[1]))
    block = max(1, BLOCK // rows)
    for start in range(0, draws, block):
        size = min(block, draws - start)
        drawn = generator.integers(rows, size=(size, rows)) + rows * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * rows).reshape(size, rows)
        sums_DM[start : start + size] = counts @ values_NM
    return sums_DM


def shuffled_sums(values_NM: np.ndarray, sizes: Sequence[int], draws: int = DRAWS, seed: NumpySeed = 0) -> np.ndarray:
    """Sums of every column over groups of `sizes` rows when chance decides which row is in which group, [D, G, M]: what
    they would be if the groups did not differ.
    """
    if sum(sizes) != len(values_NM):
        raise ValueError(f"groups of {list(sizes)} rows do not make up {len(values_NM)} rows")
    generator = np.random.default_rng(seed)
    labels_N = np.repeat(np.arange(len(sizes)), sizes)
    sums_DGM = np.empty((draws, len(sizes), values_NM.shape[1]))
    block = max(1, BLOCK // len(labels_N))
    for start in range(0, draws, block):
        size = min(block, draws - start)
        shuffled = generator.permuted(np.tile(labels_N, (size, 1)), axis=1)
        for group in range(len(sizes)):
            sums_DGM[start : start + size, group] = (shuffled == group).astype(float) @ values_NM
    return sums_DGM


def percentile_interval(value: float, draws_D: np.ndarray, level: float = 0.95) -> Interval:
    """The interval that holds the middle `level` of the draws; draws that are not finite are left out."""
    finite = draws_D[np.isfinite(draws_D)]
    if not len(finite):
        return Interval(float(value), float("nan"), float("nan"))
    low, high = np.quantile(finite, ((1 - level) / 2, (1 + level) / 2))
    return Interval(float(value), float(low), float(high))


def chance(observed: float, null_D: np.ndarray, two_sided: bool = True) -> float:
    """p of a statistic against draws of it under the null hypothesis; never 0, for the observed one is a draw too.

    One-sided it counts the draws at least as large. Ties within rounding count as such.
    """
    size, null_D = (abs(observed), abs(null_D)) if two_sided else (observed, null_D)
    return float((1 + np.count_nonzero(null_D >= size - 1e-12 * max(1.0, abs(size)))) / (1 + len(null_D)))


def correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's r along the last axis; NaN where one side does not vary."""
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))


def rank_correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's rho along the last axis."""
    return correlation(rankdata(x, axis=-1), rankdata(y, axis=-1))


def moments(x_N: np.ndarray, y_N: np.ndarray) -> np.ndarray:
    """What `correlation_of_moments` needs of every example, [N, 6]: sums of it over any examples give their r."""
    return np.stack([x_N, y_N, x_N * x_N, y_N * y_N, x_N * y_N, np.ones_like(x_N)], axis=1)


def correlation_of_moments(sums: np.ndarray) -> np.ndarray:
    """Pearson's r of the examples whose `moments` were summed, [..., 6] -> [...]."""
    x, y, xx, yy, xy = (sums[..., i] / sums[..., 5] for i in range(5))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (xy - x * y) / np.sqrt((xx - x**2) * (yy - y**2))


def bootstrap_chance(draws_D: np.ndarray, bound: float = 0.0) -> float:
    """Two-sided p that a statistic equals `bound`, read off its bootstrap draws; for where nothing can be exchanged."""
    finite = draws_D[np.isfinite(draws_D)]
    beyond = min(np.count_nonzero(finite <= bound), np.count_nonzero(finite >= bound))
    return float(min(1.0, 2 * (1 + beyond) / (1 + len(finite))))
