"""sweep.json: the trials that a sweep promises. Every runner and worker reads the same, whoever started first.

The newest call says what is wanted. Trials of an arm or a seed that it leaves out stay listed, marked `left_out`, and
nobody waits for them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from moepp.config import flatten, lies_in
from moepp.errors import UsageError
from moepp.records import RunRecord, UnreadableRecord, read_json, write_json
from moepp.sweeps.leases import exclusive
from moepp.sweeps.spec import Sweep, Trial

ABOUT = (  # what the sweep file says
    "name", "question", "paper", "baseline", "match", "objective", "retries", "contrasts", "trend", "primary",
    "exclusions", "notes",
)  # fmt: skip
FROZEN_IN = ("data.digest", "init_weights")  # by a trial's start, which makes its tokens


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
    known, defaults = read_plan(directory) or {"trials": []}, _defaults()
    refuse_another_sweep(directory, known, sweep, search)
    promised = {(trial["arm"], trial["seed"]): trial for trial in known["trials"]}
    for trial in trials:
        path, key = trial.directory.name, (trial.arm, trial.seed)
        if key in promised:
            folder = directory / promised[key]["path"]
            _refuse_other_settings(folder, trial, path != folder.name, defaults != known.get("defaults"))
        entry = {"arm": trial.arm, "seed": trial.seed, "path": path, "steps": trial.config.trainer.steps}
        group = {"group": trial.group} if trial.group else {}
        group |= {"length": trial.length, "of_arm": trial.of_arm} if trial.lengthened else {}
        promised[key] = {**entry, **group, "point": trial.point} if trial.point else {**entry, **group}
    if not (search and trials):  # a search promises no trial when it begins, and then one proposal after another
        asked = {(trial.arm, trial.seed) for trial in trials}
        for key, entry in promised.items():
            left_out = entry["group"] not in sweep.arms if search else key not in asked
            kept = {name: value for name, value in entry.items() if name != "left_out"}
            promised[key] = {**kept, "left_out": True} if left_out else kept
    said = asdict(sweep)
    about = {key: said[key] for key in ABOUT}
    about |= {"pruner": pruner} if (pruner := sweep.pruner_at(scale)) else {}
    return known, {**about, **called, **search, "scale": scale, "defaults": defaults, "trials": list(promised.values())}


def edits(directory: Path, trials: Sequence[Trial]) -> dict[str, str]:
    """By arm, in words, what a begun sweep's trials were begun with otherwise than is asked for now: `promise` will
    refuse these. Tokens are not compared, for nothing here makes any.
    """
    from moepp.training.foreign import completed
    from moepp.training.settings import changed_settings, say_changes

    begun = (read_plan(directory) or {"trials": []})["trials"]
    known, found = {(trial["arm"], trial["seed"]): trial["path"] for trial in begun}, {}
    for trial in trials:
        if path := known.get((trial.arm, trial.seed)):
            changed = changed_settings(RunRecord(directory / path), completed(trial.config))
            edited = {key: values for key, values in changed.items() if not lies_in(key, FROZEN_IN)}
            found |= {trial.arm: say_changes(edited)} if edited else {}
    return found


def refuse_another_sweep(directory: Path, known: Mapping[str, Any], sweep: Sweep, search: Mapping[str, Any]) -> None:
    """Raises UsageError where `known`, the plan of that directory, is of another sweep of the same name, or of a search
    through another space.
    """
    if not known["trials"]:
        return
    if known.get("search") != search.get("search"):
        raise UsageError(
            f"{directory} holds a search through another space or at other seeds, or no search; start afresh under"
            " another name or with runs=FOLDER, or remove that folder"
        )
    begun = {trial["group"] if search else trial.get("of_arm", trial["arm"]) for trial in known["trials"]}
    _refuse_other_arms(directory, known, sweep, begun)


def _refuse_other_arms(directory: Path, known: Mapping[str, Any], sweep: Sweep, begun: Set[str]) -> None:
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


def _refuse_other_settings(begun: Path, trial: Trial, other_run: bool, other_defaults: bool) -> None:
    """`begun` is the folder of the trial that the sweep has under this arm and seed."""
    from moepp.training.settings import changed_settings, say_changes

    changed = changed_settings(RunRecord(begun), trial.config) if other_run or other_defaults else {}
    if other_run or changed:
        raise UsageError(
            f"{begun.parent} holds this sweep with other settings of arm {trial.arm} "
            f"({say_changes(changed) or begun.name}); start afresh under another name or with runs=FOLDER, or remove"
            " that folder"
        )


@lru_cache(maxsize=1)
def _defaults() -> str:
    """A digest of the schema's: reading what every trial was begun with takes long where there are a thousand."""
    from moepp.training.settings import RunConfig

    return hashlib.sha256(json.dumps(flatten(RunConfig()), default=str).encode()).hexdigest()[:12]
