"""sweep.json: the trials that a sweep promises. Every runner and worker reads the same, whoever started first."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from moepp.config import flatten, load
from moepp.errors import UsageError
from moepp.records import UnreadableRecord, read_json, write_json
from moepp.sweeps.leases import exclusive
from moepp.sweeps.spec import Sweep, Trial


def read_plan(directory: Path) -> dict[str, Any] | None:
    """What sweep.json holds; None where no sweep has begun. Raises UsageError when it cannot be read."""
    try:
        return read_json(directory / "sweep.json")
    except UnreadableRecord:
        raise UsageError(f"{directory}/sweep.json is damaged; remove it, and the next run writes it again") from None


def promise(
    directory: Path,
    sweep: Sweep,
    scale: str,
    trials: Sequence[Trial],
    overrides: Sequence[str],
    search: Mapping[str, Any] | None = None,
) -> None:
    """Writes sweep.json, or adds what is new to it: seeds and arms may be added at any time, and none are taken away.

    `overrides` are those of the command, for reports to name. `search` says what a search goes through, and how many
    trials that makes. Raises UsageError when an arm of the sweep was begun with other settings, or the search with
    another space: its trials would not be comparable.
    """
    about = {"overrides": list(overrides), "file_seeds": sweep.chosen_seeds(scale), **(search or {})}
    known, plan = _merged(directory, sweep, scale, trials, about)
    if plan == known:
        return
    with exclusive(directory / "plan"):
        write_json(directory / "sweep.json", _merged(directory, sweep, scale, trials, about)[1])


def _merged(
    directory: Path, sweep: Sweep, scale: str, trials: Sequence[Trial], about: Mapping[str, Any]
) -> tuple[Any, Any]:
    known = read_plan(directory) or {"trials": []}
    if known["trials"] and known.get("search") != about.get("search"):
        raise UsageError(
            f"{directory} holds a search through another space or at other seeds, or no search; start afresh under"
            " another name or with runs=FOLDER, or remove that folder"
        )
    begun, arms = {trial["arm"] for trial in known["trials"]}, {trial.arm for trial in trials}
    if begun and arms and not begun & arms and "search" not in about:
        raise UsageError(
            f"{directory} holds another sweep of the same name ({known.get('question', 'with other arms')}); rename one"
            " of them, or keep them apart with runs=FOLDER"
        )
    promised = {(trial["arm"], trial["seed"]): trial for trial in known["trials"]}
    for trial in trials:
        path, key = trial.directory.name, (trial.arm, trial.seed)
        if key in promised and promised[key]["path"] != path:
            raise UsageError(_conflict(directory, trial, promised[key]["path"]))
        entry = {"arm": trial.arm, "seed": trial.seed, "path": path, "steps": trial.config.trainer.steps}
        group = {"group": trial.group} if trial.group else {}
        promised[key] = {**entry, **group, "point": trial.point} if trial.point else {**entry, **group}
    declared = {key: getattr(sweep, key) for key in ("name", "question", "paper", "baseline", "match", "objective")}
    declared |= {"pruner": pruner} if (pruner := sweep.pruner_at(scale)) else {}
    return known, {**declared, **about, "scale": scale, "trials": list(promised.values())}


def _conflict(directory: Path, trial: Trial, path: str) -> str:
    from moepp.training.settings import NOT_IDENTITY, RunConfig

    changed = []
    with suppress(UsageError):  # not started yet, or written by a version with other keys
        old, new = flatten(load(RunConfig, directory / path / "config.yaml")), flatten(trial.config)
        changed = [f"{key}: {old[key]} then, {new[key]} now" for key in new if old.get(key) != new[key]]
        changed = [change for change in changed if not change.startswith(NOT_IDENTITY)]
    return (
        f"{directory} holds this sweep with other settings of arm {trial.arm} ({'; '.join(changed[:3]) or path});"
        " start afresh under another name or with runs=FOLDER, or remove that folder"
    )
