"""Runs that differ in nothing but their length are one run until the first of them begins its decay: each begins with
the newest state that another has kept (`trainer.keep_at`), and comes to the same end as if it had trained from step 0.
"""

import json
from pathlib import Path

from moepp.records import RunRecord, link_or_copy, write_json, write_text
from moepp.training.settings import RunConfig, changed_settings
from moepp.training.states import state_name


def branch_off(record: RunRecord, config: RunConfig) -> None:
    """Gives a run that has not begun the state, the metrics and the provenance of the run that it branches from, where
    one lies beside it.
    """
    if not config.trainer.keep_at or record.status == "started" or any(record.checkpoints.glob("step-*")):
        return
    for step in sorted(config.trainer.keep_at, reverse=True):
        for point in sorted(record.path.parent.glob(f"*/checkpoints/{state_name(step)}")):
            trunk = RunRecord(point.parents[1])
            if changed_settings(trunk, config).keys() == {"trainer.steps"}:
                _take_over(record, trunk, point, step)
                return


def _take_over(record: RunRecord, trunk: RunRecord, point: Path, step: int) -> None:
    """The state comes last: a run that has it has all."""
    kept = [line for line in trunk.metrics() if line["step"] <= step and not any("final/" in key for key in line)]
    write_text(record.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
    write_json(record.path / "provenance.json", trunk.read("provenance.json"))
    record.checkpoints.mkdir(exist_ok=True)
    link_or_copy(point, record.checkpoints / point.name)
