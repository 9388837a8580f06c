"""The checkpoint of a finished run as a LoggedModel: MLflow's Models page lists and compares them by what was measured.

The weights stay in the record, once; the model says where they are.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from moepp.records import RunRecord
from moepp.tracking.mlflow_store import NOTE, MirroredRun, stored_name, stored_tags

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel, Metric

KIND = "moepp"  # MLflow's model type
FINAL = "final/"  # measured of the finished model, downstream tasks too
REFUSED = re.compile(r"[/:.%\"']")  # in a model's name


def put_model(
    run: MirroredRun,
    record: RunRecord,
    name: str,
    about: tuple[Mapping[str, str], Mapping[str, str]],
    lines: Sequence[Mapping[str, float]],
    dataset: tuple[str, str] | None,
) -> None:
    """Finds or makes the model of a run whose record holds a checkpoint, and attaches the final values among `lines`
    of its metrics. `about` is its tags and params; `dataset` its text and the digest of its tokens.
    """
    if not any((record.path / "checkpoints").glob("*")):
        return
    model = _model_of(run) or _make(run, record, name, *about)
    metrics = [metric for line in lines for metric in _finals(line, model.model_id, dataset)]
    if metrics:
        run.client.log_batch(run.run_id, metrics=metrics)


def _model_of(run: MirroredRun) -> "LoggedModel | None":
    """Asked of the store, for a note of one's own is wrong as soon as somebody deletes the model there."""
    place = [run.state["experiment_id"]]
    return next(iter(run.client.search_logged_models(place, f"source_run_id = '{run.run_id}'", max_results=1)), None)


def _make(
    run: MirroredRun, record: RunRecord, name: str, tags: Mapping[str, str], params: Mapping[str, str]
) -> "LoggedModel":
    kept = {"checkpoint": str(record.path / "checkpoints"), NOTE: _note(record)}
    kept |= {key: value for key, value in tags.items() if not key.startswith("mlflow.")}
    model = run.client.create_logged_model(
        run.state["experiment_id"],
        REFUSED.sub("_", name),
        source_run_id=run.run_id,
        tags=stored_tags(kept),
        params={stored_name(key): value for key, value in params.items()},
        model_type=KIND,
    )
    return run.client.finalize_logged_model(model.model_id, "READY")


def _note(record: RunRecord) -> str:
    path = record.path
    return (
        f"Weights: `{path}/checkpoints`, in the run's record; nothing is copied.\n\n"
        f"- continue a text: `run.py generate {path}`\n- score on tasks: `run.py evaluate {path}`\n"
    )


def _finals(line: Mapping[str, float], model_id: str, dataset: tuple[str, str] | None) -> list["Metric"]:
    from mlflow.entities import Metric

    name, digest = dataset or (None, None)
    return [
        Metric(stored_name(key), float(value), int(line["time"]), 0, model_id, name, digest)
        for key, value in line.items()
        if key.startswith(FINAL) and isinstance(value, int | float)
    ]
