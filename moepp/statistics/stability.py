"""Which arms do not train stably: their seeds scatter far more than the others', or fall into two groups.

Student's t holds for neither. With a fifth of the runs stuck its 95 % interval of three seeds covers the mean in 58 %.
"""

import statistics
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np

from moepp.statistics.seeds import SIGNIFICANCE, holm

LEAST = 3  # seeds, fewer have no shape
DRAWS = 20_000


def unstable_arms(losses: Mapping[str, Sequence[float]], level: float = SIGNIFICANCE) -> dict[str, str]:
    """Arm -> what is wrong with it. Where nothing is, one table in twenty names an arm: half of `level` goes to either
    test, and each is corrected over the arms.
    """
    known = {arm: values for arm, values in losses.items() if len(values) >= LEAST and len(set(values)) > 1}
    found: dict[str, list[str]] = {}
    for arm, ratio in _scattered(known, level / 2).items():
        found.setdefault(arm, []).append(f"scatters {ratio:.1f} times as far as the other arms")
    for arm, (low, high) in _split(known, level / 2).items():
        found.setdefault(arm, []).append(
            f"falls into two groups, {len(low)} near {statistics.fmean(low):.3f} and {len(high)} near"
            f" {statistics.fmean(high):.3f}"
        )
    return {arm: " and ".join(found[arm]) for arm in losses if arm in found}


def _scattered(losses: Mapping[str, Sequence[float]], level: float) -> dict[str, float]:
    """Arm -> its standard deviation over that of the others, by an F-test against the others' pooled variance. The one
    that scatters most is judged first and then left out, so that it hides no other.
    """
    from scipy.special import fdtrc

    variance = {arm: statistics.variance(values) for arm, values in losses.items()}
    freedom = {arm: len(values) - 1 for arm, values in losses.items()}
    rest, found = sorted(variance, key=lambda arm: variance[arm]), {}
    for tests in range(len(rest), 1, -1):
        arm, total = rest.pop(), sum(freedom[other] for other in rest)
        pooled = sum(freedom[other] * variance[other] for other in rest) / total
        if fdtrc(freedom[arm], total, variance[arm] / pooled) >= level / tests:
            break
        found[arm] = (variance[arm] / pooled) ** 0.5
    return found


def _split(losses: Mapping[str, Sequence[float]], level: float) -> dict[str, tuple[list[float], list[float]]]:
    """Arm -> its two groups, where these are tighter than those of normal values would be."""
    best = {arm: best_split(values) for arm, values in losses.items()}
    null = {arm: _null(len(values)) for arm, values in losses.items()}
    p = holm([(1 + np.searchsorted(null[arm], best[arm][0], side="right")) / (1 + DRAWS) for arm in best])
    groups = {}
    for (arm, (_, size)), chance in zip(best.items(), p, strict=True):
        if chance < level:
            ordered = sorted(losses[arm])
            groups[arm] = ordered[:size], ordered[size:]
    return groups


def best_split(values: Sequence[float]) -> tuple[float, int]:
    """The least share of the sum of squares that remains within two groups, and the size of the lower one."""
    within, size = _splits(np.sort(values)[None])
    return float(within[0]), int(size[0])


def _splits(ordered_DN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    count = ordered_DN.shape[1]
    centred_DN = ordered_DN - ordered_DN.mean(1, keepdims=True)
    low = np.arange(1, count)
    sums = centred_DN.cumsum(1)[:, :-1]  # of the lower group; the upper one has its negative
    between = sums**2 * (1 / low + 1 / (count - low))
    best = between.argmax(1)
    return 1 - between.max(1) / (centred_DN**2).sum(1), best + 1


@cache
def _null(count: int) -> np.ndarray:
    """The share within two groups of so many normal values, drawn often and sorted."""
    drawn = np.random.default_rng(count).normal(size=(DRAWS, count))
    return np.sort(_splits(np.sort(drawn, axis=1))[0])
