"""Sweep files, read: what is wrong with one is said before anything is composed from it."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moepp.config import load
from moepp.errors import UsageError, at, refused_at
from moepp.names import check as check_names
from moepp.names import check_label, unknown_name
from moepp.plugins import listed
from moepp.ranges import LONGEST, whole_range
from moepp.shipped import SWEEPS, YAML, first_yaml, names, overlaid
from moepp.sweeps import pruning
from moepp.sweeps.space import expand, search_space
from moepp.sweeps.spec import Primary, Sweep


def read_sweep(name_or_path: str) -> Sweep:
    """The sweep of that name in ./sweeps or among the shipped ones, or in a file of your own (`*.yaml`, `*.yml`).

    Raises UsageError in one line.
    """
    path, folders = Path(name_or_path), overlaid(SWEEPS)
    if path.suffix not in YAML:
        path = first_yaml(folders, name_or_path)
        if path is None:
            raise UsageError(unknown_name("sweep", name_or_path, names(folders)))
    with at(str(path)):
        return _read(path)


def _read(path: Path) -> Sweep:
    sweep = load(Sweep, path)
    if sweep.file:
        raise UsageError("unknown key file")
    sweep.file = str(path)
    for key, owner in {"": sweep, **{f"scales.{name}.": scale for name, scale in sweep.scales.items()}}.items():
        owner.seeds = owner.seeds and _seed_list(path, f"{key}seeds", owner.seeds)
    sweep.plugins = [_beside(path, plugin) for plugin in listed(sweep.plugins)]
    if sweep.pruner and not sweep.space:
        raise UsageError(f"{path}: pruner needs a space; named arms are there to be compared, and run to their end")
    for pruner in (sweep.pruner, *(scale.pruner or {} for scale in sweep.scales.values())):
        pruning.parse(pruner)
    if sweep.space:
        points = expand(sweep.space)
        if both := sweep.arms.keys() & points.keys():
            raise UsageError(f"{path}: arm {min(both)} is also a point of the space")
        sweep.arms |= points
    for key in ("name", "question", "scales", "arms", "baseline", "seeds"):
        if not getattr(sweep, key):
            raise UsageError(f"{path}: {key} is missing")
    _check_names(path, {"name": [sweep.name], "scales": sweep.scales, "arms": sweep.arms})
    if sweep.baseline not in sweep.arms:
        raise UsageError(f"{path}: {unknown_name('baseline', sweep.baseline, sweep.arms)}")
    search = search_space(sweep.space)
    for key, axis in search.axes.items() if search else ():
        if unknown := set(axis.arms) - set(sweep.arms):
            raise UsageError(f"{path}: space.tpe: {key}: {unknown_name('arm', min(unknown), sweep.arms)}")
    sweep.arms = {arm: _changes(arm, changes) for arm, changes in sweep.arms.items()}
    _refuse_equal_names(path, sweep.arms)
    _check_lengths(path, sweep, searched=search is not None)
    if search is None:
        _refuse_words_of_a_search(path, sweep)
    _check_report_keys(path, sweep, searched=search is not None)
    for name, scale in sweep.scales.items():
        _check_scale_arms(f"{path}: scales: {name}: arms", sweep, scale.arms, searched=search is not None)
    return sweep


def _check_names(path: Path, named: Mapping[str, Iterable[str]]) -> None:
    for key, chosen in named.items():
        with refused_at(path):
            check_names(key, chosen)


def _check_lengths(path: Path, sweep: Sweep, searched: bool) -> None:
    if searched and (sweep.lengths or any(scale.lengths for scale in sweep.scales.values())):
        raise UsageError(f"{path}: lengths={sweep.lengths} are of named arms; a search has none to train for longer")
    if unknown := [arm for arm in sweep.lengthened if arm not in sweep.arms]:
        raise UsageError(f"{path}: lengthened: {unknown_name('arm', unknown[0], sweep.arms)}")
    if sweep.lengthened and not (sweep.lengths or any(scale.lengths for scale in sweep.scales.values())):
        raise UsageError(f"{path}: lengthened={sweep.lengthened} needs lengths, to which these arms are trained")


def _refuse_words_of_a_search(path: Path, sweep: Sweep) -> None:
    proposals = {f"scales.{name}.proposals": scale.proposals for name, scale in sweep.scales.items()}
    for key, value in {"storage": sweep.storage, **proposals}.items():
        if value:
            raise UsageError(f"{path}: {key}={value} is of a search: leave it out, or write the space as space.tpe")


def _seed_list(path: Path, key: str, seeds: Any) -> list[int]:
    if isinstance(seeds, str):
        numbers = whole_range(seeds)
        found = list(numbers) if numbers else None
    else:
        found = seeds if isinstance(seeds, list) and all(type(s) is int and s >= 0 for s in seeds) else None
    if found is None:
        raise UsageError(
            f"{path}: {key}={seeds} must be a list of whole numbers or a range of at most {LONGEST:,}, such as 0..19"
        )
    return found


def _check_scale_arms(key: str, sweep: Sweep, arms: Sequence[str], searched: bool) -> None:
    if arms and searched:
        raise UsageError(f"{key}: a search goes through all of its arms")
    if unknown := [arm for arm in arms if arm not in sweep.arms]:
        raise UsageError(f"{key}: {unknown_name('arm', unknown[0], sweep.arms)}")
    primary = sweep.contrasts.get(sweep.primary.contrast) if sweep.primary else None
    needed = {sweep.baseline, *(primary.arms + primary.minus if primary else ())}
    needed |= {sweep.primary.contrast} if sweep.primary and not primary else set()
    if arms and (left_out := sorted(needed - set(arms))):
        raise UsageError(f"{key}: {left_out[0]} is missing; the baseline and the primary contrast's arms must stay")


def _beside(path: Path, plugin: str) -> str:
    file = path.parent / plugin
    return str(file) if plugin.endswith(".py") and file.is_file() else plugin


def _check_report_keys(path: Path, sweep: Sweep, searched: bool) -> None:
    named = {f"contrasts: {name}": [*sides.arms, *sides.minus] for name, sides in sweep.contrasts.items()}
    if sweep.trend:
        named |= {f"trend: {name}": arms for name, arms in sweep.trend.series.items()}
        if not sweep.trend.x or not sweep.trend.series:
            raise UsageError(f"{path}: trend needs x, a key of the config, and series, names with their arms")
    labels = {"contrasts": sweep.contrasts, "trend.series": sweep.trend.series if sweep.trend else ()}
    for key, text in ((key, text) for key, texts in labels.items() for text in texts):
        with refused_at(path):
            check_label(key, text)
    repeated = {key: arms for key, arms in named.items() if len(set(arms)) < max(1, len(arms))}
    if sweep.primary:
        named["primary"] = _check_primary(path, sweep, sweep.primary)
    if searched and named:
        raise UsageError(f"{path}: {min(named)}: a search trains proposals, not its arms as they stand")
    for key, arms in named.items():
        if unknown := [arm for arm in arms if arm not in sweep.arms]:
            raise UsageError(f"{path}: {key}: {unknown_name('arm', unknown[0], sweep.arms)}")
    for name, sides in sweep.contrasts.items():
        if not sides.arms or not sides.minus or set(sides.arms) & set(sides.minus):
            raise UsageError(f"{path}: contrasts: {name}: needs arms, and others to take off as minus")
    for key, arms in repeated.items():
        raise UsageError(f"{path}: {key}: name arms, each of them once, not {', '.join(arms) or 'none'}")


def _check_primary(path: Path, sweep: Sweep, primary: Primary) -> list[str]:
    """Returns its arms."""
    choices = [*sweep.contrasts, *(arm for arm in sweep.arms if arm != sweep.baseline)]
    if primary.contrast not in choices:
        raise UsageError(f"{path}: primary: {unknown_name('contrast', primary.contrast, choices)}")
    return [] if primary.contrast in sweep.contrasts else [primary.contrast]


def _refuse_equal_names(path: Path, arms: Iterable[str]) -> None:
    from moepp.tracking.mlflow_store import stored_name

    seen: dict[str, str] = {}
    for arm in arms:
        if (other := seen.setdefault(stored_name(arm), arm)) != arm:
            raise UsageError(f"{path}: MLflow would call the figures of arms {other} and {arm} alike; rename one")


def _changes(arm: str, changes: Any) -> list[Any] | dict[str, Any]:
    """What an arm changes; lists in its list, as anchors make them, count as one."""
    if isinstance(changes, list):
        parts = [_changes(arm, part) if isinstance(part, list) else [part] for part in changes]
        changes = [change for part in parts for change in part]
    if not isinstance(changes, dict | list) or not all(isinstance(change, str | dict) for change in changes):
        raise UsageError(
            f"arm {arm} must be a list of overrides or a mapping shaped like the config, [] for none, not {changes}"
        )
    return changes
