"""The process of one trial, from its frozen config to its end: `python run.py trial CONFIG`."""

import errno
import os
import sys
import time
from pathlib import Path

from moepp.errors import DiskFull, RunError
from moepp.process import die_with_parent, no_collections
from moepp.records import RunRecord
from moepp.sweeps.leases import NO_LEASE, end_without_lease
from moepp.sweeps.spanning import is_far_from_worker

TRIAL_COMMAND = (sys.executable, "-m", "moepp.cli", "trial")
FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT))


def run_trial(path: Path) -> None:
    """Trains the config at `path` in the folder that it lies in, for the worker or the starter of ranks that asks.

    Raises what `train` raises, RunError when the config is not that of the folder's run, and DiskFull.
    """
    die_with_parent()
    stale = 0.0 if is_far_from_worker() else end_without_lease()
    load_libraries()
    from moepp.config import load
    from moepp.sweeps.pruning import SweepPruner
    from moepp.training.ranks.rank import Rank
    from moepp.training.run import train
    from moepp.training.settings import RunConfig, run_directory

    config, folder, rank = load(RunConfig, path), path.parent, Rank.here()
    if not rank.started_by and run_directory(config).name != folder.resolve().name:
        raise RunError(f"{path} was changed: it describes run {run_directory(config).name}, not the one of its folder")
    if stale and rank.keeps_record(config.trainer.num_nodes):
        _wait_for_lock(RunRecord(folder), 2 * stale)
    try:
        train(config, folder, SweepPruner.of(folder))
    except RunError as error:
        if any(words in str(error) for words in FULL):
            raise DiskFull(str(error)) from error
        raise


def load_libraries() -> None:
    """Imports what training needs, which takes seconds."""
    with no_collections():
        import moepp.sweeps.pruning
        import moepp.training.run  # noqa: F401


def _wait_for_lock(record: RunRecord, seconds: float) -> None:
    """Until the process that held the lease before is gone: servers of network file systems keep the locks of a lost
    machine for a minute or two. Ends this process when they keep it longer; the lease's holder may try again.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            with record.lock():
                return
        except RunError as error:
            if time.monotonic() > deadline:
                print(f"error: {error}", file=sys.stderr)
                sys.exit(NO_LEASE)
        time.sleep(min(1.0, seconds / 20))
