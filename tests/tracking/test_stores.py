import subprocess
import sys
from pathlib import Path

import pytest

from moepp.errors import UsageError
from moepp.tracking import mlflow_store
from moepp.tracking.mirror import Mirror, sync_all
from moepp.tracking.settings import TrackingConfig


def test_the_store_is_that_of_the_config_then_the_environment_then_the_runs_folder(runs, monkeypatch):
    assert mlflow_store.store_uri(TrackingConfig(), runs) == f"sqlite:///{runs}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert mlflow_store.store_uri(TrackingConfig(), runs) == "http://tracker:5000"
    assert mlflow_store.store_uri(TrackingConfig(uri="sqlite:///a.db"), runs) == "sqlite:///a.db"


@pytest.mark.parametrize("uri", ["mlruns", "file:./mlruns", "file:///tmp/mlruns"])
def test_a_folder_as_a_store_is_refused(record, runs, uri):
    with pytest.raises(UsageError, match=r"tracking\.uri=sqlite:///"):
        Mirror(record, TrackingConfig(uri=uri), runs)


@pytest.mark.parametrize("uri", ["sqlite:", "sqlite://mlflow.db", "http:/host:5000", "https://"])
def test_an_address_that_names_no_place_is_refused_with_one_that_does(record, runs, uri):
    with pytest.raises(UsageError, match=rf"^tracking\.uri={uri} names no place; write it as {uri.split(':')[0]}:/"):
        Mirror(record, TrackingConfig(uri=uri), runs)


def test_sync_without_a_tracker_says_so(runs):
    with pytest.raises(UsageError, match=r"tracking\.backend=mlflow"):
        sync_all(runs, TrackingConfig(backend="jsonl"))


CREATE_STORE = """
import sys
from moepp.tracking.settings import TrackingConfig
assert not {"mlflow", "torch", "lightning"} & set(sys.modules)
import mlflow
from moepp.tracking.mlflow_store import connect
print("ready", flush=True)
sys.stdin.readline()
print(connect(TrackingConfig(), sys.argv[1])[1])
"""


def test_processes_that_start_at_once_create_one_store_without_chatter(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CREATE_STORE, str(tmp_path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2  # mlflow imported: they really meet
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate() for process in processes]
    assert outputs == [outputs[0]] * 2
    assert outputs[0][0].strip().isdigit() and outputs[0][1] == ""


def test_a_store_whose_creation_was_killed_is_created_again(runs, monkeypatch):
    """At the last moment: all tables are made, and nothing has its name yet."""

    def killed(path, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            mlflow_store.connect(TrackingConfig(), runs)
    assert not (runs / "mlflow.db").exists() and len(list(runs.glob(".mlflow.db.*.new"))) == 1
    client, experiment = mlflow_store.connect(TrackingConfig(), runs)
    assert client.get_experiment(experiment).name == TrackingConfig().experiment
    assert (runs / "mlflow.db").exists() and not list(runs.glob(".mlflow.db.*.new"))
