"""A search that learns: TPE proposes what to train next, for each arm of the sweep file on its own.

Each arm has an Optuna study and `n` numbered proposals, `vanilla_000` and so on. A proposal is trained at every seed of
the sweep; what the study learns is the mean objective, which is minimised. Workers keep nothing: who finds no trial to
run tells the studies what the run records say, asks for one more proposal and writes it into sweep.json, where all see
it as a trial like any other. Proposal k is trial k of its study, so one that was asked for by a worker that died before
it could be written down is found there and used. The records and sweep.json are the truth; a study that was lost is
made again from them.
"""

import json
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moepp.errors import RunError, UsageError
from moepp.names import did_you_mean
from moepp.records import RunRecord, UnreadableRecord
from moepp.sweeps.leases import exclusive
from moepp.sweeps.plan import promise, read_plan
from moepp.sweeps.space import Axis, Point
from moepp.sweeps.spec import Sweep, Trial
from moepp.sweeps.status import outcome

if TYPE_CHECKING:
    import optuna

JOURNAL = "search.journal"
STARTUP = 10  # proposals of an arm that are drawn at random before the sampler trusts what it has seen


class Search:
    """The trials of a sweep whose space is `tpe`, as one worker learns of them. `freeze` sets the data of a config."""

    def __init__(
        self,
        sweep: Sweep,
        scale: str,
        extra: Sequence[str],
        seeds: Sequence[int] | None,
        freeze: Callable[[Trial], None],
    ):
        self.sweep, self.scale, self.extra, self.seeds, self._freeze = sweep, scale, extra, seeds, freeze
        self.directory = sweep.folder(scale, extra)
        self.space = sweep.search(scale)
        self._handed_out: set[str] = set()
        _optuna()

    @property
    def planned(self) -> int:
        return len(self.sweep.arms) * self.space.n * len(self.sweep.chosen_seeds(self.scale, self.seeds))

    def begin(self) -> None:
        """Writes sweep.json. Raises UsageError when the directory holds a search through another space, or at other
        seeds.
        """
        promise(self.directory, self.sweep, self.scale, [], self.extra, self._about())

    def known(self) -> list[Trial]:
        """Proposed trials that were not returned before, whoever asked for them."""
        fresh = {trial["arm"]: trial for trial in self._entries() if trial["arm"] not in self._handed_out}
        trials = [trial for name, t in fresh.items() for trial in self._trials(t["group"], name, t["point"])]
        if trials:
            # refuses arms with other settings
            promise(self.directory, self.sweep, self.scale, trials, self.extra, self._about())
        self._handed_out |= fresh.keys()
        return trials

    def propose(self) -> list[Trial]:
        """As `known`, after one more proposal; empty once every arm has had all of its proposals."""
        with exclusive(self.directory / "asking"):
            fresh = self.known()
            asked = {arm: len(proposals) for arm, proposals in self._proposals().items()}
            arm = min(asked, key=asked.get)
            if fresh or asked[arm] >= self.space.n:
                return fresh
            point = self._ask(arm, asked[arm])
            trials = self._trials(arm, f"{arm}_{asked[arm]:03d}", point)
            promise(self.directory, self.sweep, self.scale, trials, self.extra, self._about())
            self._handed_out.add(trials[0].arm)
            return trials

    def _about(self) -> dict[str, Any]:
        return {"planned": self.planned, **searched(self.sweep, self.scale, self.seeds)}

    def _entries(self) -> list[dict[str, Any]]:
        return _entries(read_plan(self.directory), self.sweep)

    def _proposals(self) -> dict[str, dict[str, list[dict[str, Any]]]]:
        """By arm and name, in the order they were asked for: the entries of sweep.json, one for each seed."""
        found: dict[str, dict[str, list[dict[str, Any]]]] = {arm: {} for arm in self.sweep.arms}
        for trial in self._entries():
            found[trial["group"]].setdefault(trial["arm"], []).append(trial)
        return found

    def _trials(self, arm: str, name: str, point: Point) -> list[Trial]:
        trials = self.sweep.proposal(arm, name, point, self.scale, self.extra, self.seeds)
        for trial in trials:
            self._freeze(trial)
        return trials

    def _ask(self, arm: str, number: int) -> Point:
        axes = self.space.of(arm)
        try:
            study = self._study(arm, number)
            self._restore(study, arm)
            self._tell(study, arm)
            asked = study.trials[number:]  # by a worker that died; what it drew is kept, the rest is drawn now
            trial = _optuna().Trial(study, asked[0]._trial_id) if asked else study.ask()
            return {key: axis.shown(_suggest(trial, key, axis)) for key, axis in axes.items()}
        except RunError:
            raise
        except Exception as error:  # whatever a journal on a broken disk or a database raises
            raise RunError(
                f"the search cannot use its storage {self.sweep.storage or self.directory / JOURNAL}"
                f" ({(str(error).splitlines() or [type(error).__name__])[0]}); it may be removed while no worker runs:"
                " the run records make it again"
            ) from error

    def _study(self, arm: str, number: int) -> "optuna.Study":
        from optuna.storages.journal import JournalFileBackend

        optuna = _optuna()
        storage = self.sweep.storage or optuna.storages.JournalStorage(
            JournalFileBackend(str(self.directory / JOURNAL))
        )
        # A seed of its own for each proposal: workers that start anew must not draw the same numbers again.
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=STARTUP, constant_liar=True, seed=self.space.seed * 1_000_003 + number
        )
        name = f"{self.directory.name}/{arm}"
        return optuna.create_study(storage=storage, sampler=sampler, study_name=name, load_if_exists=True)

    def _restore(self, study: "optuna.Study", arm: str) -> None:
        """Adds proposals that sweep.json has and the study has not."""
        optuna, distributions = _optuna(), {key: _distribution(axis) for key, axis in self.space.of(arm).items()}
        state = optuna.trial.TrialState.RUNNING
        for trials in list(self._proposals()[arm].values())[len(study.trials) :]:
            point = trials[0]["point"]
            study.add_trial(optuna.trial.create_trial(state=state, params=point, distributions=distributions))

    def _tell(self, study: "optuna.Study", arm: str) -> None:
        """Every proposal whose trials have ended since: its mean objective, that it was pruned, or that it failed."""
        optuna = _optuna()
        for frozen, trials in zip(study.trials, self._proposals()[arm].values(), strict=False):
            records = [RunRecord(self.directory / trial["path"]) for trial in trials]
            states = {outcome(record, self.sweep.retries)[0] for record in records}
            if frozen.state.is_finished() or "open" in states:
                continue
            try:
                if states & {"failed", "damaged"}:
                    study.tell(frozen.number, state=optuna.trial.TrialState.FAIL)
                elif "pruned" in states:
                    trial = optuna.Trial(study, frozen._trial_id)
                    for step, loss in _common_losses(records).items():
                        trial.report(loss, step)
                    study.tell(frozen.number, state=optuna.trial.TrialState.PRUNED)
                else:
                    values = [objective(record, self.sweep.objective) for record in records]
                    study.tell(frozen.number, statistics.fmean(values))
            except UnreadableRecord:  # it says nothing any more, and the search does without
                study.tell(frozen.number, state=optuna.trial.TrialState.FAIL)


def searched(sweep: Sweep, scale: str, seeds: Sequence[int] | None) -> dict[str, Any]:
    """What a search goes through, as sweep.json keeps it: with lists for tuples."""
    axes = {key: vars(axis) for key, axis in sweep.search(scale).axes.items()}
    return {"search": {"seeds": list(sweep.chosen_seeds(scale, seeds)), "keys": json.loads(json.dumps(axes))}}


def proposed(
    plan: Mapping[str, Any], sweep: Sweep, scale: str, extra: Sequence[str], seeds: Sequence[int] | None
) -> list[Trial]:
    """The trials of all that a plan holds, as the sweep would train them now."""
    by_name = {trial["arm"]: (trial["group"], trial["arm"], trial["point"]) for trial in _entries(plan, sweep)}
    return [trial for what in by_name.values() for trial in sweep.proposal(*what, scale, extra, seeds)]


def _entries(plan: Mapping[str, Any], sweep: Sweep) -> list[dict[str, Any]]:
    """Without what was proposed for an arm that has since been renamed or removed."""
    return [trial for trial in plan["trials"] if trial["group"] in sweep.arms]


def objective(record: RunRecord, name: str) -> float:
    """The last value of a metric of a finished run. Raises RunError where it was never logged."""
    lines = record.metrics()
    values = [line[name] for line in lines if name in line]
    if not values:
        known = sorted({key for line in lines for key in line} - {"step", "time"})
        hint = did_you_mean(name, known)
        raise RunError(f"{record.path} has no {name}, which the sweep names as its objective{hint}")
    return values[-1]


def _common_losses(records: Sequence[RunRecord]) -> dict[int, float]:
    """The mean validation loss at every step that all of the runs have reached."""
    curves = [{int(line["step"]): line["val/loss"] for line in r.metrics() if "val/loss" in line} for r in records]
    steps = sorted(set.intersection(*map(set, curves)))
    return {step: statistics.fmean(curve[step] for curve in curves) for step in steps}


def _suggest(trial: "optuna.Trial", key: str, axis: Axis) -> Any:
    if axis.kind == "choice":
        return trial.suggest_categorical(key, axis.values)
    suggest = trial.suggest_int if axis.kind == "int" else trial.suggest_float
    return suggest(key, *axis.values, log=axis.log)


def _distribution(axis: Axis) -> Any:
    distributions = _optuna().distributions
    if axis.kind == "choice":
        return distributions.CategoricalDistribution(axis.values)
    kind = distributions.IntDistribution if axis.kind == "int" else distributions.FloatDistribution
    return kind(*axis.values, log=axis.log)


def _optuna() -> Any:
    """The library, quiet. Raises UsageError where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise UsageError("space.tpe needs Optuna: pip install optuna") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def refuse_storage(url: str, workers: int) -> None:
    """SQLite locks its whole file, and not at all on many network file systems."""
    if url.startswith("sqlite") and workers != 1:
        raise UsageError(
            f"storage: {url} is for one worker (--workers 1 of `sweep run`); leave storage out (a journal beside the"
            " records, for any number), or name a database server"
        )
