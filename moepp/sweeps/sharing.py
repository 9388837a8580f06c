"""Runs that another sweep has finished. A run is what its config says, whatever its arm is called: vanilla MoE of one
sweep is vanilla MoE of another, and is copied instead of trained again.
"""

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from moepp.config import save
from moepp.records import TOKENIZER, RunRecord, link_or_copy, write_json
from moepp.sweeps.spec import Trial
from moepp.training.settings import changed_settings

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
        source = next((path for path in found if _is_result_of(path, trial)), None)
        shared += source is not None and _copy(source, target, trial)
    return shared


def _is_result_of(path: Path, trial: Trial) -> bool:
    record = RunRecord(path)
    return record.status == "done" and not changed_settings(record, trial.config)


def _copy(source: Path, target: Path, trial: Trial) -> bool:
    """Whether the copy was made here; another worker may be faster. It appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        copy = shutil.copytree(
            source, scratch / "run", ignore=shutil.ignore_patterns(*OF_ITS_OWN), copy_function=_link_what_stays
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


def _link_what_stays(source: str, target: str) -> None:
    """Weights and the tokenizer are large and never written again; what else is in a record is."""
    once = Path(source).suffix == ".ckpt" or Path(source).name == TOKENIZER
    (link_or_copy if once else shutil.copy2)(source, target)
