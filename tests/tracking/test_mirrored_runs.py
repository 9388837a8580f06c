import socket
import time
from pathlib import Path

import pytest
from mirrored import CONFIG, PROVENANCE, artifacts, finish, log, run_of, steps_in_store, store
from mlflow import MlflowClient

from moepp.errors import RunError
from moepp.records import read_json, write_json
from moepp.tracking import mirror as tracking
from moepp.tracking import mlflow_store
from moepp.tracking.mirror import Mirror, follow, mirror_again, sync_all
from moepp.tracking.settings import TrackingConfig


def test_a_run_shows_its_axes_tags_data_and_times(record, runs):
    log(record, 1, 2)
    with record.lock():
        Mirror(record, TrackingConfig(), runs, parent_run_id="feed").sync()
    run = run_of(record, runs)
    assert run.data.params == {
        "arm": "zero+copy", "size": "tiny", "seed": "3", "n_ffn": "4", "n_zero": "1", "n_copy": "1", "n_constant": "2",
        "gating_residual": "True", "tau": "0.75", "top_k": "2", "lr": "0.0005", "optimizer": "adamw",
        "router": "linear", "selection": "top_k", "gate": "released", "logits_norm": "null", "capacity_factor": "1.1",
        "balance_form": "switch", "balance_beta": "0.01",
        "tokens": "4096", "total_params": "100", "nominal_active_params": "50", "nominal_flops_per_token": "861398",
    }  # fmt: skip
    expected = {
        "sweep": "toy-smoke",
        "git_sha": "abc",
        "git_dirty": "True",
        "host": "box",
        "mlflow.parentRunId": "feed",
        "licence": "Apache-2.0",
        "data_terms": "speeches, public domain",
        "mlflow.source.name": "run.py train",
        "mlflow.source.git.commit": "abc",
    }
    assert expected.items() <= run.data.tags.items()
    assert read_json(record.path / "mlflow.json")["experiment_id"] == run.info.experiment_id
    assert run.info.run_name == "zero+copy s3" and run.info.status == "RUNNING"
    assert run.info.start_time == record.metrics()[0]["time"]
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("sotu", "0123456789abcdef")
    times = [p.timestamp for p in store(runs).get_metric_history(run.info.run_id, "train/loss")]
    assert times == [line["time"] for line in record.metrics()]


def test_nothing_is_mirrored_before_the_first_metric(record, runs):
    Mirror(record, TrackingConfig(), runs).sync()
    assert not (record.path / "mlflow.json").exists()


def test_each_step_is_mirrored_once_through_rewinds_and_crashes(record, runs):
    log(record, 1, 6)
    mirror = Mirror(record, TrackingConfig(), runs)
    mirror.sync()
    other = Mirror(record, TrackingConfig(), runs)  # another worker's
    other.sync()
    log(record, 7, 8)
    mirror.sync()
    mirror.sync()
    assert steps_in_store(record, runs) == [1, 2, 3, 4, 5, 6, 7, 8]

    # The trial resumes from step 4 and repeats what it has logged before; its times differ.
    record.rewind(4)
    mirror.sync()
    log(record, 5, 10)
    mirror.sync()
    assert steps_in_store(record, runs) == list(range(1, 11))

    # The worker that followed is gone, what it sent last is repeated once more, and the other one takes over.
    record.rewind(8)
    log(record, 9, 10)
    other.sync()
    assert steps_in_store(record, runs) == steps_in_store(record, runs, "router/zero_share") == list(range(1, 11))


def test_values_that_are_no_numbers_survive(record, runs):
    for step, value in enumerate((1.0, float("nan"), float("inf"), float("-inf")), start=1):
        record.log(step, {"train/loss": value, "missing": None})
    Mirror(record, TrackingConfig(), runs).sync()
    assert steps_in_store(record, runs) == [1, 2, 3, 4]


def test_more_metrics_than_one_call_takes(record, runs, monkeypatch):
    monkeypatch.setattr(mlflow_store, "METRICS_PER_CALL", 7)
    log(record, 1, 20)
    Mirror(record, TrackingConfig(), runs).sync()
    assert steps_in_store(record, runs) == list(range(1, 21))


def test_a_resumed_run_continues_in_its_mlflow_run(record, runs):
    log(record, 1, 2)
    Mirror(record, TrackingConfig(), runs).sync()
    first = run_of(record, runs).info
    assert first.status == "KILLED"
    log(record, 3, 3)
    record.fail("expert 3 is on fire")
    Mirror(record, TrackingConfig(), runs).sync()
    failed = run_of(record, runs)
    assert (failed.info.status, failed.data.tags["failure"]) == ("FAILED", "expert 3 is on fire")
    (record.path / "failed.json").unlink()
    with record.lock():
        Mirror(record, TrackingConfig(), runs).sync(ended=True)  # of a worker that leaves while another trains
    assert run_of(record, runs).info.status == "RUNNING"
    log(record, 4, 4)
    finish(record)
    Mirror(record, TrackingConfig(), runs).sync()
    finished = run_of(record, runs)
    assert (finished.info.run_id, finished.info.status) == (first.run_id, "FINISHED")
    assert finished.data.tags["failure"] == ""
    assert finished.info.end_time == record.metrics()[-1]["time"]
    assert steps_in_store(record, runs) == [1, 2, 3, 4]


def test_a_finished_run_carries_its_files_below_the_runs_folder(record, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log(record, 1, 1)
    (record.path / "tables").mkdir()
    (record.path / "tables" / "expert_load.csv").write_text("layer,expert,share\n")
    finish(record)
    Mirror(record, TrackingConfig(), runs).sync()
    found = artifacts(record, runs)
    assert set(found) == {"config.yaml", "provenance.json", "budget.json", "tables/expert_load.csv"}
    assert list(tmp_path.iterdir()) == []


def test_a_run_carries_its_config_from_the_first_pass_and_its_log_once_it_failed(record, runs):
    log(record, 1, 1)
    mirror = Mirror(record, TrackingConfig(), runs)
    mirror.sync()
    assert set(artifacts(record, runs)) == {"config.yaml", "provenance.json", "budget.json"}
    write_json(record.path / "provenance.json", {**PROVENANCE, "host": "other"})  # it was taken over
    (record.path / "log.txt").write_text("early\n" + "x" * tracking.LOG_BYTES + "\nexpert 3 is on fire\n")
    (record.path / "ranks").mkdir()
    (record.path / "ranks" / "0.txt").write_text("rank 0 lost rank 1\n")
    record.fail("expert 3 is on fire")
    mirror.sync()
    found = artifacts(record, runs)
    assert found["config.yaml"] == CONFIG and '"other"' in found["provenance.json"]
    assert found["log.txt"].endswith("expert 3 is on fire\n") and "early" not in found["log.txt"]
    assert found["ranks/0.txt"] == "rank 0 lost rank 1\n"


def test_small_artifacts_are_sent_when_they_change(record, runs, monkeypatch):
    sent = []

    def keep(self, run_id, folder):
        sent.extend(sorted(path.name for path in Path(folder).iterdir()))

    monkeypatch.setattr(MlflowClient, "log_artifacts", keep)
    log(record, 1, 1)
    for _ in range(2):
        Mirror(record, TrackingConfig(), runs).sync()
    assert sent == ["budget.json", "config.yaml", "provenance.json"]


def test_a_dead_tracker_costs_one_line_and_sync_catches_up(record, runs, capsys, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("moepp.tracking.mirror.SECONDS_BETWEEN_PASSES", 0.05)
    mirror = Mirror(record, TrackingConfig(uri=uri), runs)
    passes = []
    sync = mirror.sync
    monkeypatch.setattr(mirror, "sync", lambda ended: (passes.append(ended), sync(ended)))
    with follow(mirror):
        log(record, 1, 3)
        while len(passes) < 3:
            time.sleep(0.02)
    finish(record)
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert uri in warning and "`python run.py sync` will catch up" in warning
    with pytest.raises(RunError, match=f"cannot mirror to {uri}"):
        sync_all(runs, TrackingConfig(uri=uri))

    Mirror(record, TrackingConfig(), runs).sync()
    assert steps_in_store(record, runs) == [1, 2, 3]


def test_a_note_says_how_to_go_on_and_gives_way_to_what_people_write(record, runs):
    log(record, 1, 1)
    Mirror(record, TrackingConfig(), runs).sync()
    run = run_of(record, runs)
    note = run.data.tags["mlflow.note.content"]
    folder = record.path.parent
    assert f"`run.py rerun {record.path}`" in note and f"`run.py compare {folder}:vanilla {folder}:zero+copy`" in note
    store(runs).set_tag(run.info.run_id, "mlflow.note.content", "diverged, see the gate")
    Mirror(record, TrackingConfig(), runs).sync()
    assert run_of(record, runs).data.tags["mlflow.note.content"] == "diverged, see the gate"


def test_final_metrics_are_bars_and_no_curves(record, runs):
    log(record, 1, 2)
    record.log(2, {"final/val_loss": 3.5})
    for _ in range(2):
        Mirror(record, TrackingConfig(), runs).sync()
    assert steps_in_store(record, runs, "final/val_loss") == [0]
    assert run_of(record, runs).data.metrics["final/val_loss"] == 3.5


def test_final_metrics_that_come_later_or_are_replaced_reach_mlflow(record, runs):
    log(record, 1, 3)
    record.log(3, {"final/val_loss": 2.0})
    finish(record)
    Mirror(record, TrackingConfig(), runs).sync()
    for accuracy in (0.25, 0.5, 0.5):
        record.replace_final({"final/sciq_acc": accuracy})
        mirror_again(record)
        Mirror(record, TrackingConfig(), runs).sync()
        assert run_of(record, runs).data.metrics["final/sciq_acc"] == accuracy
    assert steps_in_store(record, runs, "final/sciq_acc") == [0, 0]  # an equal value is not sent again
    assert steps_in_store(record, runs) == [1, 2, 3] and steps_in_store(record, runs, "final/val_loss") == [0]
    assert run_of(record, runs).info.status == "FINISHED"


def test_a_finished_run_takes_few_requests(record, runs, monkeypatch):
    """A first `sync` may have a thousand of them; each request costs milliseconds, and mostly a write to the disk."""
    from mlflow.tracking._tracking_service.client import TrackingServiceClient

    log(record, 1, 30)
    finish(record)
    mlflow_store.connect(TrackingConfig(), runs)
    asked = []

    def counted(name, call):
        return lambda self, *arguments, **options: (asked.append(name), call(self, *arguments, **options))[1]

    for name in ("create_run", "get_run", "log_batch", "log_inputs", "search_runs", "set_terminated"):
        monkeypatch.setattr(TrackingServiceClient, name, counted(name, getattr(TrackingServiceClient, name)))
    Mirror(record, TrackingConfig(), runs).sync(ended=True)
    # What it holds in one batch; MLflow asks for the run to know where its artifacts go.
    assert sorted(asked) == ["create_run", "get_run", "log_batch", "log_inputs", "set_terminated"]
    assert steps_in_store(record, runs) == list(range(1, 31))


def test_a_new_run_is_made_with_its_tags(record, runs, monkeypatch):
    """Put afterwards they would cost a transaction."""
    batches = []
    real = MlflowClient.log_batch
    monkeypatch.setattr(MlflowClient, "log_batch", lambda *a, **values: (batches.append(values), real(*a, **values))[1])
    log(record, 1, 1)
    Mirror(record, TrackingConfig(), runs).sync()
    (batch,) = batches
    assert batch["metrics"] and batch["params"] and not batch["tags"]
    assert {"git_sha", "mlflow.note.content", "record_key"} <= run_of(record, runs).data.tags.keys()


def test_a_tag_that_mlflow_refuses_costs_itself_alone(record, runs, capsys):
    """The run's name has a tag of its own."""
    config = record.path / "config.yaml"
    config.write_text(config.read_text().replace("tags: {", "tags: {mlflow.runName: other, "))
    log(record, 1, 1)
    Mirror(record, TrackingConfig(), runs).sync()
    assert run_of(record, runs).data.tags["sweep"] == "toy-smoke"
    assert steps_in_store(record, runs) == [1]
