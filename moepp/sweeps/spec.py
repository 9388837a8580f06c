"""Sweeps: named arms or a search space against one baseline, their seeds, and what is held equal."""

import copy
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moepp.config import compose, flatten
from moepp.errors import UsageError, at, refused_at
from moepp.layers.bounds import Bounded, Count, Positive, Seed, Whole, refusals
from moepp.names import unknown_name
from moepp.sweeps import pruning
from moepp.sweeps.space import Point, SearchSpace, expand, overrides, search_space

if TYPE_CHECKING:
    from moepp.training.settings import RunConfig

SET_BY_SWEEP = {  # keys of a run, and what to say instead
    "seed": "name its seeds with --seeds, or in its file as seeds",
    "name": "its runs lie below its own name; keep them apart with runs=FOLDER",
}


@dataclass
class Scale(Bounded, key="scales"):
    """What a scale changes in every arm. `set` holds overrides as on the command line."""

    set: list[str] = field(default_factory=list)
    arms: list[str] = field(default_factory=list)  # a choice among the sweep's, the baseline among them; empty: all
    seeds: str | list[int] | None = None  # in place of the sweep's, as are the following
    lengths: list[Positive] | None = None
    proposals: Count | None = None  # n of a search
    pruner: dict[str, Any] | None = None


@dataclass
class Contrast:
    """An effect: the mean over `arms` minus the mean over the arms `minus`, within each seed."""

    arms: list[str] = field(default_factory=list)
    minus: list[str] = field(default_factory=list)


@dataclass
class Primary(Bounded, key="primary"):
    """The one difference that answers the question; all others are secondary."""

    contrast: str = ""  # of `contrasts`, or an arm, which is then compared with the baseline
    smallest: Positive | None = None  # nats per token; a smaller difference does not matter
    sd: Positive | None = None  # of the difference over seeds, as far as it is known before anything runs


@dataclass
class Exclusions(Bounded, key="exclusions"):
    """Which finished runs a report leaves out. It always says what it would have found with them."""

    loss_above_step: Count | None = None  # runs that end above their own validation loss at this step: they diverged
    share_off_target: Positive | None = None  # runs whose FFN share of all slots ends further than this from its target


@dataclass
class Trend:
    """A figure of loss and expert time against `x`, a key of the config that is a number. An arm may be in several
    series; a baseline that is in none is drawn as a level.
    """

    x: str = ""
    series: dict[str, list[str]] = field(default_factory=dict)  # its name -> its arms


@dataclass
class Sweep(Bounded):
    """A file of sweeps/. An arm holds what it changes: a list of overrides, or a mapping shaped like the config.

    `match` is checked within 1 % before anything runs (moepp/sweeps/budgets.py).
    """

    name: str = ""
    question: str = ""
    paper: str = ""  # the tables it re-creates
    plugins: str | list[str] = field(default_factory=list)  # of all runs; a file's path may begin at the sweep's folder
    base: list[str] = field(default_factory=list)  # overrides common to all runs
    scales: dict[str, Scale] = field(default_factory=dict)
    baseline: str = ""
    arms: dict[str, Any] = field(default_factory=dict)
    space: dict[str, Any] = field(default_factory=dict)  # more arms, or a search in each: moepp/sweeps/space.py
    pruner: dict[str, Any] = field(default_factory=dict)  # of what the space adds: moepp/sweeps/pruning.py
    storage: str = ""  # database of a search, as a URL; empty: a journal beside the records
    seeds: str | list[int] = field(default_factory=lambda: [0])  # or a range, such as 0..19
    match: Literal["tokens", "total_params", "active_params", "flops_per_token", "wallclock", "none"] = (
        "tokens"  # held equal
    )
    objective: str = "final/val_loss"  # minimised by a search
    lengths: list[Positive] = field(default_factory=list)  # times the steps: more runs, each to its schedule's end
    lengthened: list[str] = field(default_factory=list)  # arms that have them; the baseline alone where none is named
    retries: Whole = 1  # times that a crashed trial is started again
    contrasts: dict[str, Contrast] = field(default_factory=dict)  # of the report: effects beside those of single arms
    trend: Trend | None = None
    primary: Primary | None = None
    predictions: list[str] = field(default_factory=list)  # of what will be found, registered with or without a primary
    exclusions: Exclusions = field(default_factory=Exclusions)
    registered: Literal["before the start", "after the start"] = "before the start"  # moepp/sweeps/registration.py
    notes: list[str] = field(default_factory=list)  # what is to be known when the report is read
    file: str = ""  # where all this was read, for what is wrong with it to be found

    @property
    def title(self) -> str:
        return self.name.replace("_", " ").capitalize()

    def folder(self, scale: str, extra: Iterable[str] = ()) -> Path:
        """Where the sweep's records are, found without composing a config: `runs/<sweep>-<scale>/`."""
        runs = "runs"
        for layer in (*self.base, *self.scale(scale).set, *extra):
            key, _, value = layer.partition("=")
            runs = value if key == "runs" else runs
        return Path(runs) / f"{self.name}-{scale}"

    def size(self, scale: str) -> str:
        """The size that the scale trains where the command names no other."""
        return self._compose(self.baseline, _layers(self.arms[self.baseline]), scale, ()).tags.get("size", "")

    def scale(self, name: str) -> Scale:
        if name not in self.scales:
            raise UsageError(unknown_name("scale", name, self.scales))
        return self.scales[name]

    def arms_at(self, scale: str) -> dict[str, Any]:
        return {arm: self.arms[arm] for arm in self.scale(scale).arms or self.arms if arm in self.arms}

    def contrasts_at(self, scale: str) -> dict[str, Contrast]:
        """Those whose arms the scale trains."""
        arms = self.arms_at(scale).keys()
        return {name: c for name, c in self.contrasts.items() if {*c.arms, *c.minus} <= arms}

    def search(self, scale: str) -> SearchSpace | None:
        """None where all arms are known from the start."""
        found, n = search_space(self.space), self.scale(scale).proposals
        return replace(found, n=n) if found and n else found

    def lengths_at(self, scale: str) -> list[float]:
        """Beside 1, the longest first: it is the trunk from which the others branch."""
        own = self.scale(scale).lengths
        return sorted(set(self.lengths if own is None else own) - {1.0}, reverse=True)

    def pruner_at(self, scale: str) -> dict[str, Any]:
        own = self.scale(scale).pruner
        return self.pruner if own is None else own

    def chosen_seeds(self, scale: str, seeds: Sequence[int] | None = None) -> list[int]:
        """Those the caller names, else the scale's, else the sweep's. Raises UsageError for others."""
        chosen = list(seeds or self.scale(scale).seeds or self.seeds)
        for refusal in refusals(list[Seed], chosen, "seed"):
            raise UsageError(refusal if seeds else f"{self.file or self.name}: {refusal}")
        if len(set(chosen)) < len(chosen):
            raise UsageError(f"seeds {chosen} of sweep {self.name} repeat; each seed is one run per arm")
        return chosen

    def trials(self, scale: str, extra: Iterable[str] = (), seeds: Sequence[int] | None = None) -> list["Trial"]:
        """Every arm with every seed, all arms of the first seed first, so that a table exists early.

        Later ones of base, scale, arm and `extra` win. `seeds` replaces those of the file. Of a search these are its
        arms as they stand, before anything is proposed. Raises UsageError for an unknown scale, an override the config
        refuses or nothing reads, repeated seeds, or arms that amount to the same run.
        """
        seeds, pruned = self.chosen_seeds(scale, seeds), expand(self.space) if self.pruner_at(scale) else {}
        # To compose takes tens of milliseconds, which a copy for each seed does not.
        arms = self.arms_at(scale)
        configs = {arm: self._compose(arm, _layers(changes), scale, extra) for arm, changes in arms.items()}
        self._refuse_vain(configs, scale, list(extra))
        self._check_axis(configs)
        if self.search(scale):
            self._check_objective(configs)
        groups = {arm: "space" if arm in pruned and arm != self.baseline else "" for arm in configs}
        trials = [Trial(a, s, _seeded(config, s), groups[a]) for s in seeds for a, config in configs.items()]
        trials += self._lengthened(trials, self.lengths_at(scale))
        _refuse_equal_arms(trials)
        _refuse_rungs_between_validations(pruning.parse(self.pruner_at(scale)), trials)
        return trials

    def _refuse_vain(self, configs: Mapping[str, "RunConfig"], scale: str, extra: list[str]) -> None:
        """Words of the command, or of the file where the command changes nothing of it, that no run reads."""
        from moepp.training.asked import refuse_vain

        _refuse_set_by_sweep(extra)
        refuse_vain(extra, configs.values())
        places = {"base": (self.base, configs.values()), f"scale {scale}": (self.scale(scale).set, configs.values())}
        places |= {f"arm {arm}": (_layers(self.arms[arm]), [config]) for arm, config in configs.items()}
        for place, (words, read_by) in places.items() if not extra else ():
            said = [word for word in words if isinstance(word, str)]
            with at(f"{self.file or self.name}: {place}"):
                _refuse_set_by_sweep(said)
                refuse_vain(said, read_by)

    def _lengthened(self, trials: Sequence["Trial"], lengths: Sequence[float]) -> list["Trial"]:
        chosen = [trial for trial in trials if trial.arm in (self.lengthened or [self.baseline])] if lengths else []
        longer = [_at_length(trial, length) for length in lengths for trial in chosen]
        for trial in (*longer, *chosen):
            steps = {other.config.trainer.steps for other in (*longer, *chosen) if other.of_arm == trial.of_arm}
            _keep_branch_points(trial.config, steps)
        for trial in longer:
            with refused_at(f"lengths: {trial.arm}"):
                trial.config.check_new()
        return longer

    def _check_axis(self, configs: Mapping[str, "RunConfig"]) -> None:
        drawn = {arm for arms in self.trend.series.values() for arm in arms} if self.trend else set()
        for arm in [arm for arm in configs if arm in drawn]:
            value = flatten(configs[arm]).get(self.trend.x)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UsageError(
                    f"{self.file or self.name}: trend.x={self.trend.x} is {value} in arm {arm}; it must be a key of the"
                    " config that holds a number"
                )

    def _check_objective(self, configs: Mapping[str, "RunConfig"]) -> None:
        """A search would miss it only once its first trials have trained."""
        from moepp.training.settings import metrics_of

        for arm, config in configs.items():
            known = metrics_of(config)
            if self.objective not in known and not config.trainer.has_foreign_callbacks:
                close = difflib.get_close_matches(self.objective, known, n=3, cutoff=0)
                raise UsageError(
                    f"{self.file or self.name}: objective={self.objective}: arm {arm} logs no such metric; nearest in"
                    f" spelling are {', '.join(close)}"
                )

    def proposal(
        self,
        arm: str,
        name: str,
        point: Point,
        scale: str,
        extra: Sequence[str] = (),
        seeds: Sequence[int] | None = None,
    ) -> list["Trial"]:
        """The trials of one proposal of a search: `arm` at a point of the space, under a name of its own."""
        given = {override.partition("=")[0] for override in extra}
        if both := sorted(given & point.keys()):
            raise UsageError(f"{both[0]} is searched in arm {arm}; leave it out of the command")
        config = self._compose(name, [*_layers(self.arms[arm]), *overrides(point)], scale, extra)
        config.tags["search"] = arm
        return [Trial(name, s, _seeded(config, s), arm, point) for s in self.chosen_seeds(scale, seeds)]

    def extremes(self, scale: str, extra: Sequence[str] = ()) -> list["Trial"]:
        """Every arm of a search at the ends of each axis: what fits there fits in between. Raises UsageError for an
        axis along which nothing changes, such as that of the seed, and for one that nothing reads wherever the others
        lead.
        """
        from moepp.training.asked import refuse_vain

        seeds, found = self.chosen_seeds(scale)[:1], []
        for arm in self.arms:
            axes, begun = self.search(scale).of(arm), len(found)
            for key, axis in axes.items():
                points = {f"{arm}, {key}={value}": {key: value} for value in axis.extremes}
                ends = [t for name in points for t in self.proposal(arm, name, points[name], scale, extra, seeds)]
                _refuse_equal_arms(ends)
                found += ends
            searched = overrides({key: axis.extremes[0] for key, axis in axes.items()})
            with at(f"{self.file or self.name}: space.tpe, arm {arm}"):
                refuse_vain(searched, [trial.config for trial in found[begun:]])
        return found

    def _compose(self, arm: str, layers: Sequence[Any], scale: str, extra: Iterable[str]) -> "RunConfig":
        from moepp.training.settings import RunConfig

        named = [{"plugins": self.plugins}] if self.plugins else []
        begun = [*named, *self.base]
        everywhere = [*begun, *self.scale(scale).set]
        try:
            config = compose(RunConfig, [*everywhere, *layers, *extra])
        except UsageError:  # whose fault is it?
            compose(RunConfig, extra)
            with at(f"{self.file or self.name}: base"):
                compose(RunConfig, begun)
            with at(f"{self.file or self.name}: scale {scale}"):
                compose(RunConfig, everywhere)
            with at(f"{self.file or self.name}: arm {arm}"):
                compose(RunConfig, [*everywhere, *layers, *extra])
            raise
        config.name = f"{self.name}-{scale}"
        config.tags |= self._tags(scale, arm)
        return config

    def _tags(self, scale: str, arm: str) -> dict[str, str]:
        names = {"sweep": f"{self.name}-{scale}", "experiment": self.name, "scale": scale}
        return {**names, "arm": arm, "baseline": self.baseline, "paper_table": self.paper}


@dataclass
class Trial:
    """One run of a sweep."""

    arm: str
    seed: int
    config: "RunConfig"
    group: str = ""  # those of a group may be pruned against each other
    point: Point = field(default_factory=dict)  # what a search has proposed
    length: float = 1.0  # of its training, in that of its arm
    of_arm: str = ""  # whose training it shortens or lengthens: such a trial is no arm of the sweep

    def __post_init__(self) -> None:
        self.of_arm = self.of_arm or self.arm

    @property
    def lengthened(self) -> bool:
        return self.of_arm != self.arm

    @property
    def directory(self) -> Path:
        """Its run record. It depends on `config.data.digest`, so it is final once the data are prepared."""
        from moepp.training.settings import run_directory

        return run_directory(self.config)


def _refuse_rungs_between_validations(halving: pruning.SuccessiveHalving | None, trials: list[Trial]) -> None:
    for trial in trials if halving else ():
        if halving.first >= (steps := trial.config.trainer.steps):
            raise UsageError(
                f"pruner: first={halving.first} must lie before the last of trainer.steps={steps}, or nothing is pruned"
            )
        if halving.first % (every := trial.config.trainer.val_every):
            raise UsageError(
                f"pruner: first={halving.first} must be a multiple of trainer.val_every={every}, for a rung compares"
                " validation losses"
            )


def _refuse_set_by_sweep(words: Iterable[str]) -> None:
    for word in words:
        if instead := SET_BY_SWEEP.get(word.partition("=")[0]):
            raise UsageError(f"{word} has no effect in a sweep: {instead}")


def _layers(changes: Any) -> list[Any]:
    return [changes] if isinstance(changes, dict) else list(changes)


def _at_length(trial: "Trial", length: float) -> "Trial":
    config = copy.deepcopy(trial.config)
    config.trainer.steps = max(1, round(length * config.trainer.steps))
    for refusal in refusals(Count, config.trainer.steps, f"lengths: {length:g} times the steps of {trial.arm}"):
        raise UsageError(refusal)
    name = f"{trial.arm}@{length:g}"
    config.tags |= {"arm": name, "length": f"{length:g}"}
    return replace(trial, arm=name, config=config, group="", length=length, of_arm=trial.arm)


def _keep_branch_points(config: "RunConfig", ends: Iterable[int]) -> None:
    """Of warmup-stable-decay the runs to all `ends` are one until their decays begin: it is trained once, and what its
    first runs keep there the others begin with (arXiv 2405.18392).
    """
    if config.optim.schedule == "wsd":
        starts = sorted({config.optim.decay_start(steps) for steps in ends})
        config.trainer.keep_at = [s for s in starts if 0 < s <= config.optim.decay_start(config.trainer.steps)]


def _seeded(config: "RunConfig", seed: int) -> "RunConfig":
    config = copy.deepcopy(config)
    config.seed = seed
    return config


def _refuse_equal_arms(trials: list[Trial]) -> None:
    seen: dict[Path, Trial] = {}
    for trial in trials:
        other = seen.setdefault(trial.directory, trial)
        if other is not trial:
            raise UsageError(
                f"arms {other.arm} and {trial.arm} are the same run: what one changes is not in its result"
            )
