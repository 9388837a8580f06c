"""What goes wrong with a tracker while a run trains: the run is not held up, and each step arrives exactly once."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import pytest
from mirrored import finish
from mlflow import MlflowClient

from moepp.errors import RunError
from moepp.records import RunRecord, read_json, write_json, write_text
from moepp.tracking import mirror as tracking
from moepp.tracking import mlflow_store
from moepp.tracking.mirror import FolderMirror, Mirror, follow, sync_all
from moepp.tracking.mlflow_store import KEY
from moepp.tracking.settings import TrackingConfig

CONFIG = "name: toy\nseed: 0\nmodel: {top_k: 2}\ndata: {corpus: sotu}\noptim: {lr: 0.001}\n"
SERVE = """
import sys
from moepp.tracking.ui import serve
from moepp.tracking.settings import TrackingConfig
serve(TrackingConfig(), sys.argv[1], int(sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    monkeypatch.setattr(tracking, "SECONDS_BETWEEN_PASSES", 0.05)


@pytest.fixture
def record(runs, request):
    path = runs / request.node.name / "0123abcd"
    write_text(path / "config.yaml", CONFIG)
    write_json(path / "provenance.json", {"data": {"digest": "0123456789abcdef"}})
    return RunRecord(path)


@pytest.fixture
def mirrored(record, runs):
    """The record with three steps that are in the store."""
    log(record, 1, 3)
    Mirror(record, TrackingConfig(), runs).sync()
    return record


def log(record, first, last):
    """Writes steps as training does; that must not take longer because a tracker is in trouble."""
    for step in range(first, last + 1):
        began = time.perf_counter()
        record.log(step, {"train/loss": 1 / step, "router/zero_share": 0.25})
        assert time.perf_counter() - began < 1


def steps_in_store(record, runs, metric="train/loss"):
    client = MlflowClient(tracking_uri=f"sqlite:///{runs}/mlflow.db")
    run_id = read_json(record.path / "mlflow.json").get("run_id")  # none yet while the store is asked for a run
    return sorted(point.step for point in client.get_metric_history(run_id, metric)) if run_id else []


def until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def warned_once(capsys, reason=""):
    warning = capsys.readouterr().err
    return warning.count("\n") == 1 and "`python run.py sync` will catch up" in warning and reason in warning


def free_port():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


@contextmanager
def server(runs, port):
    """The process of an MLflow server as `run.py ui` starts it; killed at the end, so it dies without a word."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(runs), str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    try:
        until(lambda: answers(port))
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def test_a_server_that_comes_late_hangs_and_dies_ends_with_every_step_once(record, runs, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    port = free_port()

    def last():
        return steps_in_store(record, runs)[-1:] if (record.path / "mlflow.json").exists() else []

    with follow(Mirror(record, TrackingConfig(uri=f"http://127.0.0.1:{port}"), runs)):
        log(record, 1, 3)
        with server(runs, port) as process:
            until(lambda: last() == [3])
            record.rewind(2)  # the trial resumes
            log(record, 3, 5)
            until(lambda: last() == [5])
            os.killpg(process.pid, signal.SIGSTOP)  # what it has been asked meanwhile, it does afterwards
            log(record, 6, 8)
            time.sleep(1.5)
            log(record, 9, 9)
            os.killpg(process.pid, signal.SIGCONT)
            until(lambda: last() == [9])
        log(record, 10, 12)
    assert steps_in_store(record, runs) == list(range(1, 10))
    finish(record)
    assert warned_once(capsys, str(port))
    sync_all(runs, TrackingConfig())
    for metric in ("train/loss", "router/zero_share"):
        assert steps_in_store(record, runs, metric) == list(range(1, 13))


def test_an_answer_that_is_lost_after_the_store_took_the_steps(record, runs, capsys, monkeypatch):
    real, calls = MlflowClient.log_batch, []

    def lose_answers(self, *arguments, **values):
        real(self, *arguments, **values)
        calls.append(values)
        if len(calls) % 2:
            raise ConnectionError("the answer was lost")

    monkeypatch.setattr(MlflowClient, "log_batch", lose_answers)
    with follow(Mirror(record, TrackingConfig(), runs)):
        for step in range(1, 9):
            if step == 6:
                record.rewind(3)
                log(record, 4, 5)  # a resumed run writes these again, at another time
            log(record, step, step)
            seen = len(calls)
            until(lambda seen=seen: len(calls) > seen)
    with suppress(RunError):  # of two answers one is lost
        sync_all(runs, TrackingConfig())
    sync_all(runs, TrackingConfig())
    assert steps_in_store(record, runs) == list(range(1, 9))
    assert warned_once(capsys, "the answer was lost")


def test_a_server_that_accepts_and_never_answers_does_not_hold_up_the_run(mirrored, runs, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        with follow(Mirror(mirrored, TrackingConfig(uri=uri), runs)):
            log(mirrored, 4, 6)
        assert time.monotonic() - began < 10
    assert warned_once(capsys, uri)
    Mirror(mirrored, TrackingConfig(), runs).sync()
    assert steps_in_store(mirrored, runs) == list(range(1, 7))


def test_a_read_only_store_is_caught_up_when_it_can_be_written(mirrored, runs, capsys, caplog, monkeypatch):
    monkeypatch.chdir(runs)  # where MLflow makes a folder of this kind of address
    read_only = TrackingConfig(uri=f"sqlite:///file:{runs}/mlflow.db?mode=ro&uri=true")
    mirror = Mirror(mirrored, read_only, runs)
    with follow(mirror):
        log(mirrored, 4, 6)
        time.sleep(0.5)  # several passes
    finish(mirrored)
    assert steps_in_store(mirrored, runs) == [1, 2, 3]
    assert warned_once(capsys, "(attempt to write a readonly database)")
    assert not caplog.records
    sync_all(runs, TrackingConfig())
    assert steps_in_store(mirrored, runs) == list(range(1, 7))


@contextmanager
def locked(runs):
    """Another program holds the database, as a backup or an editor does."""
    holder = sqlite3.connect(runs / "mlflow.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        holder.execute("ROLLBACK")
        holder.close()


def test_a_locked_store_is_waited_for_beside_the_training(mirrored, runs, capsys):
    mirror = Mirror(mirrored, TrackingConfig(), runs)
    with follow(mirror):
        with locked(runs):
            log(mirrored, 4, 6)
            time.sleep(0.5)
        log(mirrored, 7, 8)
        finish(mirrored)
        until(lambda: mirror.complete)
    assert steps_in_store(mirrored, runs) == list(range(1, 9))
    assert capsys.readouterr().err == ""


def test_a_store_that_stays_locked_does_not_keep_a_finished_run(mirrored, runs, capsys, monkeypatch):
    monkeypatch.setattr(tracking, "SECONDS_TO_END", 0.5)
    with locked(runs):
        began = time.monotonic()
        with follow(Mirror(mirrored, TrackingConfig(), runs)):
            log(mirrored, 4, 6)
        assert time.monotonic() - began < 3
        assert warned_once(capsys, "no answer within")
    sync_all(runs, TrackingConfig())
    assert steps_in_store(mirrored, runs) == list(range(1, 7))


def test_a_worker_that_leaves_closes_no_run_that_another_still_trains(mirrored, runs):
    """Of two workers of one sweep the first to find nothing left to do ends while the other still trains."""
    client = MlflowClient(tracking_uri=f"sqlite:///{runs}/mlflow.db")
    with mirrored.lock():
        FolderMirror(mirrored.path.parent, TrackingConfig(), runs).sync(ended=True)
    run_id = read_json(mirrored.path / "mlflow.json")["run_id"]
    assert client.get_run(run_id).info.status == "RUNNING"


def lose_the_first_answer(monkeypatch):
    real, calls = MlflowClient.create_run, []

    def create_run(self, *arguments, **values):
        run = real(self, *arguments, **values)
        calls.append(run.info.run_id)
        if len(calls) == 1:
            raise ConnectionError("the answer was lost")
        return run

    monkeypatch.setattr(MlflowClient, "create_run", create_run)
    return calls


@pytest.mark.parametrize("of", ["a record", "a sweep"])
def test_a_run_whose_id_was_lost_is_found_again(record, runs, of, monkeypatch):
    log(record, 1, 3)
    calls = lose_the_first_answer(monkeypatch)
    path = record.path
    if of == "a sweep":
        path = path.parent
        about = {"name": "toy", "question": "?", "baseline": "a", "scale": "smoke", "match": "none"}
        write_json(path / "sweep.json", {**about, "trials": []})
    for _ in range(2):
        mirror = FolderMirror(record.path.parent, TrackingConfig(), runs)
        try:
            mirror.sync()
        except ConnectionError:
            continue
    mirrored = read_json(path / "mlflow.json")["run_id"]
    assert mirrored == calls[0] and len(calls) == (2 if of == "a sweep" else 1)


def test_a_request_that_a_server_carries_out_late_leaves_no_second_run(mirrored, runs, monkeypatch):
    """A slow server may open a run after its client has given up, asked again and got another."""
    monkeypatch.setattr(mlflow_store, "is_server", lambda uri: True)
    client = MlflowClient(tracking_uri=f"sqlite:///{runs}/mlflow.db")
    state = read_json(mirrored.path / "mlflow.json")
    late = client.create_run(state["experiment_id"], tags={KEY: state["key"]})
    finish(mirrored)
    Mirror(mirrored, TrackingConfig(), runs).sync()
    assert client.get_run(late.info.run_id).info.lifecycle_stage == "deleted"
    kept = client.get_run(state["run_id"]).info
    assert (kept.lifecycle_stage, kept.status) == ("active", "FINISHED")
