"""The numbers of a report: arms against the baseline, effects, the noise floor and the paper's order."""

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import TypeVar

from moepp.errors import UsageError
from moepp.reports.paper import PaperScores
from moepp.reports.results import SweepResults
from moepp.statistics.seeds import (
    POWER,
    SIGNIFICANCE,
    Estimate,
    holm,
    mean_interval,
    minimal_detectable_difference,
    paired_difference,
)
from moepp.sweeps.spec import Contrast, Trend

OBJECTIVE = "val_loss"  # nats per token: continuous, so it decides; accuracy illustrates
BUDGETS = {
    "total_params": "total parameters",
    "active_params": "activated parameters",
    "flops_per_token": "forward FLOPs per token",
    "tokens": "training tokens",
    "train_seconds": "seconds of training",
}
EQUAL_WITHIN = 0.01  # relative

Losses = Mapping[str, Mapping[int, float]]  # arm -> seed -> validation loss
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Design:
    """What is compared with the baseline: arms in the order of display, effects that take several of them together,
    and the paper's scores where there are any.
    """

    arms: tuple[str, ...]
    contrasts: Mapping[str, Contrast] = field(default_factory=dict)
    trend: Trend | None = None
    paper: PaperScores | None = None


@dataclass(frozen=True)
class Difference:
    """A paired difference in validation loss. `p_holm` is corrected within its family; None when one pair exists."""

    estimate: Estimate
    by_seed: dict[int, float]
    p_holm: float | None = None

    @property
    def significant(self) -> bool:
        return self.p_holm is not None and self.p_holm < SIGNIFICANCE


@dataclass(frozen=True)
class NoiseFloor:
    """Deviations over seeds, and the smallest true difference `pairs` pairs would show with 80 % probability."""

    baseline_std: float | None
    difference_std: float | None  # of paired differences, pooled over arms
    pairs: int  # of the arm that has fewest, of those with at least two
    detectable: float | None  # judged alone, at 5 %
    detectable_corrected: float | None  # as the smallest p-value of the whole family


@dataclass(frozen=True)
class Ordering:
    """Every pair of arms the paper ranks, as (its better arm, its worse arm)."""

    ranked: int  # pairs; the paper's ties are left out
    agreeing: int  # pairs our means put the same way, noise ignored
    confirmed: tuple[tuple[str, str], ...]  # separated beyond noise, in the paper's direction
    contradicted: tuple[tuple[str, str], ...]  # separated beyond noise, against it
    kept: int  # pairs that the paper's own scores rank the same way without the noisy task


@dataclass(frozen=True)
class BudgetRange:
    """One budget over all arms; `spread` is max / min - 1."""

    name: str
    low: tuple[str, float]
    high: tuple[str, float]
    spread: float

    @property
    def equal(self) -> bool:
        return self.spread <= EQUAL_WITHIN


@dataclass(frozen=True)
class Comparison:
    design: Design
    results: SweepResults
    differences: dict[str, Difference]  # arm -> arm minus baseline
    contrasts: dict[str, Difference]
    noise: NoiseFloor
    ordering: Ordering | None  # None where there are no paper's numbers
    budgets: dict[str, BudgetRange]


def compare(design: Design, results: SweepResults) -> Comparison:
    """Beside the paper's numbers of the runs' size, where it has some. Raises UsageError when the sweep's baseline is
    none of the arms, or no arm has a finished run.
    """
    arms, paper = design.arms, design.paper and design.paper.at_size(results.size)
    if results.baseline not in arms:
        raise UsageError(
            f"sweep {results.name} has baseline '{results.baseline}', which is none of the arms {', '.join(arms)}"
        )
    if not any(arm in results.runs for arm in arms):
        raise UsageError(f"sweep {results.name} has no finished run of the arms {', '.join(arms)}; run it first")
    loss = {arm: results.by_seed(arm, OBJECTIVE) for arm in arms}
    against = {arm: Contrast([arm], [results.baseline]) for arm in arms if arm != results.baseline}
    differences = _differences(against, loss)
    return Comparison(
        design=replace(design, paper=paper),
        results=results,
        differences=differences,
        contrasts=_differences(design.contrasts, loss),
        noise=_noise(list(loss[results.baseline].values()), list(differences.values())),
        ordering=_ordering(paper, loss) if paper else None,
        budgets={name: budget for name in BUDGETS if (budget := _budget(arms, results, name))},
    )


def _differences(contrasts: Mapping[Name, Contrast], loss: Losses) -> dict[Name, Difference]:
    """Each contrast over the seeds that all its arms finished, Holm-corrected as one family; no seed, no entry."""
    found = {}
    for name, contrast in contrasts.items():
        seeds = sorted(set.intersection(*(set(loss[arm]) for arm in (*contrast.arms, *contrast.minus))))
        on, off = (
            [statistics.fmean(loss[arm][seed] for arm in side) for seed in seeds]
            for side in (contrast.arms, contrast.minus)
        )
        if seeds:
            by_seed = {seed: a - b for seed, a, b in zip(seeds, on, off, strict=True)}
            found[name] = Difference(paired_difference(on, off), by_seed)
    tested = [name for name, difference in found.items() if difference.estimate.p_value is not None]
    for name, p in zip(tested, holm([found[name].estimate.p_value for name in tested]), strict=True):
        found[name] = replace(found[name], p_holm=p)
    return found


def _noise(baseline: Sequence[float], differences: Sequence[Difference]) -> NoiseFloor:
    baseline_std = mean_interval(baseline).std if baseline else None
    estimates = [d.estimate for d in differences if d.estimate.std is not None]
    if not estimates:
        return NoiseFloor(baseline_std, None, 0, None, None)
    std = math.sqrt(statistics.fmean(estimate.std**2 for estimate in estimates))
    pairs = min(estimate.n for estimate in estimates)
    alone, corrected = (
        minimal_detectable_difference(std, pairs, 1 - SIGNIFICANCE / tests, POWER) for tests in (1, len(estimates))
    )
    return NoiseFloor(baseline_std, std, pairs, alone, corrected)


def _ordering(paper: PaperScores, loss: Losses) -> Ordering:
    average = {arm: row.average for arm, row in paper.rows.items()}
    other_tasks = {arm: paper.average_without_noisy_task(row) for arm, row in paper.rows.items()}
    ranked = {
        (better, worse): Contrast([better], [worse])
        for better, worse in permutations(average, 2)
        if average[better] > average[worse]
    }
    differences = _differences(ranked, loss)
    return Ordering(
        ranked=len(differences),
        agreeing=sum(d.estimate.mean < 0 for d in differences.values()),
        confirmed=tuple(pair for pair, d in differences.items() if d.significant and d.estimate.mean < 0),
        contradicted=tuple(pair for pair, d in differences.items() if d.significant and d.estimate.mean > 0),
        kept=sum(other_tasks[better] > other_tasks[worse] for better, worse in differences),
    )


def _budget(arms: Sequence[str], results: SweepResults, name: str) -> BudgetRange | None:
    means = {arm: mean for arm in arms if (mean := results.mean(arm, name))}
    if not means:
        return None
    low, high = min(means.items(), key=lambda item: item[1]), max(means.items(), key=lambda item: item[1])
    return BudgetRange(BUDGETS[name], low, high, high[1] / low[1] - 1)
