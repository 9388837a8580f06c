"""A sweep as it was asked for on the command line."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moepp.addresses import without_user

if TYPE_CHECKING:
    from moepp.sweeps.spec import Sweep, Trial

URI = "tracking.uri="


@dataclass(frozen=True)
class SweepCall:
    sweep: str  # a file of sweeps/ or the path of one
    scale: str
    workers: int = 0  # 0 leaves it to the launcher
    overrides: Sequence[str] = ()
    seeds: Sequence[int] | None = None
    arms: Sequence[str] = ()  # a choice among the sweep's; empty: all
    minutes: float = math.inf  # begin no trial that would not end within them, and stop then

    def load(self) -> "Sweep":
        from moepp.sweeps.reading import read_sweep

        sweep = read_sweep(self.sweep)
        return replace(sweep, arms={arm: sweep.arms[arm] for arm in self.arms}) if self.arms else sweep

    def trials(self) -> "list[Trial]":
        return self.load().trials(self.scale, self.overrides, self.seeds)

    def work(self) -> list[str]:
        """The command of one worker; it runs one trial at a time with everything that its process may use."""
        seeds = ["--seeds", *map(str, self.seeds)] if self.seeds else []
        overrides = map(without_user, self.overrides)
        words = ["sweep", "work", self.sweep, *overrides, "--scale", self.scale, *seeds]
        return [sys.executable, "-m", "moepp.cli", *words]

    def environment(self) -> dict[str, str]:
        """What a worker is told otherwise than by its command, which other users of a machine can see: the tracker's
        address with its user.
        """
        uris = [word.removeprefix(URI) for word in self.overrides if word.startswith(URI)]
        return {"MLFLOW_TRACKING_URI": uris[-1]} if uris and without_user(uris[-1]) != uris[-1] else {}
