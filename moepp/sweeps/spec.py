"""Sweep files: named arms or a search space against one baseline, their seeds, and what is held equal."""

import copy
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moepp.config import CONF, compose, load
from moepp.errors import UsageError
from moepp.sweeps import space

if TYPE_CHECKING:
    from moepp.training.settings import RunConfig

SWEEPS = CONF.parent / "sweeps"


@dataclass
class Scale:
    """What a scale changes in every arm. `set` holds overrides as on the command line."""

    set: list[str] = field(default_factory=list)
    seeds: list[int] | None = None  # in place of the sweep's


@dataclass
class Sweep:
    """A file of sweeps/. An arm holds what it changes: a list of overrides, or a mapping shaped like the config.

    `match` is checked within 1 % before anything runs (moepp/sweeps/budgets.py).
    """

    name: str = ""
    question: str = ""
    paper: str = ""  # the tables it re-creates
    base: list[str] = field(default_factory=list)  # overrides common to all runs
    scales: dict[str, Scale] = field(default_factory=dict)
    baseline: str = ""
    arms: dict[str, Any] = field(default_factory=dict)
    space: dict[str, Any] = field(default_factory=dict)  # more arms: moepp/sweeps/space.py
    seeds: list[int] = field(default_factory=lambda: [0])
    match: Literal["tokens", "total_params", "active_params", "flops_per_token", "none"] = "tokens"  # held equal
    objective: str = "final/val_loss"
    retries: int = 1  # times that a crashed trial is started again

    def folder(self, scale: str, extra: Iterable[str] = ()) -> Path:
        """Where the sweep's records are, found without composing a config: `runs/<sweep>-<scale>/`."""
        runs = "runs"
        for layer in (*self.base, *self.scale(scale).set, *extra):
            key, _, value = layer.partition("=")
            runs = value if key == "runs" else runs
        return Path(runs) / f"{self.name}-{scale}"

    def scale(self, name: str) -> Scale:
        if name not in self.scales:
            raise UsageError(_unknown("scale", name, self.scales))
        return self.scales[name]

    def trials(self, scale: str, extra: Iterable[str] = (), seeds: Sequence[int] | None = None) -> list["Trial"]:
        """Every arm with every seed, all arms of the first seed first, so that a table exists early.

        Later ones of base, scale, arm and `extra` win. `seeds` replaces those of the file. Raises UsageError for an
        unknown scale, an override the config refuses, repeated seeds, or arms that amount to the same run.
        """
        from moepp.training.settings import RunConfig

        chosen = self.scale(scale)
        seeds = list(seeds or chosen.seeds or self.seeds)
        if len(set(seeds)) < len(seeds):
            raise UsageError(f"seeds {seeds} of sweep {self.name} repeat; each seed is one run per arm")
        configs = {}
        for arm, changes in self.arms.items():
            arm_layers = [changes] if isinstance(changes, dict) else list(changes)
            configs[arm] = compose(RunConfig, [*self.base, *chosen.set, *arm_layers, *extra])
            configs[arm].name = f"{self.name}-{scale}"
            configs[arm].tags |= self._tags(scale, arm)
        # To compose takes tens of milliseconds, which a copy for each seed does not.
        trials = [Trial(arm, seed, _seeded(config, seed)) for seed in seeds for arm, config in configs.items()]
        _refuse_equal_arms(trials)
        return trials

    def _tags(self, scale: str, arm: str) -> dict[str, str]:
        names = {"sweep": f"{self.name}-{scale}", "experiment": self.name, "scale": scale}
        return {**names, "arm": arm, "baseline": self.baseline, "paper_table": self.paper}


@dataclass
class Trial:
    """One run of a sweep."""

    arm: str
    seed: int
    config: "RunConfig"

    @property
    def directory(self) -> Path:
        """Its run record. It depends on `config.data.digest`, so it is final once the data are prepared."""
        from moepp.training.settings import run_directory

        return run_directory(self.config)


def load_sweep(name_or_path: str) -> Sweep:
    """The sweep of that name in sweeps/, or in a file of your own (`*.yaml`). Raises UsageError in one line."""
    path = Path(name_or_path)
    if path.suffix != ".yaml":
        path = SWEEPS / f"{name_or_path}.yaml"
        if not path.is_file():
            raise UsageError(_unknown("sweep", name_or_path, sorted(found.stem for found in SWEEPS.glob("*.yaml"))))
    sweep = load(Sweep, path)
    if sweep.space:
        points = space.expand(sweep.space)
        if both := sweep.arms.keys() & points.keys():
            raise UsageError(f"{path}: arm {min(both)} is also a point of the space")
        sweep.arms |= points
    for key in ("name", "question", "scales", "arms", "baseline", "seeds"):
        if not getattr(sweep, key):
            raise UsageError(f"{path}: {key} is missing")
    if sweep.retries < 0:
        raise UsageError(f"{path}: retries={sweep.retries} must not be negative")
    if sweep.baseline not in sweep.arms:
        raise UsageError(f"{path}: {_unknown('baseline', sweep.baseline, sweep.arms)}")
    for arm, changes in sweep.arms.items():
        if not isinstance(changes, dict | list):
            raise UsageError(f"{path}: arm {arm} must be a list of overrides or a mapping shaped like the config")
    return sweep


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


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"unknown {kind} '{name}'; choose from {', '.join(known) or '(none)'}{hint}"
