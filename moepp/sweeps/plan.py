"""sweep.json: the trials that a sweep promises. Every runner and worker reads the same, whoever started first.

The newest call says what is wanted. Trials of an arm or a seed that it leaves out stay listed, marked `left_out`, and
nobody waits for them.
"""

from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

from moepp.config import flatten, load
from moepp.errors import UsageError
from moepp.records import UnreadableRecord, read_json, write_json
from moepp.sweeps.leases import exclusive
from moepp.sweeps.spec import Sweep, Trial

ABOUT = ("name", "question", "paper", "baseline", "match", "objective", "retries")  # what the sweep file says


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
    """Writes sweep.json, or adds what is new to it: seeds and arms may be added or left out at any time.

    `overrides` are those of the command, for reports to name. `search` says what a search goes through, and how many
    trials that makes. Raises UsageError when the directory holds another sweep of the same name, when an arm of the
    sweep was begun with other settings, or the search with another space: its trials would not be comparable.
    """
    called = {"overrides": list(overrides), "file_seeds": sweep.chosen_seeds(scale)}
    known, plan = _merged(directory, sweep, scale, trials, called, search or {})
    if plan == known:
        return
    try:
        with exclusive(directory / "plan"):
            write_json(directory / "sweep.json", _merged(directory, sweep, scale, trials, called, search or {})[1])
    except OSError:  # a part of a finished sweep can be had from a store that must not be written
        if not known["trials"] or len(plan["trials"]) > len(known["trials"]):
            raise


def _merged(
    directory: Path,
    sweep: Sweep,
    scale: str,
    trials: Sequence[Trial],
    called: Mapping[str, Any],
    search: Mapping[str, Any],
) -> tuple[Any, Any]:
    known = read_plan(directory) or {"trials": []}
    if known["trials"] and known.get("search") != search.get("search"):
        raise UsageError(
            f"{directory} holds a search through another space or at other seeds, or no search; start afresh under"
            " another name or with runs=FOLDER, or remove that folder"
        )
    if known["trials"]:
        begun = {trial["group" if search else "arm"] for trial in known["trials"]}
        _refuse_another_sweep(directory, known, sweep, begun)
    promised = {(trial["arm"], trial["seed"]): trial for trial in known["trials"]}
    for trial in trials:
        path, key = trial.directory.name, (trial.arm, trial.seed)
        if key in promised and promised[key]["path"] != path:
            raise UsageError(_conflict(directory, trial, promised[key]["path"]))
        entry = {"arm": trial.arm, "seed": trial.seed, "path": path, "steps": trial.config.trainer.steps}
        group = {"group": trial.group} if trial.group else {}
        promised[key] = {**entry, **group, "point": trial.point} if trial.point else {**entry, **group}
    if not (search and trials):  # a search promises no trial when it begins, and then one proposal after another
        asked = {(trial.arm, trial.seed) for trial in trials}
        for key, entry in promised.items():
            left_out = entry["group"] not in sweep.arms if search else key not in asked
            kept = {name: value for name, value in entry.items() if name != "left_out"}
            promised[key] = {**kept, "left_out": True} if left_out else kept
    about = {key: getattr(sweep, key) for key in ABOUT}
    about |= {"pruner": pruner} if (pruner := sweep.pruner_at(scale)) else {}
    return known, {**about, **called, **search, "scale": scale, "trials": list(promised.values())}


def _refuse_another_sweep(directory: Path, known: Mapping[str, Any], sweep: Sweep, begun: Set[str]) -> None:
    """Two files may use one name, and most sweeps share an arm or two, so an equal arm does not make them one sweep. A
    question may be worded anew as long as no arm is renamed with it. `begun` are the arms that are known.
    """
    arms, question = set(sweep.arms), known.get("question", sweep.question)
    pairs = {key: (known.get(key, getattr(sweep, key)), getattr(sweep, key)) for key in ("baseline", "match")}
    differences = [f"{key}: {old}, not {new}" for key, (old, new) in pairs.items() if old != new]
    if not begun & arms or (question != sweep.question and begun - arms and arms - begun):
        differences.insert(0, question)
    if differences:
        raise UsageError(
            f"{directory} holds another sweep of the same name ({differences[0]}); rename one of them, or keep them"
            " apart with runs=FOLDER"
        )


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
