"""How much longer the baseline has to train to end as low as an arm, and what both lose or win in equal time.

The baseline's loss is known where it has trained to the end of its schedule: at its own length and at the sweep's
`lengths`. Between two of these it is taken for a straight line in the logarithm of the tokens; beyond them nothing is
said. Where the arm and the baseline are equal is found by a paired t-test at every length: the interval holds the
lengths at which it finds no difference (Fieller 1954), and is open where it reaches an end.

Shape suffixes: S seeds, X lengths.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moepp.reports.results import SweepResults
from moepp.statistics.seeds import Estimate, mean_interval

GRID = 2000  # lengths between the shortest and the longest at which the test is made


@dataclass(frozen=True)
class Crossing:
    """A number of lengths of the baseline. `value` is None where no length within those trained is equal on average;
    `low` and `high` are None where the interval is open there, or there is one seed. `beyond` is `> ` or `< ` where
    even the longest or the shortest differs beyond noise, and `value` is then that length: a bound (97.5 %).
    """

    value: float | None
    low: float | None
    high: float | None
    beyond: str = ""

    def __str__(self) -> str:
        return "–" if self.value is None else f"{self.beyond}{self.value:.2f}"

    @property
    def interval(self) -> str:
        if self.beyond or (self.low is None and self.high is None):
            return "–"
        return " to ".join("open" if end is None else f"{end:.2f}" for end in (self.low, self.high))

    def times(self, factor: float) -> "Crossing":
        scaled = (None if end is None else end * factor for end in (self.value, self.low, self.high))
        return Crossing(*scaled, self.beyond)


@dataclass(frozen=True)
class EffectiveSpeedup:
    """Of an arm against the baseline over `n` paired seeds; above 1 the arm is ahead.

    `tokens`: those of the baseline over those of the arm at equal loss. `time`: the same of training time, None where
    the two were not timed together. `seconds`: the arm's training time over the baseline's at its own length.
    `at_equal_time`: the arm's loss minus the baseline's when that has trained for as long; None where that length lies
    beyond those trained.
    """

    n: int
    tokens: Crossing
    speed: float | None  # training tokens per second, timed together, arm over baseline
    seconds: float | None
    at_equal_time: Estimate | None

    @property
    def time(self) -> Crossing | None:
        return None if self.speed is None else self.tokens.times(self.speed)


def effective_speedup(results: SweepResults, arm: str, metric: str = "val_loss") -> EffectiveSpeedup | None:
    """Over the seeds that the arm shares with the baseline at all its lengths; None where the sweep has trained but one
    length of it, or no seed is shared.
    """
    losses = {
        length: {seed: loss for seed, run in runs.items() if (loss := run.value(metric)) is not None}
        for length, runs in results.at_lengths(results.baseline).items()
    }
    losses, ours = {length: found for length, found in losses.items() if found}, results.by_seed(arm, metric)
    seeds = sorted(set(ours).intersection(*losses.values()))
    if arm == results.baseline or len(losses) < 2 or not seeds:
        return None
    base_SX = np.array([[losses[length][seed] for length in losses] for seed in seeds])
    arm_S = np.array([ours[seed] for seed in seeds])
    lengths, tokens = list(losses), _tokens(results, arm)
    speed, base_speed = (results.training_speeds.get(name) for name in (arm, results.baseline))
    ratio = speed / base_speed if speed and base_speed else None
    seconds = ratio and tokens / ratio
    equal_time = seconds and loss_at_length(lengths, base_SX, arm_S, seconds)
    return EffectiveSpeedup(len(seeds), crossing(lengths, base_SX, arm_S).times(1 / tokens), ratio, seconds, equal_time)


def effective_speedups(results: SweepResults, arms: Sequence[str]) -> dict[str, EffectiveSpeedup]:
    return {arm: found for arm in arms if (found := effective_speedup(results, arm))}


def crossing(lengths: Sequence[float], base_SX: np.ndarray, arm_S: np.ndarray) -> Crossing:
    """Where the baseline, trained to these lengths (in rising order), ends as low as the arm."""
    at = np.unique(np.concatenate([np.geomspace(lengths[0], lengths[-1], GRID), lengths]))
    over_SX = arm_S[:, None] - _between(lengths, base_SX, at)
    mean_X, value = over_SX.mean(0), None
    if (reached := np.flatnonzero(mean_X >= 0)).size and (mean_X[0] <= 0):
        value = _root(at, mean_X, int(reached[0]))
    if len(arm_S) < 2:
        return Crossing(value, None, None)
    inside = np.flatnonzero(np.abs(mean_X) <= _half_width(over_SX))
    if not inside.size and value is None:
        return Crossing(lengths[-1], None, None, "> ") if mean_X[-1] < 0 else Crossing(lengths[0], None, None, "< ")
    low, high = (inside[0], inside[-1]) if inside.size else (0, len(at) - 1)
    return Crossing(value, float(at[low]) if low > 0 else None, float(at[high]) if high < len(at) - 1 else None)


def loss_at_length(lengths: Sequence[float], base_SX: np.ndarray, arm_S: np.ndarray, length: float) -> Estimate | None:
    """The arm's loss minus that of the baseline at `length`; None beyond the lengths trained."""
    if not lengths[0] <= length <= lengths[-1]:
        return None
    return mean_interval((arm_S - _between(lengths, base_SX, np.array([length]))[:, 0]).tolist())


def _between(lengths: Sequence[float], base_SX: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Losses of every seed at other lengths, [S, lengths asked for]."""
    return np.stack([np.interp(np.log(at), np.log(lengths), base_X) for base_X in base_SX])


def _root(at: np.ndarray, mean_X: np.ndarray, first: int) -> float:
    if first == 0:
        return float(at[0])
    share = mean_X[first - 1] / (mean_X[first - 1] - mean_X[first])
    return float(at[first - 1] * (at[first] / at[first - 1]) ** share)


def _half_width(values_SX: np.ndarray) -> np.ndarray:
    """Of the 95 % t-interval of each column's mean."""
    from scipy.special import stdtrit

    n = len(values_SX)
    return stdtrit(n - 1, 0.975) * values_SX.std(0, ddof=1) / math.sqrt(n)


def _tokens(results: SweepResults, arm: str) -> float:
    """Training tokens of the arm over the baseline's."""
    ours, base = (results.mean(name, "tokens") for name in (arm, results.baseline))
    return ours / base if ours and base else 1.0
