import socket

import pytest
from mirrored import artifacts, log, make_sweep, run_of, steps_in_store, store
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from sqlalchemy import event
from sqlalchemy.engine import Engine

from moepp.records import RunRecord, read_json
from moepp.tracking import mirror as tracking
from moepp.tracking import mlflow_store
from moepp.tracking.mirror import FolderMirror, Mirror, log_report, sync_all
from moepp.tracking.settings import TrackingConfig


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


@pytest.fixture
def statements():
    seen = []

    def see(connection, cursor, text, *rest):
        seen.append(text)

    event.listen(Engine, "before_cursor_execute", see)
    yield seen
    event.remove(Engine, "before_cursor_execute", see)


def test_the_runs_of_a_first_sync_take_few_statements(runs, statements, monkeypatch):
    """A thousand of them are waited for. What does not depend on the run is asked once."""
    directory = make_sweep(runs, "sweep-counted")
    put, each = Mirror.sync, []

    def counted(mirror, ended):
        statements.clear()
        put(mirror, ended)
        each.append([text for text in statements if not text.startswith("PRAGMA")])

    monkeypatch.setattr(Mirror, "sync", counted)
    FolderMirror(directory, TrackingConfig(), runs).sync()
    second = each[1]
    assert len(second) <= 30 and not any("FROM experiments WHERE experiments.name" in text for text in second)
    assert sum(text.startswith(("INSERT", "UPDATE")) for text in second) == 8


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


def test_records_are_mirrored_anew_into_a_store_that_lacks_them(runs, tmp_path):
    directory = make_sweep(tmp_path, "sweep")
    old = TrackingConfig(uri=f"sqlite:///{runs}/mlflow.db")
    assert sync_all(tmp_path, old) == 2
    first = run_of(RunRecord(directory / "aaaa"), runs).info.run_id
    assert sync_all(tmp_path, TrackingConfig()) == 2
    assert run_of(RunRecord(directory / "aaaa"), tmp_path).info.run_id != first
    assert steps_in_store(RunRecord(directory / "aaaa"), tmp_path) == [1, 2]
