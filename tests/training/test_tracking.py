import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from moepp import pages
from moepp.errors import RunError, UsageError
from moepp.records import RunRecord, read_json, write_json
from moepp.training import mlflow_store, tracking
from moepp.training.follower import Follower
from moepp.training.mlflow_views import ARMS, TAG, TRIALS, saved_views, view_key
from moepp.training.tracking import FolderMirror, Mirror, TrackingConfig, follow, log_report, mirror_again, sync_all

CONFIG = """
name: toy
seed: 3
model:
  {router: linear, selection: top_k, top_k: 2, gating_residual: true, balance: {tau: 0.75, form: switch, beta: 0.01},
   gate: released, logits_norm: null, capacity_factor: 1.1,
   experts: {ffn: 4, zero: 1, copy: 1, constant: 2}}
data: {corpus: sotu}
optim: {lr: 0.0005}
tags: {arm: zero+copy, baseline: vanilla, sweep: toy-smoke, size: tiny}
"""
BUDGET = {"total_params": 100, "active_params": 50, "flops_per_token": 861398.0, "tokens": 4096}
PROVENANCE = {
    "host": "box",
    "command": "run.py train",
    "git": {"sha": "abc", "dirty": True},
    "data": {"digest": "0123456789abcdef", "corpus": "speeches, public domain"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One folder of runs for all tests: each new SQLite store costs a second."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(autouse=True)
def no_tracker_of_the_machine(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def record(runs, request):
    return make_record(runs / request.node.name / "0123abcd")


def make_record(path: Path) -> RunRecord:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(CONFIG)
    write_json(path / "budget.json", BUDGET)
    write_json(path / "provenance.json", PROVENANCE)
    return RunRecord(path)


def store(runs) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{runs}/mlflow.db")


def run_of(record, runs):
    return store(runs).get_run(read_json(record.path / "mlflow.json")["run_id"])


def steps_in_store(record, runs, metric="train/loss"):
    run_id = read_json(record.path / "mlflow.json")["run_id"]
    return [point.step for point in store(runs).get_metric_history(run_id, metric)]


def log(record, first, last):
    for step in range(first, last + 1):
        record.log(step, {"train/loss": 1 / step, "router/zero_share": 0.25})


def test_a_run_shows_its_axes_tags_data_and_times(record, runs):
    log(record, 1, 2)
    with record.lock():
        Mirror(record, TrackingConfig(), runs, parent_run_id="feed").sync()
    run = run_of(record, runs)
    assert run.data.params == {
        "arm": "zero+copy", "size": "tiny", "seed": "3", "n_ffn": "4", "n_zero": "1", "n_copy": "1", "n_constant": "2",
        "gating_residual": "True", "tau": "0.75", "top_k": "2", "lr": "0.0005",
        "router": "linear", "selection": "top_k", "gate": "released", "logits_norm": "null", "capacity_factor": "1.1",
        "balance_form": "switch", "balance_beta": "0.01",
        "tokens": "4096", "total_params": "100", "active_params": "50", "flops_per_token": "861398",
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
    record.finish()
    Mirror(record, TrackingConfig(), runs).sync()
    finished = run_of(record, runs)
    assert (finished.info.run_id, finished.info.status) == (first.run_id, "FINISHED")
    assert finished.data.tags["failure"] == ""
    assert finished.info.end_time == record.metrics()[-1]["time"]
    assert steps_in_store(record, runs) == [1, 2, 3, 4]


def artifacts(record, runs):
    """Path and text of everything that hangs on the record's run."""
    folder = Path(run_of(record, runs).info.artifact_uri.removeprefix("file://"))
    assert folder.is_relative_to(runs / "mlartifacts")
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_carries_its_files_below_the_runs_folder(record, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log(record, 1, 1)
    (record.path / "tables").mkdir()
    (record.path / "tables" / "expert_load.csv").write_text("layer,expert,share\n")
    record.finish()
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
    monkeypatch.setattr(MlflowClient, "log_text", lambda self, run_id, text, name: sent.append(name))
    log(record, 1, 1)
    for _ in range(2):
        Mirror(record, TrackingConfig(), runs).sync()
    assert sent == ["config.yaml", "provenance.json", "budget.json"]


def test_following_mirrors_to_the_end_and_marks_what_was_cut_short(record, runs):
    with follow(Mirror(record, TrackingConfig(), runs)):
        log(record, 1, 3)
    assert steps_in_store(record, runs) == [1, 2, 3]
    assert run_of(record, runs).info.status == "KILLED"


TRAIN_AND_HANG = """
import sys, time
from pathlib import Path
from moepp.records import RunRecord
from moepp.training.follower import followed
from moepp.training.tracking import TrackingConfig
record, runs = sys.argv[1:]
with followed(Path(record), TrackingConfig(), runs):
    for step in (1, 2, 3):
        RunRecord(record).log(step, {"train/loss": 1.0 / step})
    print("logged", flush=True)
    time.sleep(600)
"""


def test_the_follower_of_a_killed_run_mirrors_its_last_steps_and_says_that_it_ended(record, runs):
    run = subprocess.Popen([sys.executable, "-c", TRAIN_AND_HANG, record.path, runs], stdout=subprocess.PIPE)
    assert run.stdout.readline() == b"logged\n"
    run.kill()
    run.communicate()  # returns when the follower, which shares the pipe, has left
    assert steps_in_store(record, runs) == [1, 2, 3]
    assert run_of(record, runs).info.status == "KILLED"


RUN_SWEEP = """
import sys
runs, tests = sys.argv[1:]
sys.path.insert(0, tests)
from run_fake_sweep import FAKE_TRIAL, no_preparation, run_sweep, sweep, tokens
from moepp.training import tracking
from moepp.sweeps import runner
def start(*arguments, real=runner.Follower, **options):
    follower = real(*arguments, **options)
    print("followed", flush=True)
    return follower
runner.Follower, tokens.prepare, tracking.SECONDS_BETWEEN_PASSES = start, no_preparation, 0.1
options = [f"runs={runs}", "trainer.steps=5000", "tracking=mlflow"]
run_sweep(sweep(), "smoke", 2, options, progress=False, command=FAKE_TRIAL)
"""


def test_the_runs_of_a_killed_worker_of_a_sweep_are_killed_in_mlflow(runs):
    """With the worker die its trials, by the kernel's hand; what mirrors them lives on to say so."""
    tests = Path(__file__).parents[1] / "sweeps"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "SECONDS_PER_STEP": "0.05"}
    worker = subprocess.Popen([sys.executable, "-c", RUN_SWEEP, runs, tests], env=environment, stdout=subprocess.PIPE)
    directory = runs / "toy-smoke"
    try:
        assert worker.stdout.readline() == b"followed\n"
        while len(list(directory.glob("*/metrics.jsonl"))) < 2 and worker.poll() is None:
            time.sleep(0.02)
    finally:
        worker.kill()
    worker.communicate()  # returns when the follower, which shares the pipe, has left
    trials = [RunRecord(path.parent) for path in directory.glob("*/metrics.jsonl")]
    assert [run_of(record, runs).info.status for record in (*trials, RunRecord(directory))] == ["KILLED"] * 3
    for record in trials:
        assert steps_in_store(record, runs) == [line["step"] for line in record.metrics()]


def test_a_follower_takes_the_word_of_its_end_and_leaves_a_sweep_with_true_statuses(runs):
    directory = make_sweep(runs, "sweep-followed")
    (directory / "bbbb" / "done").unlink()
    with RunRecord(directory / "bbbb").lock():  # another worker's
        follower = Follower(directory, TrackingConfig(), runs, folder=True)
        follower.end()
        while not follower.gone:  # on a busy machine it goes on by itself
            time.sleep(0.1)
    statuses = [run_of(RunRecord(directory / name), runs).info.status for name in ("", "aaaa", "bbbb")]
    assert statuses == ["RUNNING", "FINISHED", "RUNNING"]


def test_sync_tells_runs_that_are_trained_from_those_that_were_left(tmp_path):
    directory = make_sweep(tmp_path, "sweep")
    for trial in ("aaaa", "bbbb"):
        (directory / trial / "done").unlink()

    def statuses():
        sync_all(tmp_path, TrackingConfig())
        return [run_of(RunRecord(directory / name), tmp_path).info.status for name in ("", "aaaa", "bbbb")]

    with RunRecord(directory / "bbbb").lock():
        assert statuses() == ["RUNNING", "KILLED", "RUNNING"]
    assert statuses() == ["KILLED", "KILLED", "KILLED"]


def test_a_dead_tracker_costs_one_line_and_sync_catches_up(record, runs, capsys, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("moepp.training.tracking.SECONDS_BETWEEN_PASSES", 0.05)
    mirror = Mirror(record, TrackingConfig(uri=uri), runs)
    passes = []
    sync = mirror.sync
    monkeypatch.setattr(mirror, "sync", lambda ended: (passes.append(ended), sync(ended)))
    with follow(mirror):
        log(record, 1, 3)
        while len(passes) < 3:
            time.sleep(0.02)
    record.finish()
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert uri in warning and "`python run.py sync` will catch up" in warning
    with pytest.raises(RunError, match=f"cannot mirror to {uri}"):
        sync_all(runs, TrackingConfig(uri=uri))

    Mirror(record, TrackingConfig(), runs).sync()
    assert steps_in_store(record, runs) == [1, 2, 3]


def make_sweep(runs, name) -> Path:
    directory = runs / name
    for trial in ("aaaa", "bbbb"):
        record = make_record(directory / trial)
        log(record, 1, 2)
        record.finish()
    trials = [{"arm": "a", "seed": 0, "path": "aaaa"}, {"arm": "b", "seed": 0, "path": "bbbb"}]
    about = {"name": "toy", "question": "Which expert?", "paper": "Table 5", "scale": "smoke", "baseline": "a"}
    write_json(directory / "sweep.json", {**about, "match": "tokens", "trials": trials})
    return directory


def test_a_sweep_is_one_parent_run_over_its_trials(runs):
    directory = make_sweep(runs, "sweep-of-two")
    (directory / "bbbb" / "done").unlink()
    FolderMirror(directory, TrackingConfig(), runs).sync()
    parent = run_of(RunRecord(directory), runs)
    assert parent.info.status == "RUNNING"
    assert parent.data.tags["mlflow.note.content"] == "Which expert?"
    assert parent.data.tags["paper_table"] == "Table 5"
    for trial in ("aaaa", "bbbb"):
        tags = run_of(RunRecord(directory / trial), runs).data.tags
        assert tags["mlflow.parentRunId"] == parent.info.run_id

    (directory / "bbbb" / "done").touch()
    FolderMirror(directory, TrackingConfig(), runs).sync(ended=True)
    again = run_of(RunRecord(directory), runs).info
    assert (again.run_id, again.status) == (parent.info.run_id, "FINISHED")

    RunRecord(directory / "bbbb").path.joinpath("done").unlink()
    RunRecord(directory / "bbbb").fail("out of memory")
    FolderMirror(directory, TrackingConfig(), runs).sync(ended=True)
    assert run_of(RunRecord(directory), runs).info.status == "FAILED"


def test_a_report_lands_on_the_parent_run(runs, tmp_path):
    directory = make_sweep(runs, "sweep-with-report")
    (tmp_path / "report.md").write_text("# Which expert?\n")
    for value in (-0.01, -0.02):
        report = ({"report/zero+copy,lr=0.1/minus": value}, [tmp_path / "report.md"], "It earns it.")
        log_report(directory, TrackingConfig(), runs, "table5", *report)
    log_report(directory, TrackingConfig(), runs, "routing", {}, [tmp_path / "report.md"], "By position.")
    FolderMirror(directory, TrackingConfig(), runs).sync()
    parent = run_of(RunRecord(directory), runs)
    assert parent.data.metrics == {"report/zero_copy_lr_0.1/minus": -0.02}
    assert parent.data.tags["mlflow.note.content"] == "It earns it.\n\n---\n\nBy position."
    assert set(artifacts(RunRecord(directory), runs)) == {"table5/report.md", "routing/report.md"}


def test_a_report_that_finds_no_tracker_costs_one_line(runs, capsys):
    directory = make_sweep(runs, "sweep-without-tracker")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{unused.getsockname()[1]}"
        log_report(directory, TrackingConfig(uri=uri), runs, "table5", {"zero/minus": 1.0}, [], "It earns it.")
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "tries again" in warning and uri in warning


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


def test_what_is_complete_is_not_asked_for_run_by_run(runs, monkeypatch):
    directory = make_sweep(runs, "sweep-complete")
    FolderMirror(directory, TrackingConfig(), runs).sync()
    monkeypatch.setattr(mlflow_store, "RUNS_PER_CALL", 1)
    asked = []
    opened = tracking.MirroredRun
    monkeypatch.setattr(tracking, "MirroredRun", lambda path, *rest: (asked.append(path), opened(path, *rest))[1])
    FolderMirror(directory, TrackingConfig(), runs).sync()
    assert asked == [directory]
    store(runs).delete_run(read_json(directory / "aaaa" / "mlflow.json")["run_id"])
    FolderMirror(directory, TrackingConfig(), runs).sync()
    assert asked == [directory, directory, directory / "aaaa"]
    assert steps_in_store(RunRecord(directory / "aaaa"), runs) == [1, 2]


def test_a_run_that_somebody_deletes_is_made_anew_and_holds_up_no_other(runs):
    directory = make_sweep(runs, "sweep-with-deletion")
    records = [RunRecord(directory / name) for name in ("aaaa", "bbbb")]
    for record in records:
        (record.path / "done").unlink()
    mirror = FolderMirror(directory, TrackingConfig(), runs)
    mirror.sync()
    deleted = run_of(records[0], runs).info.run_id
    store(runs).delete_run(deleted)
    for record in records:
        log(record, 3, 3)
        record.finish()
    mirror.sync()
    assert run_of(records[0], runs).info.run_id != deleted
    for record in records:
        assert steps_in_store(record, runs) == [1, 2, 3] and run_of(record, runs).info.status == "FINISHED"
    assert run_of(RunRecord(directory), runs).info.status == "FINISHED"


def test_a_parent_that_somebody_deletes_is_made_anew_over_its_trials(runs):
    directory = make_sweep(runs, "sweep-with-deleted-parent")
    mirror = FolderMirror(directory, TrackingConfig(), runs)
    mirror.sync()
    store(runs).delete_run(run_of(RunRecord(directory), runs).info.run_id)
    mirror.sync()
    parent = run_of(RunRecord(directory), runs)
    assert (parent.info.lifecycle_stage, parent.info.status) == ("active", "FINISHED")
    for name in ("aaaa", "bbbb"):
        assert run_of(RunRecord(directory / name), runs).data.tags["mlflow.parentRunId"] == parent.info.run_id


def test_a_run_that_the_store_refuses_is_told_after_all_others_were_mirrored(runs, monkeypatch):
    directory, real = make_sweep(runs, "sweep-with-refusal"), Mirror._put

    def refuse(self, *arguments):
        if self.record.path.name == "aaaa":
            raise MlflowException("no", error_code=INVALID_PARAMETER_VALUE)
        real(self, *arguments)

    monkeypatch.setattr(Mirror, "_put", refuse)
    with pytest.raises(MlflowException, match="no"):
        FolderMirror(directory, TrackingConfig(), runs).sync()
    assert run_of(RunRecord(directory / "bbbb"), runs).info.status == "FINISHED"
    assert run_of(RunRecord(directory), runs).info.status == "FINISHED"


def test_a_sweep_brings_its_saved_views(runs):
    directory = make_sweep(runs, "sweep-with-views")
    config = directory / "bbbb" / "config.yaml"
    config.write_text(config.read_text().replace("zero: 1", "zero: 3").replace("zero+copy", "zeros"))
    FolderMirror(directory, TrackingConfig(), runs).sync()
    parent = read_json(directory / "mlflow.json")
    tags = store(runs).get_experiment(parent["experiment_id"]).tags
    views = {}
    for name in (ARMS, TRIALS):
        view = json.loads(tags[TAG + view_key(parent["run_id"], name)])
        assert view["name"] == f"sweep-with-views: {name}"
        views[name] = json.loads(view["state"])
    assert views[ARMS]["groupsExpanded"] == {"param.arm.zero+copy": False, "param.arm.zeros": False}
    assert views[TRIALS]["selectedColumns"][:3] == ["params.`seed`", "params.`n_zero`", "metrics.`final/val_loss`"]
    assert views[TRIALS]["compareRunCharts"][0]["selectedParams"] == ["n_zero"]
    children = store(runs).search_runs([parent["experiment_id"]], views[ARMS]["searchFilter"])
    assert {run.info.run_id for run in children} == {
        read_json(directory / trial / "mlflow.json")["run_id"] for trial in ("aaaa", "bbbb")
    }
    assert all(len(tags[key]) < 20_000 for key in tags)


def test_views_of_a_thousand_arms_fit_into_tags():
    views = saved_views("sweep", "feed" * 8, 0, [f"learning_rate={i}" for i in range(1000)], ["lr", "tau", "n_zero"])
    assert max(map(len, views.values())) < 20_000  # MLflow refuses more


def test_records_are_mirrored_anew_into_a_store_that_lacks_them(runs, tmp_path):
    directory = make_sweep(tmp_path, "sweep")
    old = TrackingConfig(uri=f"sqlite:///{runs}/mlflow.db")
    assert sync_all(tmp_path, old) == 2
    first = run_of(RunRecord(directory / "aaaa"), runs).info.run_id
    assert sync_all(tmp_path, TrackingConfig()) == 2
    assert run_of(RunRecord(directory / "aaaa"), tmp_path).info.run_id != first
    assert steps_in_store(RunRecord(directory / "aaaa"), tmp_path) == [1, 2]


def test_the_store_is_that_of_the_config_then_the_environment_then_the_runs_folder(runs, monkeypatch):
    assert mlflow_store.store_uri(TrackingConfig(), runs) == f"sqlite:///{runs}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert mlflow_store.store_uri(TrackingConfig(), runs) == "http://tracker:5000"
    assert mlflow_store.store_uri(TrackingConfig(uri="sqlite:///a.db"), runs) == "sqlite:///a.db"


@pytest.mark.parametrize("uri", ["mlruns", "file:./mlruns", "file:///tmp/mlruns"])
def test_a_folder_as_a_store_is_refused(record, runs, uri):
    with pytest.raises(UsageError, match=r"tracking\.uri=sqlite:///"):
        Mirror(record, TrackingConfig(uri=uri), runs)


def test_the_server_is_for_this_machine_only(runs, monkeypatch, capsys):
    commands = []
    monkeypatch.setattr(os, "execv", lambda path, arguments: commands.append(arguments))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(RunError, match=f"cannot use port {port}"):
            mlflow_store.serve(TrackingConfig(), runs, port)
    mlflow_store.serve(TrackingConfig(), runs, port)
    (command,) = commands
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--backend-store-uri") + 1] == f"sqlite:///{runs}/mlflow.db"
    assert f"http://127.0.0.1:{port}" in capsys.readouterr().out
    assert pages.known_port(runs) == port  # `run.py compare` prints it
    assert capsys.readouterr().out == ""


def test_the_ui_opens_at_a_sweep(runs, monkeypatch, capsys):
    directory = make_sweep(runs, "sweep-to-open")
    monkeypatch.setattr(os, "execv", lambda path, arguments: None)
    with pytest.raises(UsageError, match=r"run\.py sync"):
        mlflow_store.serve(TrackingConfig(), runs, 0, directory)
    FolderMirror(directory, TrackingConfig(), runs).sync()
    opened = []
    monkeypatch.setattr(mlflow_store, "open_when_served", opened.append)
    mlflow_store.serve(TrackingConfig(), runs, 0, directory)
    lines = capsys.readouterr().out.splitlines()
    run_id = read_json(directory / "mlflow.json")["run_id"]
    assert [line.split()[0] for line in lines[:4]] == ["arms", "trials", "report", "runs"]
    assert f"?viewStateShareKey={run_id}-arms&compareRunsMode=CHART" in lines[0]
    assert f"/runs/{run_id}?" in lines[2]
    assert opened == [lines[0].split()[1]]


def test_without_a_name_the_ui_opens_at_the_newest_sweep_that_is_in_the_store(runs, monkeypatch, capsys):
    monkeypatch.setattr(os, "execv", lambda path, arguments: None)
    ids, now = [], time.time()
    for age, name in enumerate(("sweep-newest", "sweep-older")):
        directory = make_sweep(runs, name)
        FolderMirror(directory, TrackingConfig(), runs).sync()
        ids.append(read_json(directory / "mlflow.json")["run_id"])
        os.utime(directory / "sweep.json", (now + 1000 - age, now + 1000 - age))
    unmirrored = make_sweep(runs, "sweep-unmirrored") / "sweep.json"
    os.utime(unmirrored, (now + 2000, now + 2000))
    mlflow_store.serve(TrackingConfig(), runs, 0)
    assert f"viewStateShareKey={ids[0]}-arms" in capsys.readouterr().out
    store(runs).delete_run(ids[0])
    mlflow_store.serve(TrackingConfig(), runs, 0)
    assert f"viewStateShareKey={ids[1]}-arms" in capsys.readouterr().out


def test_no_browser_is_opened_without_a_display(monkeypatch):
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **_: started.append(arguments))
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    mlflow_store.open_when_served("http://127.0.0.1:5000/#/runs")
    assert not started
    monkeypatch.setenv("DISPLAY", ":0")
    mlflow_store.open_when_served("http://127.0.0.1:5000/#/runs")
    assert started[0][0][-1] == "http://127.0.0.1:5000/#/runs"


def test_sync_without_a_tracker_says_so(runs):
    with pytest.raises(UsageError, match=r"tracking\.backend=mlflow"):
        sync_all(runs, TrackingConfig(backend="jsonl"))


CREATE_STORE = """
import sys
from moepp.training.tracking import TrackingConfig
assert not {"mlflow", "torch", "lightning"} & set(sys.modules)
import mlflow
from moepp.training.mlflow_store import connect
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
    time.sleep(3)  # until all have imported mlflow, so that they really meet
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate() for process in processes]
    assert outputs == [outputs[0]] * 2
    assert outputs[0][0].strip().isdigit() and outputs[0][1] == ""


def test_final_metrics_that_come_later_or_are_replaced_reach_mlflow(record, runs):
    log(record, 1, 3)
    record.log(3, {"final/val_loss": 2.0})
    record.finish()
    Mirror(record, TrackingConfig(), runs).sync()
    for accuracy in (0.25, 0.5, 0.5):
        record.replace_final({"final/sciq_acc": accuracy})
        mirror_again(record)
        Mirror(record, TrackingConfig(), runs).sync()
        assert run_of(record, runs).data.metrics["final/sciq_acc"] == accuracy
    assert steps_in_store(record, runs, "final/sciq_acc") == [0, 0]  # an equal value is not sent again
    assert steps_in_store(record, runs) == [1, 2, 3] and steps_in_store(record, runs, "final/val_loss") == [0]
    assert run_of(record, runs).info.status == "FINISHED"
