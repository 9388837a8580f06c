"""One item that MLflow does not take costs itself alone."""

import pytest
from mirrored import finish, log, make_record
from mlflow import MlflowClient

from moepp.errors import UsageError
from moepp.records import read_json
from moepp.tracking.mirror import Mirror, as_recorded
from moepp.tracking.mlflow_store import connect, store_uri, stored_name
from moepp.tracking.settings import TrackingConfig


def mirrored(record, runs, tracking=None):
    log(record, 1, 2)
    finish(record)
    mirror = Mirror(record, tracking or TrackingConfig(), runs)
    mirror.sync(ended=True)
    return MlflowClient(store_uri(TrackingConfig(), runs)).get_run(read_json(record.path / "mlflow.json")["run_id"])


def test_a_deleted_experiment_is_restored(runs, record, capsys):
    tracking = TrackingConfig(experiment="deleted")
    client, experiment = connect(tracking, runs)
    client.delete_experiment(experiment)
    run = mirrored(record, runs, tracking)
    assert run.info.experiment_id == experiment and run.info.status == "FINISHED"
    assert "deleted was deleted, and is restored" in capsys.readouterr().err


def test_tags_and_metrics_have_one_rule_for_names(runs, record):
    config = record.path / "config.yaml"
    config.write_text(config.read_text().replace("size: tiny", f'size: tiny, "a|b": "{"x" * 9000}"'))
    run = mirrored(record, runs)
    assert len(run.data.tags["a_b"]) == 8000 and "train/loss" in run.data.metrics
    assert [stored_name(key) for key in ("a+b/c", "../x", "/abs", "a//b", "..")] == ["a_b/c", "x", "abs", "a/b", "_"]


def test_a_tag_that_the_store_refuses_costs_itself_alone(runs, record, monkeypatch, capsys):
    monkeypatch.setattr("moepp.tracking.mlflow_store.stored_name", lambda key: key)  # a store of other rules
    config = record.path / "config.yaml"
    config.write_text(config.read_text().replace("size: tiny", 'size: tiny, "a|b": "refused"'))
    run = mirrored(record, runs)
    assert "a|b" not in run.data.tags and run.data.tags["size"] == "tiny" and "train/loss" in run.data.metrics
    assert "MLflow refuses a|b='refused'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a%20b?c#d"])
def test_a_folder_of_any_name_holds_its_store(tmp_path, name):
    runs = tmp_path / name
    mirrored(make_record(runs / "toy/0123abcd"), runs)
    assert [path.parent for path in tmp_path.rglob("*.db")] == [runs]


@pytest.mark.parametrize("uri", ["ftp://host/x", "postgres://host/x", "mlruns", "C:/runs"])
def test_an_address_of_no_tracker_is_refused(tmp_path, uri):
    with pytest.raises(UsageError, match=r"tracking\.uri=.* begins with one of sqlite, postgresql"):
        store_uri(TrackingConfig(uri=uri), tmp_path)


def test_the_command_then_the_records_then_the_environment_name_the_tracker(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://u:pw@tracker:5000")
    record = make_record(tmp_path / "toy/0123abcd")
    config = record.path / "config.yaml"

    def address(**named):
        return store_uri(as_recorded(TrackingConfig(**named), tmp_path / "toy"), tmp_path)

    assert address() == "http://u:pw@tracker:5000"
    config.write_text(config.read_text() + 'tracking: {uri: "sqlite:///of_the_sweep.db", experiment: mine}\n')
    assert address() == "sqlite:///of_the_sweep.db"
    assert address(uri="sqlite:///of_the_command.db") == "sqlite:///of_the_command.db"
    assert as_recorded(TrackingConfig(), tmp_path / "toy").experiment == "mine"
    config.write_text(config.read_text().replace("sqlite:///of_the_sweep.db", "http://tracker:5000"))
    assert address() == "http://u:pw@tracker:5000"  # a record keeps no password
    assert as_recorded(TrackingConfig(), tmp_path / "nothing") == TrackingConfig()
