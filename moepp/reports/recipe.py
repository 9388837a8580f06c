"""What an arm is trained with beside what its sweep is about: capacity, balance weight, warm-up, rate and their like.

Two arms that differ in one of these differ for two reasons, and nothing in their losses tells which.
"""

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from itertools import combinations
from typing import Any

from moepp.reports.results import Run, SweepResults
from moepp.statistics.tables import NONE
from moepp.sweeps.spec import Sweep

RECIPE = {  # shown of every arm
    "model.capacity_factor": "capacity factor",
    "model.balance.beta": "balance weight",
    "optim.warmup_steps": "warm-up, steps",
    "optim.lr": "rate",
}
OF_ROUTING = ("model.capacity_factor", "model.balance.beta")
ALSO = (
    "data.batch_size",
    "data.seq_len",
    "trainer.accumulate",
    "trainer.precision",
    "model.init_std",
)  # and all of optim


def recipe_of(results: SweepResults, arm: str) -> dict[str, str]:
    """Key -> value of what `RECIPE` names and the records tell."""
    run = _first(results, arm)
    if run is None:
        return {}
    return {key: _value(run, key) for key in RECIPE if key in run.config}


def confounds(
    results: SweepResults, arms: Iterable[str], minus: Iterable[str], about: Container[str] = ()
) -> tuple[str, ...]:
    """The keys of a recipe in which one side of a contrast differs from the other, but for those that it is `about`."""
    on, off = ([run.config for arm in side if (run := _first(results, arm))] for side in (arms, minus))
    keys = {key: None for config in (*on, *off) for key in config if _in_recipe(key)}
    settings = [{repr(config.get(key)) for config in side} for key in keys for side in (on, off)]
    pairs = zip(keys, settings[::2], settings[1::2], strict=True)
    return tuple(key for key, ours, theirs in pairs if on and off and ours != theirs and key not in about)


def keys_of_interest(sweep: Sweep) -> frozenset[str]:
    """What the sweep means to vary: what its figure runs over, what several arms name, and of a recipe only that in
    which arms differ that are the same otherwise. Methods that each have a rate of their own are not about rates.
    """
    named = [_overridden(changes) for changes in sweep.arms.values()]
    several = {key for key, count in Counter(key for keys in named for key in keys).items() if count > 1}
    meant = {key for key in several if not _in_recipe(key)}
    for ours, theirs in combinations(named, 2):
        differing = {key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)}
        meant |= differing if all(map(_in_recipe, differing)) else set()
    return frozenset(meant | ({sweep.trend.x} if sweep.trend else set()))


def _overridden(changes: Any) -> dict[str, str]:
    """Key -> value, as it is written."""
    from moepp.config import leaves

    if isinstance(changes, Mapping):
        return {key: str(value) for key, value in leaves(changes)}
    return {key: value for key, _, value in (change.partition("=") for change in changes)}


def _in_recipe(key: str) -> bool:
    return key in RECIPE or key in ALSO or key.startswith("optim.")


def _first(results: SweepResults, arm: str) -> Run | None:
    return next(iter(results.runs.get(arm, {}).values()), None)


def _value(run: Run, key: str) -> str:
    if key in OF_ROUTING and not run.experts:
        return NONE  # a dense model
    value = run.config[key]
    return "none" if value is None else f"{value:g}"
