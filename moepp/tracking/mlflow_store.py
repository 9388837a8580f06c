"""The MLflow store: its address, a client that stays quiet, and runs in it. Imports mlflow only when used."""

import fcntl
import logging
import os
import posixpath
import re
import secrets
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from importlib.metadata import entry_points
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from moepp.addresses import without_user
from moepp.errors import UsageError
from moepp.locks import locked
from moepp.records import read_json, write_json

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Metric, Param, Run, RunTag

    from moepp.tracking.settings import TrackingConfig

METRICS_PER_CALL = 1000  # MLflow refuses more
RUNS_PER_CALL = 1000
NOTE = "mlflow.note.content"  # the tag that its pages show as the description, in markdown
NAME_LENGTH, PARAM_LENGTH, VALUE_LENGTH = 250, 6000, 8000  # characters of a name, a param, a tag; MLflow refuses more
DATABASES, SERVERS = ("sqlite", "postgresql", "mysql", "mssql"), ("http", "https", "databricks")
PLACES = {  # of an address, what follows its colon, and an example
    "sqlite": (r"///[^?#]", "sqlite:///mlflow.db"),
    "http": (r"//[^/?#]", "http://tracker:5000"),
    "https": (r"//[^/?#]", "https://tracker"),
}
KEY = "record_key"  # the tag by which a run is found whose id never arrived
REFUSED = re.compile(r"[^\w./ -]", re.ASCII)  # what MLflow does not take in a name


class DeletedRun(Exception):
    """Somebody has deleted the run in the store since it was opened here."""


class Store(NamedTuple):
    """Where runs are put; see `connect`."""

    client: "MlflowClient"
    experiment_id: str


def store_uri(tracking: "TrackingConfig", runs: Path | str) -> str:
    """`tracking.uri`, else MLFLOW_TRACKING_URI, else the SQLite file in the runs folder.

    With user and password, for this process alone: print it `without_user`. Raises UsageError for an address that is
    none, such as a folder of files, which MLflow has given up.
    """
    ours = os.environ.get("MLFLOW_TRACKING_URI", "")
    uri = tracking.uri or ours
    if uri == without_user(ours):  # as a record keeps it
        uri = ours
    if not uri:
        path = str(Path(runs).resolve()).replace("%", "%25").replace("?", "%3F")  # else an escape, and a query
        return f"sqlite:///{path}/mlflow.db"
    if _scheme(uri) not in (known := (*DATABASES, *SERVERS, *entry_points(group="mlflow.tracking_store").names)):
        raise UsageError(
            f"tracking.uri={uri} is no address of a tracker: it begins with one of {', '.join(known)}, and is no longer"
            " a folder; use tracking.uri=sqlite:///mlflow.db"
        )
    place, example = PLACES.get(_scheme(uri), ("", ""))
    if not re.match(place, uri.partition(":")[2]):
        raise UsageError(f"tracking.uri={without_user(uri)} names no place; write it as {example}")
    return uri


def is_server(uri: str) -> bool:
    """Whether a server answers there; otherwise it is a database."""
    return _scheme(uri) in SERVERS


def _scheme(uri: str) -> str:
    return uri.partition(":")[0].partition("+")[0].lower()


def connect(tracking: "TrackingConfig", runs: Path | str) -> Store:
    """A client of the store and the id of the experiment, which is created on first use."""
    uri = store_uri(tracking, runs)
    # Set before mlflow reads them: report to nobody but the user's tracker, and fail within seconds when that is
    # away, for the follower tries again anyway.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    from mlflow import MlflowClient

    for chatty in ("mlflow", "alembic"):  # some forty lines about migrations when a store is created
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # A page of traceback at each failed attempt; the one who called says in a line what failed.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    with store_lock(runs):
        _create_whole(uri)
        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(tracking.experiment)
        if found is not None:
            if found.lifecycle_stage != "active":
                _restore(client, found)
            return Store(client, found.experiment_id)
        # A server knows where its artifacts go; a database alone would put them into the working directory.
        artifacts = None if is_server(uri) else (Path(runs).resolve() / "mlartifacts").as_uri()
        kind = {"mlflow.experimentKind": "custom_model_development"}  # which pages MLflow opens it with
        made = client.create_experiment(tracking.experiment, artifact_location=artifacts, tags=kind)
        return Store(client, made)


def _create_whole(uri: str) -> None:
    """A new SQLite file gets its tables under another name first: one that is killed between two of some forty
    migrations leaves a database that no MLflow opens again.
    """
    from mlflow import MlflowClient

    file = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or set("%?:") & set(str(file)) or file.exists():
        return
    for left in file.parent.glob(f".{file.name}.*.new"):
        left.unlink()
    begun = file.with_name(f".{file.name}.{secrets.token_hex(4)}.new")  # MLflow keeps an engine for each address
    MlflowClient(tracking_uri=f"sqlite:///{begun}").search_experiments(max_results=1)
    begun.rename(file)


def _restore(client: "MlflowClient", experiment: "Experiment") -> None:
    """A deleted experiment: the records ask for it, and the store keeps its name."""
    client.restore_experiment(experiment.experiment_id)
    print(f"MLflow's experiment {experiment.name} was deleted, and is restored for these runs", file=sys.stderr)


@contextmanager
def store_lock(runs: Path | str) -> Iterator[None]:
    """One thread of one process at a time: two at once would break a new store, or open two runs for one record."""
    folder = Path(runs)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".mlflow.lock", "w") as file:
        locked(fcntl.flock, file, fcntl.LOCK_EX)
        yield


def find_run(client: "MlflowClient", run_id: str | None) -> "Run | None":
    """The run, unless the store does not know it or somebody has deleted it."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run and run.info.lifecycle_stage == "active" else None


class MirroredRun:
    """An MLflow run and what the store says is in it, so that a pass sends only what is new.

    mlflow.json beside the record keeps which run it is. What was sent is asked of the store each time, for a note of
    one's own is wrong as soon as a process dies, an answer is lost, or another worker mirrors the same record. Only of
    small files it keeps a checksum, for artifacts cannot be asked for theirs.
    """

    def __init__(
        self,
        directory: Path,
        store: Store,
        runs: Path | str,
        name: str,
        start_ms: float | None = None,
        tags: Mapping[str, str] | None = None,
    ):
        """Where the store has no run of `directory` yet, it makes one: with `tags`, which spares a request."""
        self.client, experiment_id = store
        self._path, self._of_server = directory / "mlflow.json", is_server(self.client.tracking_uri)
        with store_lock(runs):
            self.state: dict[str, Any] = read_json(self._path) or {}
            self._saved = deepcopy(self.state)
            run = find_run(self.client, self.state.get("run_id"))
            if run is None:  # never mirrored, deleted, or into a store that has been deleted since
                # MLflow's databases check no names here; what they may not like is left to `put`.
                plain = {key: value for key, value in stored_tags(tags or {}).items() if not REFUSED.search(key)}
                run = self._create(experiment_id, name, start_ms, plain)
                self.state |= {"run_id": run.info.run_id, "experiment_id": run.info.experiment_id}
                self.save()
            elif "experiment_id" not in self.state:  # the addresses of MLflow's pages need it
                self.state["experiment_id"] = run.info.experiment_id
                self.save()
        self.run_id: str = run.info.run_id
        self.start_ms: int = run.info.start_time
        self._know(run)

    def _create(self, experiment_id: str, name: str, start_ms: float | None, tags: Mapping[str, str]) -> "Run":
        """A new run, or the one whose id was lost with the store's answer. Its key is on the disk before the store is
        asked for the run. Where the store refuses a tag, `put` finds which.
        """
        from mlflow.exceptions import MlflowException

        if "run_id" in self.state or "key" not in self.state:
            self.state = {"key": secrets.token_hex(8)}
            self.save()
        elif made := self._with_key(experiment_id):
            return made[0]
        start, key = None if start_ms is None else int(start_ms), {KEY: self.state["key"]}
        try:
            return self.client.create_run(experiment_id, start_time=start, run_name=name, tags={**tags, **key})
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
        return self.client.create_run(experiment_id, start_time=start, run_name=name, tags=key)

    def _with_key(self, experiment_id: str) -> "list[Run]":
        found = self.client.search_runs([experiment_id], f"tags.{KEY} = '{self.state['key']}'")
        return sorted(found, key=lambda run: run.info.run_id)

    def _delete_doubles(self) -> None:
        """A slow server may carry out a request after it was given up and made again."""
        if self._of_server and "key" in self.state:
            for run in self._with_key(self.state["experiment_id"]):
                if run.info.run_id != self.run_id:
                    self.client.delete_run(run.info.run_id)

    def refresh(self) -> None:
        """Asks the store what it has. What is put afterwards must be put under the same `store_lock`. Raises
        DeletedRun.
        """
        run = find_run(self.client, self.run_id)
        if run is None:
            raise DeletedRun(f"run {self.run_id} was deleted")
        self._know(run)

    def is_below(self, parent_run_id: str | None) -> bool:
        return self._tags.get("mlflow.parentRunId") == parent_run_id

    def _know(self, run: "Run") -> None:
        self._tags, self._params = dict(run.data.tags), dict(run.data.params)
        stored = run.data.to_proto().metrics
        self._steps = {metric.key: metric.step for metric in stored}
        self._values = {metric.key: metric.value for metric in stored}
        self._status = run.info.status
        self._has_data = bool(run.inputs and run.inputs.dataset_inputs)

    def children(self) -> dict[str, dict[str, str]]:
        """Params of the runs below this one, by run id."""
        found, token = {}, None
        while True:
            query = f"tags.`mlflow.parentRunId` = '{self.run_id}'"
            page = self.client.search_runs(
                [self.state["experiment_id"]], query, max_results=RUNS_PER_CALL, page_token=token
            )
            found |= {run.info.run_id: dict(run.data.params) for run in page}
            token = page.token
            if not token:
                return found

    def save(self) -> None:
        if self.state != self._saved:
            write_json(self._path, self.state)
            self._saved = deepcopy(self.state)

    def put(
        self,
        tags: Mapping[str, str],
        params: Mapping[str, str] | None = None,
        lines: Sequence[Mapping[str, float]] = (),
    ) -> None:
        """Tags follow the record; params are immutable in MLflow, so each is sent once. Of the `lines` of metrics it
        sends each metric's steps after the last one in the store: a resumed run writes earlier steps a second time.

        Batches go out in the order of steps and are stored whole or not at all, so no step before the last is missing.
        `final/*` goes to step 0, where MLflow draws bars; under the last step it would draw curves of one point. A
        final value that was replaced in the record is sent again: MLflow shows the newest.
        """
        from mlflow.entities import Param, RunTag

        tags = {key: value for key, value in stored_tags(tags).items() if self._tags.get(key, "") != value}
        params = {stored_name(key): value[:PARAM_LENGTH] for key, value in (params or {}).items()}
        params = {key: value for key, value in params.items() if key not in self._params}
        items = [*(Param(*pair) for pair in params.items()), *(RunTag(*pair) for pair in tags.items())]
        metrics, steps = self._new_metrics(lines)
        first = METRICS_PER_CALL - len(items)
        self._log(items, metrics[:first])
        self._send(metrics[first:])
        self._tags.update(tags)
        self._params.update(params)
        self._steps = steps

    def _log(self, items: "list[Param | RunTag]", metrics: "Sequence[Metric]" = ()) -> None:
        """All at once; where the store refuses that, one by one, so that one bad item costs itself alone."""
        from mlflow.entities import RunTag
        from mlflow.exceptions import MlflowException

        if not items:
            self._send(metrics)
            return
        tags = [item for item in items if isinstance(item, RunTag)]
        params = [item for item in items if item not in tags]
        try:
            self.client.log_batch(self.run_id, metrics=metrics, params=params, tags=tags)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            if len(items) == 1 and not metrics:
                said = f"{items[0].key}={items[0].value[:80]!r}"
                print(f"warning: MLflow refuses {said} of {self._path.parent}", file=sys.stderr)
                return
            for item in items:
                self._log([item])
            self._send(metrics)

    def missing_note(self, markdown: str) -> dict[str, str]:
        """The tag of the run's description where it has none: people write there too."""
        return {} if self._tags.get(NOTE) else {NOTE: markdown}

    def put_section(self, name: str, markdown: str) -> None:
        """One of several parts of a description, in place of the part of the same name and of any other text."""
        sections = self.state.setdefault("sections", {})
        sections[name] = markdown
        self.save()
        self.put({NOTE: "\n\n---\n\n".join(sections.values())[:VALUE_LENGTH]})

    def put_views(self, views: Mapping[str, str]) -> None:
        """Saved views of the run's experiment (moepp/tracking/mlflow_views.py), as tags."""
        known = self.client.get_experiment(self.state["experiment_id"]).tags
        for key, value in views.items():
            if known.get(key) != value:
                self.client.set_experiment_tag(self.state["experiment_id"], key, value)

    def put_data(self, name: str, header: Mapping[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        if self._has_data or "digest" not in header:
            return
        dataset = Dataset(name, header["digest"], source_type="local", source=header.get("corpus", name))
        context = [InputTag("mlflow.data.context", "training")]
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, context)])
        self._has_data = True

    def _new_metrics(self, lines: Sequence[Mapping[str, float]]) -> "tuple[list[Metric], dict[str, int]]":
        """What is to be sent of the lines, and each metric's last step then."""
        from mlflow.entities import Metric

        steps = dict(self._steps)
        metrics = []
        for line in lines:
            for key, value in line.items():
                if key in ("step", "time") or not isinstance(value, int | float):
                    continue
                key, step = stored_name(key), 0 if key.startswith("final/") else int(line["step"])
                replaced = key.startswith("final/") and step == steps.get(key) and value != self._values.get(key)
                if step > steps.get(key, -1) or replaced:
                    metrics.append(Metric(key, float(value), int(line["time"]), step))
                    steps[key] = step
        return metrics, steps

    def put_values(self, values: Mapping[str, float]) -> None:
        """Metrics without a history: the newest values count."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._send([Metric(stored_name(key), value, now, 0) for key, value in values.items()])

    def _send(self, metrics: "Sequence[Metric]") -> None:
        for start in range(0, len(metrics), METRICS_PER_CALL):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + METRICS_PER_CALL])

    def put_texts(self, texts: Mapping[str, str]) -> None:
        """Small artifacts by name, each where it is new or has changed. `save` remembers what was sent."""
        sent = self.state.setdefault("sent", {})
        checksums = {name: zlib.crc32(text.encode()) for name, text in texts.items()}
        new = [name for name, checksum in checksums.items() if sent.get(name) != checksum]
        if not new:
            return
        with TemporaryDirectory() as folder:
            for name in new:
                (path := Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                path.write_text(texts[name])
            self.client.log_artifacts(self.run_id, folder)
        sent |= {name: checksums[name] for name in new}

    def put_files(self, paths: list[Path], folder: str | None = None) -> None:
        for path in paths:
            if path.is_dir():
                self.client.log_artifacts(self.run_id, str(path), path.name)
            elif path.exists():
                self.client.log_artifact(self.run_id, str(path), folder)

    def put_status(self, status: str, end_ms: int | None = None) -> None:
        if status == self._status:
            return
        if status == "RUNNING":
            self.client.update_run(self.run_id, status)
        else:
            self.client.set_terminated(self.run_id, status, end_ms)
            self._delete_doubles()
        self._status = status


def stored_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """As the store takes them, names and values."""
    return {stored_name(key): value[:VALUE_LENGTH] for key, value in tags.items()}


def stored_name(key: str) -> str:
    """`key` of a metric, param or tag with `_` for every character that MLflow refuses: arms are called zero+copy or
    lr=0.001,tau=0.5. It takes no path that leads elsewhere, either.
    """
    return posixpath.normpath(REFUSED.sub("_", key)).lstrip("./ ")[:NAME_LENGTH] or "_"
