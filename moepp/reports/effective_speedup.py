"""The one number that joins quality and speed: how much longer the baseline trains to reach an arm's final loss.

The baseline's loss between two validations is interpolated linearly. It stems from a schedule that has not decayed yet:
a baseline trained for just that long would be better, so what favours an arm here is at most as much in truth.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from moepp.reports.results import SweepResults
from moepp.statistics.seeds import Estimate, mean_interval

AT_LEAST, AT_MOST = "≥ ", "≤ "


@dataclass(frozen=True)
class EffectiveSpeedup:
    """Tokens and time of the baseline over those of the arm, at the arm's final loss; above 1 the arm is ahead.

    `log_tokens` estimates the logarithm of the ratio of tokens over paired seeds. `bound` is `≥ ` where in some seed
    the baseline ends above the arm's loss, which counts as reached at its end, `≤ ` where in some it is below already
    at its first validation, and both where both happen.
    """

    log_tokens: Estimate
    bound: str
    censored: int  # seeds
    speed: float | None  # training tokens per second, timed together, arm over baseline; None without both

    @property
    def tokens(self) -> float:
        return math.exp(self.log_tokens.mean)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of `tokens`; None with one seed or where a seed is censored."""
        if self.censored or self.log_tokens.half_width is None:
            return None
        return math.exp(self.log_tokens.low), math.exp(self.log_tokens.high)

    @property
    def time(self) -> float | None:
        return None if self.speed is None else self.tokens * self.speed


def effective_speedup(results: SweepResults, arm: str) -> EffectiveSpeedup | None:
    """Over the seeds that the arm shares with the baseline; None where these have no validation curves."""
    base, ours = results.runs.get(results.baseline, {}), results.runs.get(arm, {})
    logs, bounds, censored = [], set(), 0
    for seed in sorted(set(base) & set(ours)):
        curve, target = base[seed].curve, ours[seed].curve
        if not curve or not target:
            continue
        tokens, bound = tokens_to_reach(curve, target[-1][1])
        logs.append(math.log(tokens / target[-1][0]))
        bounds.add(bound)
        censored += bool(bound)
    if not logs:
        return None
    speed, base_speed = (results.training_speeds.get(name) for name in (arm, results.baseline))
    ratio = speed / base_speed if speed and base_speed else None
    return EffectiveSpeedup(mean_interval(logs), "".join(sorted(bounds)), censored, ratio)


def tokens_to_reach(curve: Sequence[tuple[float, float]], loss: float) -> tuple[float, str]:
    """Tokens at which `curve`, pairs of tokens and loss in order, first is as low as `loss`, and the bound it gives:
    the last tokens as `≥ ` where it never is, the first as `≤ ` where it begins there.
    """
    if curve[0][1] <= loss:
        return curve[0][0], AT_MOST if curve[0][1] < loss else ""
    for (before, high), (after, low) in pairwise(curve):
        if low <= loss:
            return before + (after - before) * (high - loss) / (high - low), ""
    return curve[-1][0], AT_LEAST
