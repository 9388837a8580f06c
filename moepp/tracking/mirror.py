"""MLflow as a mirror of the run record: training writes metrics.jsonl, a follower copies it to the tracker.

A slow, dead or absent tracker therefore never touches training, and every mirror can be made again from the record.
"""

import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Protocol

from moepp.addresses import without_user
from moepp.config import leaves
from moepp.errors import RunError, UsageError
from moepp.program import program
from moepp.records import MetricsTail, RunRecord, UnreadableRecord, read_json, write_json
from moepp.statistics.markup import code, escaped
from moepp.tracking.arm_runs import COLOUR, colours_of
from moepp.tracking.mlflow_store import NOTE, DeletedRun, MirroredRun, connect, store_lock, store_uri
from moepp.tracking.mlflow_views import ARMS, TAG, saved_views, view_key
from moepp.tracking.models import put_model
from moepp.tracking.settings import TrackingConfig

# The axes people filter runs by. The rest of the config is an artifact: a page of 80 params hides the five that differ.
AXES = {
    "arm": "tags.arm", "size": "tags.size", "seed": "seed", "top_k": "model.top_k", "tau": "model.balance.tau",
    "n_ffn": "model.experts.ffn", "n_zero": "model.experts.zero", "n_copy": "model.experts.copy",
    "n_constant": "model.experts.constant", "gating_residual": "model.gating_residual", "lr": "optim.lr",
    "optimizer": "optim.name",
    "gate": "model.gate", "logits_norm": "model.logits_norm", "capacity_factor": "model.capacity_factor",
    "balance_form": "model.balance.form", "balance_beta": "model.balance.beta",
    "router": "model.router", "selection": "model.selection",
}  # fmt: skip
BUDGETS = {  # as planned, and named otherwise than what is measured: final/active_params, final/flops_per_token
    "tokens": "tokens", "total_params": "total_params", "active_params": "nominal_active_params",
    "flops_per_token": "nominal_flops_per_token",
}  # fmt: skip
NO_PARAMS = re.compile(r"(name|runs|tags\..*|tracking\..*)$")  # keys that trials differ in and nobody compares
LICENCE = "Apache-2.0"  # of the code and of models trained with it; `data_terms` says what the corpus asks for
SECONDS_BETWEEN_PASSES = 5.0  # a pass takes some 20 ms of a core, which may be the one that trains
SECONDS_TO_END = 30.0  # how long a finished run waits for its last pass
LOG_BYTES = 32 * 1024  # of the end of what a failed run printed
# MLflow's errors that one run causes. After any other, such as a server that is away, the next run has no better luck.
OF_ONE_RUN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE", "BAD_REQUEST")


class Mirror:
    """One run record in MLflow. Several processes may mirror the same record."""

    def __init__(self, record: RunRecord, tracking: TrackingConfig, runs: Path | str, parent_run_id: str | None = None):
        self.record, self.runs, self.parent_run_id = record, runs, parent_run_id
        self.uri = without_user(store_uri(tracking, runs))
        self.complete = False
        self.varied: set[str] = set()  # keys beyond the axes that are params too; a sweep's trials share them
        self.known: set[str] = set()  # those that the store has
        self.colours: Mapping[str, str] = {}  # arm -> `#rrggbb`
        self.connect = partial(connect, tracking, runs)  # of a folder's records one asks for all, in each pass
        self._tail = MetricsTail(record)
        self._pending: list[dict[str, float]] = []
        self._run: MirroredRun | None = None

    def sync(self, ended: bool = False) -> None:
        """One pass: brings MLflow up to the record, however often it is called.

        An unfinished record is RUNNING while a process holds it, else KILLED; where the file system has no locks to
        tell, it is RUNNING until this mirror has `ended`. Raises whatever the tracker raises; nothing is lost by that,
        the next pass makes up for it.
        """
        status = self.record.status  # read before the metrics: once it says done, they are all there
        if status == "waiting" or (self.complete and self.varied <= self.known):
            return
        self._pending += self._tail.read()
        provenance = self.record.read("provenance.json")
        opened = self._run is None  # what the store has in it is known then
        if opened:
            start = self._pending[0]["time"] if self._pending else None
            tags = self._tags(provenance) | {NOTE: self._note()}
            self._run = MirroredRun(self.record.path, self.connect(), self.runs, self._name(), start, tags)
        try:
            complete = self._run.state.get("complete") and self.varied <= self.known
            if not complete or not self._run.is_below(self.parent_run_id):
                with store_lock(self.runs):
                    if not opened:
                        self._run.refresh()
                    self._put(self._run, provenance, status, ended)
        except DeletedRun:
            self._run, self._tail, self._pending = None, MetricsTail(self.record), []
            self.sync(ended)  # into a new one
            return
        self._pending, self.known = [], set(self.varied)
        self.complete = bool(self._run.state.get("complete"))

    @property
    def held(self) -> bool | None:
        """As of the record."""
        return self.record.held

    def _put(self, run: MirroredRun, provenance: Mapping[str, Any], status: str, ended: bool) -> None:
        tags, params = self._tags(provenance), axes(self.config, self.record.read("budget.json"), self.varied)
        run.put_texts(self._texts(status))  # MLflow asks for all that is in the run to know where these go
        run.put(tags | run.missing_note(self._note()), params, self._pending)
        run.put_data(self.config.get("data", {}).get("corpus", "data"), provenance.get("data", {}))
        end = int(self._pending[-1]["time"]) if self._pending else None
        run.put_status(self._status(status, ended), end)
        if status in ("done", "pruned"):
            run.put_files([self.record.path / "tables"])
            run.state["complete"] = True
        if status == "done":
            put_model(run, self.record, self._name(), (tags, params), self._pending, data_of(self.config, provenance))
        run.save()

    def _status(self, status: str, ended: bool) -> str:
        """MLflow's word for the record's status."""
        if status in ("done", "failed", "damaged"):
            return "FINISHED" if status == "done" else "FAILED"
        held = self.held
        trained = status == "started" and (not ended if held is None else held)
        return "RUNNING" if trained else "KILLED"

    def _texts(self, status: str) -> dict[str, str]:
        """What a run shows from its first pass on, and the end of what a failed one printed."""
        path = self.record.path
        names = [name for name in ("config.yaml", "provenance.json", "budget.json") if (path / name).exists()]
        texts = {name: (path / name).read_text(errors="replace") for name in names}
        if status == "failed":
            logs = [file for file in (path / "log.txt", *sorted(path.glob("ranks/*.txt"))) if file.exists()]
            texts |= {str(file.relative_to(path)): _end_of(file) for file in logs}
        return texts

    def _name(self) -> str:
        config = self.config
        arm = config.get("tags", {}).get("arm") or config.get("name", self.record.path.parent.name)
        return f"{arm} s{config.get('seed', 0)}"

    @cached_property
    def config(self) -> dict[str, Any]:
        """Read once: parsing YAML takes milliseconds, and a pass may run in the process that trains."""
        return self.record.read("config.yaml")

    def _note(self) -> str:
        path, tags = self.record.path, self.config.get("tags", {})
        lines = [f"Seed {self.config.get('seed', 0)}, record {code(str(path))}."]
        lines += [f"- repeat: {code(f'run.py rerun {path}')}", f"- continue a text: {code(f'run.py generate {path}')}"]
        if {"arm", "baseline"} <= tags.keys() and tags["arm"] != tags["baseline"]:
            lines[0] = f"Arm {code(tags['arm'])} of sweep {code(str(tags.get('sweep')))}, s{lines[0][1:]}"
            sides = f"{path.parent}:{tags['baseline']} {path.parent}:{tags['arm']}"
            compare = code(f"run.py compare {sides}")
            lines.append(f"- what the arm changes, and its results against the baseline's: {compare}")
        return "\n".join([lines[0], "", *lines[1:]])

    def _tags(self, provenance: Mapping[str, Any]) -> dict[str, str]:
        git = provenance.get("git", {})
        tags = {
            **self.config.get("tags", {}),
            "licence": LICENCE, "data_terms": provenance.get("data", {}).get("corpus"),
            "git_sha": git.get("sha"), "git_dirty": git.get("dirty"), "host": provenance.get("host"),
            "mlflow.source.name": provenance.get("command"), "mlflow.source.type": "LOCAL",
            "mlflow.source.git.commit": git.get("sha"),
            "failure": self.record.read("failed.json").get("reason", ""),
            "pruned": self.record.read("pruned.json").get("reason"),
            "mlflow.parentRunId": self.parent_run_id,
            COLOUR: self.colours.get(self.config.get("tags", {}).get("arm", "")),
        }  # fmt: skip
        return {key: str(value) for key, value in tags.items() if value is not None}


def _end_of(log: Path) -> str:
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_BYTES))
        return file.read().decode(errors="replace")


class FolderMirror:
    """All records of `runs/<name>/`; those of a sweep lie under one parent run."""

    def __init__(self, directory: Path, tracking: TrackingConfig, runs: Path | str):
        self.directory, self.tracking, self.runs = directory, tracking, runs
        self.uri = without_user(store_uri(tracking, runs))
        self._views: dict[str, str] = {}
        self._begin()

    def _begin(self) -> None:
        self._mirrors: dict[Path, Mirror] = {}
        self._params: dict[Path, Mapping[str, str]] = {}
        self._parent: MirroredRun | None = None
        self._stored: dict[str, dict[str, str]] = {}  # params of the children that the store had at the first pass
        self._varied: set[str] = set()  # beyond the axes, keys in which the trials differ
        self._colours: dict[str, str] = {}
        self._first: dict[str, Any] = {}  # what the first trial is configured with

    @property
    def held(self) -> bool:
        """Whether a process works in any of the records, as far as locks tell."""
        return any(RunRecord(path.parent).held for path in self.directory.glob("*/lock"))

    def sync(self, ended: bool = False) -> None:
        """One pass over the folder, as `Mirror.sync`: an unfinished sweep is RUNNING until this mirror has `ended`, and
        as long as any of its records is held. Raises the first error that one record or its run has caused when all
        others have been mirrored.
        """
        sweep = read_json(self.directory / "sweep.json")
        if sweep and self._parent is None:
            self._parent = _open_parent(self.directory, sweep, self.tracking, self.runs)
            self._stored, self._colours = self._parent.children(), colours_of(sweep)
        failures = self._sync_records(ended)
        if self._parent:
            try:
                self._put_parent(self._parent, sweep, ended)
            except DeletedRun:
                self._begin()
                self.sync(ended)  # below a new one
                return
        if failures:
            raise failures[0]

    def _sync_records(self, ended: bool) -> list[Exception]:
        failures = []
        parent_run_id = self._parent.run_id if self._parent else None
        paths = [config.parent for config in sorted(self.directory.glob("*/config.yaml"))]
        for path in paths:  # all, before the first is put: what one trial is known to differ in is a param of each
            if path not in self._mirrors:
                failures += _tried(lambda path=path: self._add(path, parent_run_id))
        connected = cache(partial(connect, self.tracking, self.runs))
        for mirror in list(self._mirrors.values()):
            mirror.connect = connected
            failures += _tried(lambda mirror=mirror: mirror.sync(ended))
        return failures

    def _put_parent(self, parent: MirroredRun, sweep: Mapping[str, Any], ended: bool) -> None:
        parent.refresh()  # another worker may have closed the sweep
        self._put_views(parent)
        wanted = [trial for trial in sweep["trials"] if not trial.get("left_out")]  # by the newest call
        statuses = {RunRecord(self.directory / trial["path"]).status for trial in wanted}
        settled = "FAILED" if statuses & {"failed", "damaged"} else "FINISHED"
        open_ = statuses - {"done", "failed", "damaged", "pruned"} or len(wanted) < sweep.get("planned", 0)
        worked_at = open_ and (not ended or self.held)
        parent.put_status("RUNNING" if worked_at else "KILLED" if open_ else settled)

    def _add(self, path: Path, parent_run_id: str | None) -> None:
        """What is complete in the store is asked for in one question, not run by run: a sweep may have a thousand."""
        mirror = Mirror(RunRecord(path), self.tracking, self.runs, parent_run_id)
        state = read_json(path / "mlflow.json") or {}
        stored = self._stored.get(state.get("run_id", ""))
        mirror.complete = bool(state.get("complete")) and stored is not None
        mirror.varied, mirror.known, mirror.colours = self._varied, set(stored or ()), self._colours
        if mirror.complete:  # its params tell: a config takes milliseconds to read
            self._params[path] = stored
            self._varied |= {name for name in stored if "." in name}
        else:
            self._first = self._first or _compared(RunRecord(min(self._mirrors, default=path)).read("config.yaml"))
            own = _compared(mirror.config)
            keys = own.keys() | self._first.keys()
            self._varied |= {key for key in keys if own.get(key) != self._first.get(key)}
        self._mirrors[path] = mirror

    def _params_of(self, path: Path, mirror: Mirror) -> Mapping[str, str]:
        if path not in self._params or not self._varied <= self._params[path].keys():
            self._params[path] = axes(mirror.config, {}, self._varied)
        return self._params[path]

    def _put_views(self, parent: MirroredRun) -> None:
        known = [self._params_of(path, mirror) for path, mirror in self._mirrors.items()]
        arms = list(dict.fromkeys(run["arm"] for run in known if "arm" in run))
        names = dict.fromkeys([*AXES, *(n for run in known for n in run if n.startswith("n_")), *sorted(self._varied)])
        varied = [n for n in names if n not in ("arm", "seed") and len({run.get(n) for run in known}) > 1]
        views = saved_views(self.directory.name, parent.run_id, parent.start_ms, arms, varied)
        if parent.state.get("arms"):  # a report has made the view of arms
            del views[TAG + view_key(parent.run_id, ARMS)]
        if views != self._views:
            parent.put_views(views)
            self._views = views


def _compared(config: Mapping[str, Any]) -> dict[str, Any]:
    """What trials may differ in beside the axes."""
    return {key: value for key, value in leaves(config) if not NO_PARAMS.match(key) and key not in AXES.values()}


def _tried(put: Callable[[], None]) -> list[Exception]:
    """The error that one run has caused; any other is raised."""
    try:
        put()
    except Exception as error:
        if not _is_of_one_run(error):
            raise
        return [error]
    return []


def _is_of_one_run(error: Exception) -> bool:
    return isinstance(error, UnreadableRecord | PermissionError) or getattr(error, "error_code", "") in OF_ONE_RUN


class Syncs(Protocol):
    uri: str

    def sync(self, ended: bool = False) -> None: ...


@contextmanager
def follow(mirror: Syncs, patience: float | None = None) -> Iterator[None]:
    """Runs `mirror.sync` every few seconds in a thread until the block ends, and a last time then, for at most
    `patience` seconds (SECONDS_TO_END). A failing tracker costs one line, never the run.
    """
    stop = threading.Event()
    warned = threading.Event()

    def attempt(ended: bool) -> None:
        try:
            mirror.sync(ended)
        except Exception as error:  # whatever a tracker raises, it must not end the training beside it
            if not warned.is_set():
                warned.set()
                _warn(mirror.uri, _reason(error))

    def passes() -> None:
        while not stop.wait(SECONDS_BETWEEN_PASSES):
            attempt(ended=False)
        attempt(ended=True)

    thread = threading.Thread(target=passes, daemon=True, name="mlflow")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        patience = SECONDS_TO_END if patience is None else patience
        thread.join(patience)
        if thread.is_alive() and not warned.is_set():
            _warn(mirror.uri, f"no answer within {patience:.0f} s")


def sync_all(runs: Path | str, tracking: TrackingConfig) -> int:
    """Mirrors every record below `runs`; returns how many there are. Raises RunError when the tracker fails."""
    if tracking.backend != "mlflow":
        raise UsageError(f"tracking.backend={tracking.backend} mirrors nothing; use tracking.backend=mlflow")
    failures: list[Exception] = []
    for directory in sorted(path for path in Path(runs).glob("*") if path.is_dir()):
        try:
            FolderMirror(directory, as_recorded(tracking, directory), runs).sync(ended=True)
        except Exception as error:  # whatever a tracker raises
            failures.append(error)
            if not _is_of_one_run(error):
                break
    for error in failures:
        if not isinstance(error, UnreadableRecord):
            raise RunError(f"cannot mirror to {store_uri(tracking, runs)}: {_reason(error)}") from error
    if failures:
        raise failures[0]
    return len(list(Path(runs).glob("*/*/config.yaml")))


def as_recorded(tracking: TrackingConfig, directory: Path) -> TrackingConfig:
    """Where `tracking` names no address or experiment, those of the records of `runs/<name>`: what their command or
    their sweep's file named.
    """
    first = min(directory.glob("*/config.yaml"), default=None)
    saved = RunRecord(first.parent).read("config.yaml").get("tracking", {}) if first else {}
    default = TrackingConfig()
    own = {key: saved[key] for key in ("uri", "experiment") if key in saved}
    return replace(tracking, **{k: v for k, v in own.items() if getattr(tracking, k) == getattr(default, k)})


def mirror_again(record: RunRecord) -> None:
    """Says that a mirrored run has got more metrics since: the next pass, or `run.py sync`, sends them."""
    path = record.path / "mlflow.json"
    state = read_json(path)
    if state and state.pop("complete", False):
        write_json(path, state)


def log_report(
    directory: Path,
    tracking: TrackingConfig,
    runs: Path | str,
    experiment: str,
    metrics: Mapping[str, float],
    files: list[Path],
    note: str,
) -> None:
    """Puts what an experiment found onto the parent run of a sweep that it read: `metrics`, `files` as artifacts in a
    folder of its name, and `note` (markdown) as its part of the description. A failing tracker costs one line: the
    report itself is written by then.
    """
    try:
        parent = _open_parent(directory, read_json(directory / "sweep.json"), tracking, runs)
        parent.put_values(metrics)
        parent.put_section(experiment, note)
        parent.put_files(files, experiment)
    except Exception as error:  # whatever a tracker raises
        uri = without_user(store_uri(tracking, runs))
        print(
            f"warning: the report is not in {uri} ({_reason(error)}); `{program()} report` tries again", file=sys.stderr
        )


def _open_parent(directory: Path, sweep: Mapping[str, Any], tracking: TrackingConfig, runs: Path | str) -> MirroredRun:
    run = MirroredRun(directory, connect(tracking, runs), runs, directory.name)
    tags = {"sweep": directory.name, "experiment": sweep["name"], "paper_table": sweep.get("paper", "")}
    tags |= {key: sweep[key] for key in ("baseline", "scale", "match")}
    run.put(tags | run.missing_note(escaped(sweep["question"])))
    return run


def axes(config: Mapping[str, Any], budget: Mapping[str, Any], varied: Iterable[str] = ()) -> dict[str, str]:
    """Params of a run, the keys `varied` among them. `null` is a value like any other: MLflow's charts leave out runs
    that lack a param.
    """
    known = dict(leaves(config))
    others = config.get("model", {}).get("experts", {}).get("others", {})
    values = {name: known[key] for name, key in AXES.items() if key in known}
    values |= {f"n_{kind}": count for kind, count in others.items()}
    values |= {name: round(budget[planned]) for planned, name in BUDGETS.items() if planned in budget}
    values |= {key: known.get(key) for key in varied}
    return {name: "null" if value is None else str(value) for name, value in values.items()}


def data_of(config: Mapping[str, Any], provenance: Mapping[str, Any]) -> tuple[str, str] | None:
    """The text of a run and the digest of its tokens, as MLflow names a data set; None where no digest is known."""
    digest = provenance.get("data", {}).get("digest")
    return (config.get("data", {}).get("corpus", "data"), digest) if digest else None


def _reason(error: BaseException) -> str:
    """The first line of what began it: MLflow wraps "database is locked" in pages, "refused" in a paragraph."""
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    return without_user((str(error).strip().splitlines() or [type(error).__name__])[0])


def _warn(uri: str, reason: str) -> None:
    print(f"warning: cannot mirror to {uri} ({reason}); `{program()} sync` will catch up", file=sys.stderr)
