"""Finished trials in one archive, and back."""

import json
import tarfile

import pytest

from moepp.errors import RunError, UsageError
from moepp.records import TOKENIZER, RunRecord, write_json, write_text
from moepp.sweeps.parcel import pack, unpack
from moepp.sweeps.timing import time_arms
from moepp.training.initial import checkpoint_file


@pytest.fixture
def sweep(tmp_path):
    """Two finished trials with weights and one that has begun."""
    directory = tmp_path / "here/toy-smoke"
    trials = [{"arm": arm, "seed": 0, "path": f"{n:012x}", "steps": 8} for n, arm in enumerate(["a", "b", "c"])]
    write_json(directory / "sweep.json", {"name": "toy", "trials": trials})
    write_json(directory / "timing.json", {"runs": {}})
    for trial in trials:
        record = RunRecord(directory / trial["path"])
        write_text(record.path / "config.yaml", f"seed: {trial['arm']}\n")
        write_text(record.path / TOKENIZER, json.dumps(list(range(50_000))))
        write_text(record.path / "checkpoints/final.ckpt", "weights")
        write_text(record.path / "log.txt", "much")
        record.log(8, {"final/val_loss": 1.0})
        if trial["arm"] != "c":
            record.finish()
    return directory


def test_what_is_packed_is_finished_elsewhere(sweep, tmp_path):
    archive, there = tmp_path / "runs.tar.xz", tmp_path / "there/toy-smoke"
    assert pack(sweep, archive) == 2 and unpack(archive, there) == (2, 2)
    names = {path.name for path in there.iterdir()}
    assert names == {f"{0:012x}", f"{1:012x}", "sweep.json", "timing.json"}
    for n in range(2):
        record = RunRecord(there / f"{n:012x}")
        kept = {path.name for path in record.path.iterdir()}
        assert record.status == "done" and kept == {"config.yaml", "metrics.jsonl", "done", TOKENIZER}
        assert (record.path / TOKENIZER).read_bytes() == (sweep / record.path.name / TOKENIZER).read_bytes()
        assert (record.path / "metrics.jsonl").stat().st_nlink == 1


def test_a_tokenizer_is_stored_once_and_bytes_repeat(sweep, tmp_path):
    first, again = tmp_path / "a.tar.xz", tmp_path / "b.tar.xz"
    pack(sweep, first)
    pack(sweep, again)
    assert first.read_bytes() == again.read_bytes()
    with tarfile.open(first) as tar:
        assert [member.islnk() for member in tar if member.name.endswith(TOKENIZER)] == [False, True]


def test_what_is_there_already_stays(sweep, tmp_path):
    archive = tmp_path / "runs.tar.xz"
    pack(sweep, archive)
    (sweep / f"{0:012x}/done").unlink()
    before = (sweep / "sweep.json").read_bytes()
    assert unpack(archive, sweep) == (0, 2)
    assert RunRecord(sweep / f"{0:012x}").status == "started" and (sweep / "sweep.json").read_bytes() == before
    assert not list(sweep.glob(".unpack*"))


def test_missing_weights_are_said(sweep, tmp_path, capsys):
    there = tmp_path / "there/toy-smoke"
    pack(sweep, tmp_path / "runs.tar.xz")
    unpack(tmp_path / "runs.tar.xz", there)
    with pytest.raises(RunError, match=r"this record came without its weights, and `python run\.py rerun "):
        checkpoint_file(there / f"{0:012x}")
    assert time_arms(there) == {"runs": {}}
    assert "not timed: no weights of arm a, b are here" in capsys.readouterr().out


def test_nothing_to_pack_or_unpack_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="holds no finished trial to pack"):
        pack(tmp_path / "none", tmp_path / "a.tar.xz")
    with pytest.raises(UsageError, match=r"there is no archive .*a\.tar\.xz; `sweep pack` writes it"):
        unpack(tmp_path / "a.tar.xz", tmp_path / "none")


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "corrupt"])
def test_what_is_no_whole_archive_is_one_line_and_leaves_nothing(sweep, tmp_path, damage):
    archive, there = tmp_path / "runs.tar.xz", tmp_path / "there"
    pack(sweep, archive)
    whole = archive.read_bytes()
    middle = len(whole) // 2
    corrupt = whole[:middle] + bytes(64) + whole[middle + 64 :]
    archive.write_bytes({"cut": whole[:middle], "text": b"hello\n", "empty": b"", "corrupt": corrupt}[damage])
    with pytest.raises(UsageError, match=r"runs\.tar\.xz is no whole archive of `sweep pack` \(.+\); pack") as said:
        unpack(archive, there)
    assert "\n" not in str(said.value) and not list(there.iterdir())


def test_an_archive_of_something_else_is_said(tmp_path):
    archive = tmp_path / "runs.tar.xz"
    write_text(tmp_path / "notes.txt", "mine")
    with tarfile.open(archive, "w:xz") as tar:
        tar.add(tmp_path / "notes.txt", "notes.txt")
    with pytest.raises(UsageError, match=r"runs\.tar\.xz holds no finished trial"):
        unpack(archive, tmp_path / "there")
