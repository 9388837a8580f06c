"""One run for each arm of a sweep, made by its report: means over seeds with their intervals, and mean curves.

MLflow knows no intervals, and colours a group of runs as it likes; a run has what its metrics and its colour's tag say.
These stand beside the sweep's parent, whose children are its trials alone.
"""

import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moepp.addresses import without_user
from moepp.records import read_json
from moepp.statistics.style import looks
from moepp.tracking.mlflow_store import METRICS_PER_CALL, MirroredRun, connect, find_run, store_uri, stored_name
from moepp.tracking.mlflow_views import ARMS, ARMS_OF, DIFFERENCE, INTERVAL, TAG, arms_view, view_key
from moepp.tracking.settings import TrackingConfig

COLOUR = "mlflow.runColor"


@dataclass(frozen=True)
class ArmRun:
    """Means over seeds, each with `<name>_low` and `<name>_high`; `curves` hold (training tokens, mean over seeds)."""

    values: Mapping[str, float]
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)


def log_arms(directory: Path, tracking: TrackingConfig, runs: Path | str, arms: Mapping[str, ArmRun]) -> None:
    """Brings the runs of a sweep's arms up to its report, and makes the saved view of arms show them. A failing tracker
    costs one line: the report itself is written by then.
    """
    sweep = read_json(directory / "sweep.json")
    try:
        parent = MirroredRun(directory, connect(tracking, runs), runs, directory.name)
        known, colours = parent.state.setdefault("arms", {}), colours_of(sweep)
        about = {ARMS_OF: parent.run_id, "sweep": directory.name, "baseline": sweep["baseline"]}
        for place, (arm, found) in enumerate(arms.items()):
            tags = about | {"arm": arm, COLOUR: colours[arm]}
            known[arm] = _put(parent, tags, _metrics(found, place), known.get(arm, {}))
            parent.save()
        view = arms_view(directory.name, parent.run_id, parent.start_ms)
        parent.put_views({TAG + view_key(parent.run_id, ARMS): view})
    except Exception as error:  # whatever a tracker raises
        uri = without_user(store_uri(tracking, runs))
        print(f"warning: the arms of the report are not in {uri} ({error})", file=sys.stderr)


def colours_of(sweep: Mapping[str, Any]) -> dict[str, str]:
    """`#rrggbb` of each arm, those of the figures of the whole sweep; `sweep` as in sweep.json."""
    arms = (trial.get("of_arm", trial["arm"]) for trial in sweep["trials"])
    return {arm: look["color"] for arm, look in looks(arms, sweep["baseline"]).items()}


def _put(
    parent: MirroredRun, tags: dict[str, str], points: Sequence[tuple[str, float, int]], before: Mapping[str, Any]
) -> dict[str, Any]:
    """A changed mean takes a new run: MLflow would draw the old curve and the new one as one line."""
    from mlflow.entities import Metric

    said = zlib.crc32(repr((tags, points)).encode())
    run = find_run(parent.client, before.get("run_id"))
    if run and before["said"] == said:
        return dict(before)
    if run:
        parent.client.delete_run(run.info.run_id)
    made = parent.client.create_run(parent.state["experiment_id"], run_name=tags["arm"], tags=tags)
    parent.client.log_param(made.info.run_id, "arm", tags["arm"])
    now = int(time.time() * 1000)
    metrics = [Metric(stored_name(name), value, now + i, step) for i, (name, value, step) in enumerate(points)]
    for start in range(0, len(metrics), METRICS_PER_CALL):
        parent.client.log_batch(made.info.run_id, metrics=metrics[start : start + METRICS_PER_CALL])
    parent.client.set_terminated(made.info.run_id)
    return {"run_id": made.info.run_id, "said": said}


def _metrics(found: ArmRun, place: int) -> list[tuple[str, float, int]]:
    """(name, value, step). The interval of the difference stands at the arm's place, beside those of the others."""
    values = [(name, value, 0) for name, value in found.values.items()]
    names = [f"{DIFFERENCE}{end}" for end in ("_low", "", "_high")]
    interval = [(INTERVAL, found.values[name], place) for name in names if name in found.values]
    return [*values, *interval, *((name, value, step) for name, line in found.curves.items() for step, value in line)]
