import json
import os
from datetime import UTC, datetime

import pytest

from moepp.records import RunRecord, write_json, write_text
from moepp.reports import seconds
from moepp.reports.seconds import Clock, parts_of

BEGAN = 1_700_000_000.0


def finished(path, began, ended, lines, train_seconds):
    """Lines are (seconds after the start, what)."""
    told = [{"step": step, "time": 1000 * (began + after), **what} for after, step, what in lines]
    told[-1]["final/train_seconds"] = train_seconds
    write_text(path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in told))
    write_json(path / "provenance.json", {"started": datetime.fromtimestamp(began, UTC).isoformat()})
    record = RunRecord(path)
    record.finish()
    os.utime(path / "done", (ended, ended))
    return record


def trial(path, began):
    """8 s to start, 20 of training, 2 validations of 3 and 5, 4 of last measurements: 40 in all."""
    lines = [
        (18, 1, {"train/loss": 2}), (21, 1, {"val/loss": 2}), (31, 2, {"train/loss": 1}), (36, 2, {"val/loss": 1}),
        (40, 2, {"final/val_loss": 1}),
    ]  # fmt: skip
    return finished(path, began, began + 40, lines, 28.0)


def test_the_parts_of_a_trial_are_read_from_its_record(tmp_path):
    assert parts_of(trial(tmp_path, BEGAN)) == {
        "start": 8, "training": 20, "validation": 8, "last measurements": 4,
    }  # fmt: skip


def test_a_resumed_trial_has_no_negative_start(tmp_path):
    """Its training seconds are those of all attempts."""
    assert parts_of(finished(tmp_path, BEGAN, BEGAN + 5, [(4, 2, {}), (5, 2, {})], 100.0))["start"] == 0


def test_all_seconds_of_a_command_are_told_with_those_of_its_new_trials(tmp_path, monkeypatch):
    now = [BEGAN]
    monkeypatch.setattr(seconds.time, "time", lambda: now[0])
    clock = Clock()
    trial(tmp_path / "old", BEGAN - 100)
    for name, after in (("a", 10), ("b", 30)):
        trial(tmp_path / name, BEGAN + after)
    planned = [{"path": name} for name in ("old", "a", "b")] + [{"path": "never", "left_out": True}]
    write_json(tmp_path / "sweep.json", {"trials": planned})
    now[0] += 70
    with clock.phase("timing"):
        now[0] += 6
    now[0] += 2
    assert clock.told([tmp_path]) == [
        "the 78 s went to data and plan 10 s, trials 60 s, timing 6 s, other 2 s",
        "the seconds of the 2 new trials, summed: start 16 s, training 40 s, validation 16 s, last measurements 8 s",
    ]


@pytest.mark.parametrize("directories", [0, 1])
def test_a_command_that_trains_nothing_tells_its_own_seconds(tmp_path, monkeypatch, directories):
    monkeypatch.setattr(seconds.time, "time", lambda: BEGAN)
    clock = Clock()
    trial(tmp_path / "old", BEGAN - 100)
    write_json(tmp_path / "sweep.json", {"trials": [{"path": "old"}]})
    monkeypatch.setattr(seconds.time, "time", lambda: BEGAN + 3)
    assert clock.told([tmp_path] * directories) == ["the 3 s went to other 3 s"]
