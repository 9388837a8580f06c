"""Runs that another sweep has finished. A run is what its config says, whatever its arm is called: vanilla MoE of one
sweep is vanilla MoE of another, and is copied instead of trained again.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from moepp.config import save
from moepp.records import RunRecord, write_json
from moepp.sweeps.spec import Trial

OF_ITS_OWN = ("config.yaml", "mlflow.json", "lock", "leases")  # what a copy does not take over


def share_finished_runs(trials: Iterable[Trial]) -> int:
    """Copies the record of every trial that has none yet and that a sweep in the same `runs` folder has finished; its
    weights are linked. Returns how many. The trials' data must be frozen: that completes their identity.
    """
    shared = 0
    for trial in trials:
        target = trial.directory
        if target.exists():
            continue
        found = (path for path in sorted(target.parent.parent.glob(f"*/{target.name}")) if path != target)
        source = next((path for path in found if RunRecord(path).status == "done"), None)
        shared += source is not None and _copy(source, target, trial)
    return shared


def _copy(source: Path, target: Path, trial: Trial) -> bool:
    """Whether the copy was made here; another worker may be faster. It appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        copy = shutil.copytree(
            source, scratch / "run", ignore=shutil.ignore_patterns(*OF_ITS_OWN), copy_function=_link_or_copy
        )
        save(trial.config, copy / "config.yaml")
        provenance = RunRecord(source).read("provenance.json")
        write_json(copy / "provenance.json", {**provenance, "trained_as": f"{source.parent.name}/{source.name}"})
        try:
            copy.rename(target)
        except OSError:
            if target.exists():
                return False
            raise
        return True
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _link_or_copy(source: str, target: str) -> None:
    """Weights are large and never written again: they are linked where the file system can. Records are copied."""
    if Path(source).suffix == ".ckpt":
        try:
            os.link(source, target)
            return
        except OSError:
            pass
    shutil.copy2(source, target)
