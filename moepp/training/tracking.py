"""MLflow as a mirror of the run record: training writes metrics.jsonl, a follower copies it to the tracker.

A slow, dead or absent tracker therefore never touches training, and every mirror can be made again from the record.
"""

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from moepp.config import leaves
from moepp.errors import RunError, UsageError
from moepp.records import MetricsTail, RunRecord, UnreadableRecord, read_json, write_json
from moepp.training.mlflow_store import MirroredRun, store_lock, store_uri
from moepp.training.mlflow_views import saved_views

# The axes people filter runs by. The rest of the config is an artifact: a page of 80 params hides the five that differ.
AXES = {
    "arm": "tags.arm", "size": "tags.size", "seed": "seed", "top_k": "model.top_k", "tau": "model.balance.tau",
    "n_ffn": "model.experts.ffn", "n_zero": "model.experts.zero", "n_copy": "model.experts.copy",
    "n_constant": "model.experts.constant", "gating_residual": "model.gating_residual", "lr": "optim.lr",
    "gate": "model.gate", "logits_norm": "model.logits_norm", "capacity_factor": "model.capacity_factor",
    "balance_form": "model.balance.form", "balance_beta": "model.balance.beta",
    "router": "model.router", "selection": "model.selection",
}  # fmt: skip
BUDGETS = ("tokens", "total_params", "active_params", "flops_per_token")
LICENCE = "Apache-2.0"  # of the code and of models trained with it; `data_terms` says what the corpus asks for
SECONDS_BETWEEN_PASSES = 5.0  # a pass takes some 20 ms of a core, which may be the one that trains
SECONDS_TO_END = 30.0  # how long a finished run waits for its last pass


@dataclass
class TrackingConfig:
    """Where runs can be looked at. The run record is written whatever stands here."""

    backend: Literal["mlflow", "jsonl"] = "mlflow"  # jsonl: the run record alone
    uri: str = ""  # empty: MLFLOW_TRACKING_URI, else sqlite:///<runs>/mlflow.db
    experiment: str = "moepp"


class Mirror:
    """One run record in MLflow. Several processes may mirror the same record."""

    def __init__(self, record: RunRecord, tracking: TrackingConfig, runs: Path | str, parent_run_id: str | None = None):
        self.record, self.tracking, self.runs, self.parent_run_id = record, tracking, runs, parent_run_id
        self.uri = store_uri(tracking, runs)
        self.complete = False
        self._tail = MetricsTail(record)
        self._pending: list[dict[str, float]] = []
        self._run: MirroredRun | None = None

    def sync(self, ended: bool = False) -> None:
        """One pass: brings MLflow up to the record, however often it is called.

        `ended` says that nobody trains this record any more, so an unfinished one was interrupted. Raises whatever the
        tracker raises; nothing is lost by that, the next pass makes up for it.
        """
        status = self.record.status  # read before the metrics: once it says done, they are all there
        if status == "waiting" or self.complete:
            return
        self._pending += self._tail.read()
        if self._run is None:
            start = self._pending[0]["time"] if self._pending else None
            self._run = MirroredRun(self.record.path, self.tracking, self.runs, self._name(), start)
        if not self._run.state.get("complete"):
            with store_lock(self.runs):
                self._put(self._run, status, ended)
        self._pending = []
        self.complete = bool(self._run.state.get("complete"))

    def _put(self, run: MirroredRun, status: str, ended: bool) -> None:
        provenance = self.record.read("provenance.json")
        run.refresh()
        run.put(tags=self._tags(provenance), params=axes(self.config, self.record.read("budget.json")))
        run.put_note(self._note())
        run.put_data(self.config.get("data", {}).get("corpus", "data"), provenance.get("data", {}))
        run.put_metrics(self._pending)
        end = int(self._pending[-1]["time"]) if self._pending else None
        if status == "done":
            run.put_files([self.record.path / n for n in ("config.yaml", "provenance.json", "budget.json", "tables")])
            run.put_status("FINISHED", end)
            run.state["complete"] = True
            run.save()
        elif status == "failed":
            run.put_status("FAILED", end)
        elif status == "pruned":
            run.put_status("KILLED", end)
            run.state["complete"] = True
            run.save()
        else:
            run.put_status("KILLED" if ended else "RUNNING", end)

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
        lines = [f"Seed {self.config.get('seed', 0)}, record `{path}`."]
        lines += [f"- repeat: `run.py rerun {path}`", f"- continue a text: `run.py generate {path}`"]
        if {"arm", "baseline"} <= tags.keys() and tags["arm"] != tags["baseline"]:
            lines[0] = f"Arm `{tags['arm']}` of sweep `{tags.get('sweep')}`, {lines[0].replace('Seed', 'seed')}"
            sides = f"{path.parent}:{tags['baseline']} {path.parent}:{tags['arm']}"
            lines.append(f"- what the arm changes, and its results against the baseline's: `run.py compare {sides}`")
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
        }  # fmt: skip
        return {key: str(value) for key, value in tags.items() if value is not None}


class FolderMirror:
    """All records of `runs/<name>/`; those of a sweep lie under one parent run."""

    def __init__(self, directory: Path, tracking: TrackingConfig, runs: Path | str):
        self.directory, self.tracking, self.runs = directory, tracking, runs
        self.uri = store_uri(tracking, runs)
        self._mirrors: dict[Path, Mirror] = {}
        self._params: dict[Path, Mapping[str, str]] = {}
        self._parent: MirroredRun | None = None
        self._stored: dict[str, dict[str, str]] = {}  # params of the children that the store had at the first pass
        self._views: dict[str, str] = {}

    def sync(self, ended: bool = False) -> None:
        """One pass over the folder, as `Mirror.sync`. Raises UnreadableRecord for the first of such records when all
        others have been mirrored.
        """
        unreadable: list[UnreadableRecord] = []
        sweep = read_json(self.directory / "sweep.json")
        if sweep and self._parent is None:
            self._parent = _open_parent(self.directory, sweep, self.tracking, self.runs)
            self._stored = self._parent.children()
        parent_run_id = self._parent.run_id if self._parent else None
        for config in sorted(self.directory.glob("*/config.yaml")):
            path = config.parent
            try:
                if path not in self._mirrors:
                    self._add(path, parent_run_id)
                self._mirrors[path].sync(ended)
            except UnreadableRecord as error:
                unreadable.append(error)
        if self._parent:
            self._put_views(self._parent)
            self._parent.refresh()  # another worker may have closed the sweep
            wanted = [trial for trial in sweep["trials"] if not trial.get("left_out")]  # by the newest call
            statuses = {RunRecord(self.directory / trial["path"]).status for trial in wanted}
            unfinished = "KILLED" if ended else "RUNNING"
            settled = "FAILED" if "failed" in statuses else "FINISHED"
            open_ = statuses - {"done", "failed", "pruned"} or len(wanted) < sweep.get("planned", 0)
            self._parent.put_status(unfinished if open_ else settled)
        if unreadable:
            raise unreadable[0]

    def _add(self, path: Path, parent_run_id: str | None) -> None:
        """What is complete in the store is asked for in one question, not run by run: a sweep may have a thousand."""
        mirror = Mirror(RunRecord(path), self.tracking, self.runs, parent_run_id)
        state = read_json(path / "mlflow.json") or {}
        stored = self._stored.get(state.get("run_id", ""))
        mirror.complete = bool(state.get("complete")) and stored is not None
        self._params[path] = stored if mirror.complete else axes(mirror.config, {})
        self._mirrors[path] = mirror

    def _put_views(self, parent: MirroredRun) -> None:
        known = self._params.values()
        arms = list(dict.fromkeys(run["arm"] for run in known if "arm" in run))
        varied = [n for n in AXES if n not in ("arm", "seed") and len({run.get(n) for run in known}) > 1]
        views = saved_views(self.directory.name, parent.run_id, parent.start_ms, arms, varied)
        if views != self._views:
            parent.put_views(views)
            self._views = views


class Syncs(Protocol):
    uri: str

    def sync(self, ended: bool = False) -> None: ...


@contextmanager
def follow(mirror: Syncs) -> Iterator[None]:
    """Runs `mirror.sync` every few seconds in a thread until the block ends, and a last time then. A failing tracker
    costs one line, never the run.
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
        thread.join(SECONDS_TO_END)
        if thread.is_alive() and not warned.is_set():
            _warn(mirror.uri, f"no answer within {SECONDS_TO_END:.0f} s")


def sync_all(runs: Path | str, tracking: TrackingConfig) -> int:
    """Mirrors every record below `runs`; returns how many there are. Raises RunError when the tracker fails."""
    if tracking.backend != "mlflow":
        raise UsageError(f"tracking.backend={tracking.backend} mirrors nothing; use tracking.backend=mlflow")
    unreadable: list[UnreadableRecord] = []
    try:
        for directory in sorted(path for path in Path(runs).glob("*") if path.is_dir()):
            try:
                FolderMirror(directory, tracking, runs).sync()
            except UnreadableRecord as error:
                unreadable.append(error)
    except Exception as error:
        raise RunError(f"cannot mirror to {store_uri(tracking, runs)}: {_reason(error)}") from error
    if unreadable:
        raise unreadable[0]
    return len(list(Path(runs).glob("*/*/config.yaml")))


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
    metrics: Mapping[str, float],
    files: list[Path],
    note: str,
) -> None:
    """Puts what the analysis found onto the sweep's parent run: `metrics`, `files` as artifacts, and `note` (markdown)
    as its description. A failing tracker costs one line: the report itself is written by then.
    """
    try:
        parent = _open_parent(directory, read_json(directory / "sweep.json"), tracking, runs)
        parent.put_values(metrics)
        parent.put_note(note, replace=True)
        parent.put_files(files)
    except Exception as error:  # whatever a tracker raises
        uri = store_uri(tracking, runs)
        print(f"warning: the report is not in {uri} ({_reason(error)}); `run.py report` tries again", file=sys.stderr)


def _open_parent(directory: Path, sweep: Mapping[str, Any], tracking: TrackingConfig, runs: Path | str) -> MirroredRun:
    run = MirroredRun(directory, tracking, runs, directory.name)
    tags = {"sweep": directory.name, "experiment": sweep["name"], "paper_table": sweep.get("paper", "")}
    tags |= {key: sweep[key] for key in ("baseline", "scale", "match")}
    run.put(tags)
    run.put_note(sweep["question"])
    return run


def axes(config: Mapping[str, Any], budget: Mapping[str, Any]) -> dict[str, str]:
    """Params of a run. `null` is a value like any other: MLflow's charts leave out runs that lack a param."""
    known = dict(leaves(config))
    values = {name: known[key] for name, key in AXES.items() if key in known}
    values |= {name: round(budget[name]) for name in BUDGETS if name in budget}
    return {name: "null" if value is None else str(value) for name, value in values.items()}


def _reason(error: BaseException) -> str:
    """The first line of what began it: MLflow wraps "database is locked" in pages, "refused" in a paragraph."""
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _warn(uri: str, reason: str) -> None:
    print(f"warning: cannot mirror to {uri} ({reason}); `python run.py sync` will catch up", file=sys.stderr)
