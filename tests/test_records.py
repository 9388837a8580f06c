import subprocess
import sys

import pytest

from moepp.errors import RunError
from moepp.records import MetricsTail, RunRecord

HOLDER = """
import sys
from moepp.records import RunRecord
with RunRecord(sys.argv[1]).lock():
    print("locked", flush=True)
    sys.stdin.read()
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
