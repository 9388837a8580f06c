import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moepp.errors import RunError
from moepp.records import MetricsTail, RunRecord, link_or_copy, write_text

HOLDER = """
import sys
from moepp.records import RunRecord
with RunRecord(sys.argv[1]).lock():
    print("locked", flush=True)
    sys.stdin.read()
"""

ASKER = """
import sys
from moepp.records import RunRecord
record = RunRecord(sys.argv[1])
print("asking", flush=True)
while True:
    record.held
"""


@pytest.fixture
def record(tmp_path):
    return RunRecord(tmp_path)


def test_a_locked_record_names_its_holder_and_is_free_once_that_is_killed(record):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(record.path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(RunError, match=f"in use by process {holder.pid}; end it or wait"), record.lock():
        pass
    holder.kill()
    holder.communicate()
    with record.lock():
        assert (record.path / "lock").read_text() != str(holder.pid)


def test_a_tail_returns_each_complete_line_once(record):
    tail = MetricsTail(record)
    assert tail.read() == []
    record.log(1, {"loss": 0.5})
    record.log(2, {"loss": 0.25})
    assert [line["step"] for line in tail.read()] == [1, 2]
    assert tail.read() == []
    with open(record.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "ti')
        file.flush()
        assert tail.read() == []
        file.write('me": 0}\n')
    assert [line["step"] for line in tail.read()] == [3]


def test_a_tail_reads_a_rewound_record_from_its_beginning(record):
    tail = MetricsTail(record)
    for step in (1, 2, 3):
        record.log(step, {"loss": 0.5})
    tail.read()
    record.rewind(1)
    for step in (2, 3, 4):
        record.log(step, {"loss": 0.5})
    assert [line["step"] for line in tail.read()] == [1, 2, 3, 4]


def test_a_record_that_begins_anew_forgets_what_came_before_the_first_step(record):
    for step in (0, 1):
        record.log(step, {"loss": 0.5})
    record.rewind(1)
    assert [line["step"] for line in record.metrics()] == [0, 1]
    record.rewind(0)
    assert record.metrics() == []


def test_a_record_is_held_while_a_process_works_in_it(record):
    assert record.held is False
    with record.lock():
        assert record.held is True
        holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(record.path)], stderr=subprocess.PIPE)
        assert holder.wait() and b"in use by process" in holder.communicate()[1]  # asking gave nothing away
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(record.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "locked\n"
    assert record.held is True
    holder.kill()
    holder.communicate()
    assert record.held is False


def test_who_asks_whether_a_record_is_held_turns_nobody_away(record):
    (record.path / "lock").touch()
    asker = subprocess.Popen([sys.executable, "-c", ASKER, str(record.path)], stdout=subprocess.PIPE, text=True)
    assert asker.stdout.readline() == "asking\n"
    try:
        for _ in range(300):
            with record.lock():
                pass
    finally:
        asker.kill()
        asker.communicate()


def test_without_file_locks_a_record_is_worked_in_and_nobody_knows(record, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    (record.path / "lock").touch()
    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert record.held is None
    with record.lock():
        assert record.held is True


DAMAGE = {
    "cut": lambda text: text[:-5],
    "cut at a line's end": lambda text: text[: text.index(b"\n") + 1],
    "empty": lambda text: b"",
    "NUL": lambda text: bytes(len(text)),
    "a hole": lambda text: bytes(8) + text[8:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_finished_run_whose_metrics_are_not_whole_is_damaged(record, damage):
    record.log(1, {"train/loss": 0.5})
    record.log(1, {"final/val_loss": 0.5})
    record.finish()
    assert record.status == "done" and record.damage == ""
    path = record.path / "metrics.jsonl"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    assert record.status == "damaged"
    assert str(path) in record.damage and "restore it" in record.damage and "\n" not in record.damage
    (record.path / "done").unlink()
    assert record.status == "started"  # an unfinished one may well end within a line


def test_a_finished_run_whose_metrics_are_gone_is_damaged(record):
    record.finish()
    assert record.status == "damaged" and "No such file" in record.damage


def test_a_linked_file_appears_whole_and_is_copied_where_it_cannot_be_linked(record, monkeypatch):
    source = record.path / "source"
    source.write_text("text")
    link_or_copy(source, record.path / "link")
    assert (record.path / "link").samefile(source)

    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    link_or_copy(source, record.path / "copy")
    assert (record.path / "copy").read_text() == "text" and not (record.path / "copy").samefile(source)
    assert sorted(path.name for path in record.path.iterdir()) == ["copy", "link", "source"]


@pytest.fixture
def synced(monkeypatch):
    """Names of the files and folders that were brought to the disk, in order."""
    names, real = [], os.fsync

    def fsync(descriptor):
        names.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return names


def test_a_replaced_file_is_on_the_disk_and_so_is_its_name(record, synced):
    write_text(record.path / "note.txt", "kept")
    assert synced[0].startswith(".note.txt.") and synced[1:] == [record.path.name]


def test_the_metrics_are_on_the_disk_before_the_marker(record, synced):
    record.log(1, {"train/loss": 0.5})
    assert not synced
    record.finish()
    assert synced[0] == "metrics.jsonl" and synced[1].startswith(".done.")
