"""The proposals of a search as plain data, read from sweep.json and the run records."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepp.errors import UsageError
from moepp.program import program
from moepp.records import RunRecord, read_json


@dataclass(frozen=True)
class Proposal:
    """A point that was trained at every seed. `loss` is the mean objective where all have finished, else the mean
    validation loss at the last step that all have reached, `step`; None before the first validation.
    """

    name: str
    arm: str
    point: dict[str, Any]
    state: str  # done, pruned, failed, damaged or unfinished
    step: int
    loss: float | None


def read_proposals(directory: Path) -> list[Proposal]:
    """In the order of proposal. Raises UsageError where the directory holds no search."""
    sweep = read_json(directory / "sweep.json") or {"trials": []}
    trials: dict[str, list[dict[str, Any]]] = {}
    for trial in sweep["trials"]:
        if "point" in trial:
            trials.setdefault(trial["arm"], []).append(trial)
    if not trials:
        raise UsageError(f"{directory} holds no search; `{program()} reproduce hyperparameters` runs one")
    return [_proposal(directory, found, sweep["objective"]) for found in trials.values()]


def _proposal(directory: Path, trials: Sequence[dict[str, Any]], objective: str) -> Proposal:
    records = [RunRecord(directory / trial["path"]) for trial in trials]
    states = {record.status for record in records}
    state = next((state for state in ("failed", "damaged", "pruned") if state in states), "unfinished")
    key = "val/loss"
    if states == {"done"}:
        state, key = "done", objective
    curves = [{int(line["step"]): line[key] for line in record.metrics() if key in line} for record in records]
    common = set.intersection(*map(set, curves))
    step = max(common, default=0)
    loss = statistics.fmean(curve[step] for curve in curves) if common else None
    first = trials[0]
    return Proposal(first["arm"], first["group"], first["point"], state, step, loss)


def best(proposals: Sequence[Proposal], arm: str) -> Proposal | None:
    """Of those that ran to their end; None while there is none."""
    done = [proposal for proposal in proposals if proposal.arm == arm and proposal.state == "done"]
    return min(done, key=lambda proposal: proposal.loss, default=None)


def importances(proposals: Sequence[Proposal], arm: str) -> dict[str, float]:
    """The share of each key in what tells the better half of an arm's finished proposals from the others (PED-ANOVA,
    Watanabe et al. 2023), largest first; empty below eight of them. Needs Optuna.
    """
    done = [proposal for proposal in proposals if proposal.arm == arm and proposal.state == "done"]
    if len(done) < 8:
        return {}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    spread = {key: [proposal.point[key] for proposal in done] for key in done[0].point}
    distributions = {key: _distribution(values) for key, values in spread.items()}
    for proposal in done:
        trial = optuna.trial.create_trial(params=proposal.point, distributions=distributions, value=proposal.loss)
        study.add_trial(trial)
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.5)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def _distribution(values: Sequence[Any]) -> Any:
    """The range that was tried; positive numbers on a logarithmic axis, as steps of rates and weights count."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return CategoricalDistribution(list(dict.fromkeys(values)))
    kind = IntDistribution if all(isinstance(value, int) for value in values) else FloatDistribution
    return kind(min(values), max(values), log=min(values) > 0)
