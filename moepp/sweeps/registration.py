"""plan.json: what a sweep will compare and how it will be judged, written down before anything runs.

It lies in results/<sweep>/<scale>/, to be committed before the runs begin. Reports say what was registered and what
deviates (moepp/reports/registration.py).
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moepp.config import flatten, identity, lies_in
from moepp.errors import UsageError
from moepp.records import RunRecord, read_json, write_json
from moepp.shipped import PACKAGE
from moepp.statistics.seeds import POWER, SIGNIFICANCE, minimal_detectable_difference
from moepp.sweeps.spec import Contrast, Sweep, Trial
from moepp.training.provenance import git
from moepp.training.settings import NOT_IDENTITY

RESULTS = Path("results")
TEST = "two-sided t-test at 5 % of the difference in final validation loss, paired over seeds"
NOT_PLANNED = ("registered", "code")  # in which two registrations of one plan may differ


def plan_path(name: str, scale: str, overrides: Sequence[str] = (), size: str = "") -> Path:
    """With the size in the folder's name, as in gpu-1b, where the command chooses one."""
    chosen = size and any(word.startswith(("size=", "recipe=")) for word in overrides)
    return RESULTS / name / (f"{scale}-{size}" if chosen else scale) / "plan.json"


def register(
    sweep: Sweep, scale: str, trials: Sequence[Trial], overrides: Sequence[str] = (), earlier: str = ""
) -> list[str]:
    """Writes plan.json and returns what to print. The deviation over seeds, for the power, is that of the finished runs
    in `earlier`, the folder of a sweep's records, else the file's `primary.sd`.

    Raises UsageError where the file has neither a primary contrast nor predictions, no deviation is known, a trial has
    finished already (unless the file says `registered: after the start`), or another plan is registered.
    """
    if sweep.primary is None and not sweep.predictions:
        raise UsageError(
            f"sweep {sweep.name} names no `primary: {{contrast: ...}}` and no `predictions: [...]`; there is nothing to"
            " register"
        )
    if sweep.search(scale):
        raise UsageError(f"sweep {sweep.name} searches at scale {scale}: what it will compare is not known beforehand")
    path = plan_path(sweep.name, scale, overrides, trials[0].config.tags.get("size", ""))
    plan, known = _plan(sweep, scale, trials, overrides, earlier), read_json(path)
    if known:
        _refuse_another_plan(path, known, plan)
        return [f"registered already, on {known['registered']}: {path}"]
    if sweep.registered == "before the start":
        _refuse_finished(sweep.folder(scale, overrides), trials)
    write_json(path, plan)
    return [f"registered: {path}; commit it before anything runs", *([_power(plan)] if sweep.primary else [])]


def judged(sweep: Sweep, scale: str) -> tuple[Contrast, dict[str, Contrast]]:
    """The primary contrast, and all others by name: every arm against the baseline, and what the file names."""
    arms = [arm for arm in sweep.arms_at(scale) if arm != sweep.baseline]
    named = {arm: Contrast([arm], [sweep.baseline]) for arm in arms} | sweep.contrasts_at(scale)
    primary = named.pop(sweep.primary.contrast)
    return primary, {name: contrast for name, contrast in named.items() if contrast != primary}


def _plan(sweep: Sweep, scale: str, trials: Sequence[Trial], overrides: Sequence[str], earlier: str) -> dict[str, Any]:
    configs = {trial.arm: _settings(trial) for trial in reversed(trials)}
    common, seeds = configs[sweep.baseline], list(dict.fromkeys(trial.seed for trial in trials))
    return {
        "name": sweep.name,
        "scale": scale,
        "question": sweep.question,
        "registered": datetime.now(UTC).isoformat(timespec="seconds"),
        "when": sweep.registered,
        "code": git(PACKAGE.parent),
        **({"predictions": sweep.predictions} if sweep.predictions else {}),
        **(_tests(sweep, scale, len(seeds), earlier) if sweep.primary else {}),
        "exclusions": asdict(sweep.exclusions),
        "seeds": seeds,
        "overrides": list(overrides),
        "baseline": sweep.baseline,
        "config": common,
        "arms": {
            trial.arm: {
                "overrides": sweep.arms[trial.arm],
                "identity": identity(trial.config, (*NOT_IDENTITY, "seed")),  # before its data are prepared
                "differs": {k: v for k, v in configs[trial.arm].items() if k not in common or common[k] != v},
            }
            for trial in trials
            if trial.seed == seeds[0] and not trial.lengthened
        },
    }


def _tests(sweep: Sweep, scale: str, pairs: int, earlier: str) -> dict[str, Any]:
    """The contrasts, how they are judged, and what so many pairs can show."""
    primary, secondary = judged(sweep, scale)
    sd, source = _deviation(sweep, primary, earlier)
    detectable = {
        name: minimal_detectable_difference(sd, pairs, 1 - SIGNIFICANCE / tests, POWER)
        for name, tests in (("primary", 1), ("secondary", max(1, len(secondary))))
    }
    return {
        "primary": {"name": sweep.primary.contrast, **asdict(primary), "smallest": sweep.primary.smallest},
        "secondary": {name: asdict(contrast) for name, contrast in secondary.items()},
        "test": f"{TEST}; the {len(secondary)} secondary contrasts after Holm's correction over all of them",
        "power": {"power": POWER, "sd": sd, "sd_from": source, "pairs": pairs, "detectable": detectable},
    }


def _settings(trial: Trial) -> dict[str, Any]:
    """All that can change a result, but for the seed and what is known only once data are prepared."""
    left_out = (*NOT_IDENTITY, "seed", "data.digest", "init_weights", "model.architecture")
    return {key: value for key, value in flatten(trial.config).items() if not lies_in(key, left_out)}


def _deviation(sweep: Sweep, primary: Contrast, earlier: str) -> tuple[float, str]:
    if earlier:
        return _deviation_of(Path(earlier), primary), f"finished runs of {earlier}"
    if sweep.primary.sd is None:
        raise UsageError(
            "what the seeds can show is not known: state `primary: {sd: ...}`, the deviation of the difference over"
            " seeds, or give the records of an earlier sweep, --register runs/NAME-SCALE"
        )
    return sweep.primary.sd, "primary.sd of the sweep file"


def _deviation_of(directory: Path, primary: Contrast) -> float:
    arms = [*primary.arms, *primary.minus]
    losses = {arm: _losses(directory, arm) for arm in arms}
    seeds = sorted(set.intersection(*(set(of_arm) for of_arm in losses.values())))
    if len(seeds) < 2:
        raise UsageError(f"{directory} has fewer than two seeds that all of {', '.join(arms)} have finished")

    def mean(side: Sequence[str], seed: int) -> float:
        return statistics.fmean(losses[arm][seed] for arm in side)

    return statistics.stdev([mean(primary.arms, seed) - mean(primary.minus, seed) for seed in seeds])


def _losses(directory: Path, arm: str) -> dict[int, float]:
    trials = (read_json(directory / "sweep.json") or {"trials": []})["trials"]
    records = {trial["seed"]: RunRecord(directory / trial["path"]) for trial in trials if trial["arm"] == arm}
    losses = {seed: record.final().get("val_loss", math.nan) for seed, record in records.items() if _done(record)}
    return {seed: loss for seed, loss in losses.items() if math.isfinite(loss)}


def _done(record: RunRecord) -> bool:
    return record.status == "done"


def _refuse_finished(directory: Path, trials: Sequence[Trial]) -> None:
    asked = {(trial.arm, trial.seed) for trial in trials}
    known = (read_json(directory / "sweep.json") or {"trials": []})["trials"]
    finished = [
        f"{trial['arm']} s{trial['seed']}"
        for trial in known
        if (trial["arm"], trial["seed"]) in asked and _done(RunRecord(directory / trial["path"]))
    ]
    if finished:
        raise UsageError(
            f"{len(finished)} trials of {directory} have finished already ({finished[0]}), so this would be no"
            " registration beforehand; choose other seeds, or let the file say `registered: after the start`"
        )


def _refuse_another_plan(path: Path, known: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    differing = [key for key in plan if key not in NOT_PLANNED and known.get(key) != plan[key]]
    if differing:
        raise UsageError(
            f"{path} registers another plan, of {known['registered']} (it differs in {', '.join(differing)}); a plan is"
            " not overwritten: name the sweep anew"
        )


def _power(plan: Mapping[str, Any]) -> str:
    power, smallest = plan["power"], plan["primary"]["smallest"]
    least = power["detectable"]["primary"]
    if least is None:
        return "one seed shows no difference at all"
    said = (
        f"{power['pairs']} pairs with a deviation of {power['sd']:.4f} ({power['sd_from']}) show a difference of"
        f" {least:.4f} nats per token with {POWER:.0%} probability, {power['detectable']['secondary']:.4f} in a"
        " secondary contrast"
    )
    if smallest and least > smallest:
        said += f"; the smallest that matters, {smallest}, would be missed too often: add seeds"
    return said
