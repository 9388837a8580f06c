"""The numbers of a report: arms against the baseline, effects, noise, unstable arms and the paper's order."""

import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import permutations
from typing import TypeVar

from moepp.errors import UsageError
from moepp.reports.paper import PaperScores
from moepp.reports.recipe import confounds
from moepp.reports.results import SweepResults
from moepp.statistics.seeds import (
    NO_ERROR,
    SIGNIFICANCE,
    Estimate,
    MedianInterval,
    SharedError,
    holm,
    mean_interval,
    median_interval,
    paired_difference,
)
from moepp.sweeps.spec import Contrast, Trend

OBJECTIVE = "val_loss"  # nats per token: continuous, so it decides; accuracy illustrates
SECOND = {  # measures beside it, with what they cost: nothing, for the first
    "online_loss": "training loss of the first epoch",
    "averaged_val_loss": "validation loss of the late weights' mean",
}
BUDGETS = {
    "total_params": "total parameters",
    "active_params": "activated parameters",
    "flops_per_token": "forward FLOPs per token",
    "tokens": "training tokens",
    "train_seconds": "seconds of training and validation",
}
EQUAL_WITHIN = 0.01  # relative

Losses = Mapping[str, Mapping[int, float]]  # arm -> seed -> validation loss
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class ContrastFamily:
    """The contrasts of a sweep with a primary one, whichever of its arms a report shows: the primary one is judged
    alone, the others after Holm's correction over all of them.
    """

    primary: Contrast
    secondary: tuple[Contrast, ...]

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(arm for contrast in (self.primary, *self.secondary) for arm in (*contrast.arms, *contrast.minus))


@dataclass(frozen=True)
class Design:
    """What is compared with the baseline: arms in the order of display, effects that take several of them together,
    and the paper's scores where there are any.
    """

    arms: tuple[str, ...]
    contrasts: Mapping[str, Contrast] = field(default_factory=dict)
    trend: Trend | None = None
    paper: PaperScores | None = None
    about: frozenset[str] = frozenset()  # keys that the arms are meant to differ in
    family: ContrastFamily | None = None  # without one, differences to the baseline are a family, and contrasts another


@dataclass(frozen=True)
class Difference:
    """A paired difference in validation loss. `p_holm` is corrected within its family, that of a primary contrast its
    own; None when one pair exists.

    `confounds` are keys of a recipe in which the sides differ although the sweep is not about them. Where an arm of it
    is unstable the t-interval is no guide, and `robust` stands beside it: the median over seeds,
    whose sign test gives the p.
    """

    estimate: Estimate
    by_seed: dict[int, float]
    robust: MedianInterval | None = None
    confounds: tuple[str, ...] = ()
    p_holm: float | None = None

    @property
    def p_alone(self) -> float | None:
        p = self.estimate.p_value
        return p if p is None or self.robust is None else self.robust.p_value

    @property
    def significant(self) -> bool:
        return self.p_holm is not None and self.p_holm < SIGNIFICANCE


@dataclass(frozen=True)
class NoiseFloor:
    """Of one arm: deviations over seeds, and the smallest true difference to the baseline that as many pairs would show
    with 80 % probability. All None where there are too few seeds.
    """

    std: float | None
    difference_std: float | None = None  # of differences to the baseline, paired by seed
    detectable: float | None = None  # judged alone, at 5 %
    detectable_corrected: float | None = None  # as the smallest p-value of its family


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
    second: dict[str, dict[str, Difference]]  # measure of `SECOND` -> arm -> arm minus baseline
    noise: dict[str, NoiseFloor]  # arm -> its own
    unstable: dict[str, str]  # arm -> why its seeds make no t-interval
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
    from moepp.reports.held_out import text_error  # these need numpy, for which listing experiments does not wait
    from moepp.statistics.stability import unstable_arms

    judged = dict.fromkeys([*arms, *(design.family.arms if design.family else ())])
    loss = {arm: results.by_seed(arm, OBJECTIVE) for arm in judged}
    against = {arm: Contrast([arm], [results.baseline]) for arm in arms if arm != results.baseline}
    unstable = unstable_arms({arm: list(by_seed.values()) for arm, by_seed in loss.items()})
    effects = partial(_differences, loss=loss, unstable=unstable, shared=partial(text_error, results))
    differences, contrasts = _families(design, against, effects)
    differences = _with_confounds(differences, against, design, results)
    tests = {arm: _tests(design, contrast) for arm, contrast in against.items()}
    return Comparison(
        design=replace(design, paper=paper),
        results=results,
        differences=differences,
        contrasts=_with_confounds(contrasts, design.contrasts, design, results),
        second={name: found for name in SECOND if (found := _second(results, against, unstable, name))},
        noise={arm: _noise(loss[arm], differences.get(arm), tests.get(arm) or len(differences)) for arm in arms},
        unstable={arm: why for arm, why in unstable.items() if arm in arms},
        ordering=_ordering(paper, effects) if paper else None,
        budgets={name: budget for name in BUDGETS if (budget := _budget(arms, results, name))},
    )


def _families(
    design: Design,
    against: Mapping[str, Contrast],
    effects: Callable[[Mapping[Name, Contrast]], dict[Name, Difference]],
) -> tuple[dict[str, Difference], dict[str, Difference]]:
    """Differences to the baseline, and contrasts: each with the one p that it has in all reports of its sweep."""
    shown = effects(against), effects(design.contrasts)
    if design.family is None:
        return shown
    p = {}
    for contrasts in ([design.family.primary], design.family.secondary):
        found = effects(dict(enumerate(contrasts)))
        p |= {_sides(contrasts[number]): difference.p_holm for number, difference in found.items()}
    named = against, design.contrasts
    return tuple(
        {name: replace(difference, p_holm=p[_sides(sides[name])]) for name, difference in found.items()}
        for found, sides in zip(shown, named, strict=True)
    )


def _sides(contrast: Contrast) -> tuple[frozenset[str], frozenset[str]]:
    return frozenset(contrast.arms), frozenset(contrast.minus)


def _tests(design: Design, contrast: Contrast) -> int | None:
    """Over how many a contrast is corrected; None where that is up to the runs there are."""
    if design.family is None:
        return None
    return 1 if _sides(contrast) == _sides(design.family.primary) else len(design.family.secondary)


def _with_confounds(
    found: Mapping[str, Difference], contrasts: Mapping[str, Contrast], design: Design, results: SweepResults
) -> dict[str, Difference]:
    marked = {}
    for name, difference in found.items():
        arms, minus = contrasts[name].arms, contrasts[name].minus
        marked[name] = replace(difference, confounds=confounds(results, arms, minus, design.about))
    return marked


def _second(
    results: SweepResults, against: Mapping[str, Contrast], unstable: Mapping[str, str], measure: str
) -> dict[str, Difference]:
    return _differences(against, {arm: results.by_seed(arm, measure) for arm in results.runs}, unstable)


def _differences(
    contrasts: Mapping[Name, Contrast],
    loss: Losses,
    unstable: Mapping[str, str],
    shared: Callable[[Contrast, Sequence[int]], SharedError] = lambda *_: NO_ERROR,
) -> dict[Name, Difference]:
    """Each contrast over the seeds that all its arms finished, Holm-corrected as one family; no seed, no entry.

    `shared` is the error of what all seeds are judged on.
    """
    found = {}
    for name, contrast in contrasts.items():
        arms = (*contrast.arms, *contrast.minus)
        seeds = sorted(set.intersection(*(set(loss.get(arm, ())) for arm in arms)))
        on, off = (
            [statistics.fmean(loss[arm][seed] for arm in side) for seed in seeds]
            for side in (contrast.arms, contrast.minus)
        )
        if seeds:
            by_seed = {seed: a - b for seed, a, b in zip(seeds, on, off, strict=True)}
            robust = median_interval(list(by_seed.values())) if set(arms) & unstable.keys() else None
            estimate = paired_difference(on, off, shared=shared(contrast, seeds))
            found[name] = Difference(estimate, by_seed, robust)
    tested = [name for name, difference in found.items() if difference.p_alone is not None]
    for name, p in zip(tested, holm([found[name].p_alone for name in tested]), strict=True):
        found[name] = replace(found[name], p_holm=p)
    return found


def _noise(by_seed: Mapping[int, float], difference: Difference | None, tests: int) -> NoiseFloor:
    std = mean_interval(list(by_seed.values())).std if by_seed else None
    if difference is None or difference.estimate.std is None:
        return NoiseFloor(std)
    estimate = difference.estimate
    levels = (1 - SIGNIFICANCE / count for count in (1, tests))
    return NoiseFloor(std, estimate.std, *(estimate.detectable_difference(level) for level in levels))


def _ordering(paper: PaperScores, effects: Callable[[Mapping[Name, Contrast]], dict[Name, Difference]]) -> Ordering:
    average = {arm: row.average for arm, row in paper.rows.items()}
    other_tasks = {arm: paper.average_without_noisy_task(row) for arm, row in paper.rows.items()}
    ranked = {
        (better, worse): Contrast([better], [worse])
        for better, worse in permutations(average, 2)
        if average[better] > average[worse]
    }
    differences = effects(ranked)
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
