"""Where a sweep runs: `launcher=local|slurm|ray` on the command line, each a fragment of conf/launcher/.

A launcher starts stateless workers and nothing else: who runs which trial is settled by leases, so workers of any
launchers, begun at any time, share one sweep. Where a run was made is no property of the run, hence none of RunConfig.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from moepp.config import compose_kind
from moepp.errors import UsageError
from moepp.sweeps.launchers.call import SweepCall
from moepp.sweeps.launchers.local import LocalLauncher
from moepp.sweeps.launchers.ray import RayLauncher
from moepp.sweeps.launchers.slurm import SlurmLauncher

LAUNCHERS = {"local": LocalLauncher, "slurm": SlurmLauncher, "ray": RayLauncher}


def split(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """The words that choose and set the launcher, and those of the runs."""
    words = list(words)
    chosen = [word for word in words if word.startswith(("launcher=", "launcher."))]
    return chosen, [word for word in words if word not in chosen]


def launch(call: SweepCall, chosen: Sequence[str]) -> Path | None:
    """Has the sweep run until none of its trials is left and returns its directory; None where nobody waits for that.

    Raises what `run_sweep` raises, and UsageError for a launcher that cannot be used as it stands.
    """
    launcher = compose_kind("launcher", LAUNCHERS, chosen)
    if call.minutes < math.inf and not isinstance(launcher, LocalLauncher):
        raise UsageError("--minutes is for launcher=local; workers elsewhere are stopped from outside, and continued")
    return launcher.run(call)
