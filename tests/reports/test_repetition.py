import json
import math

import pytest
from synthetic_sweep import write_run

from moepp.errors import UsageError
from moepp.records import write_json, write_text
from moepp.reports.repetition import compare_repetition, describe_repetition

PROVENANCE = {
    "git": {"sha": "abc", "dirty": False}, "data": {"digest": "d1"}, "versions": {"torch": "2.13"},
    "hardware": {"cpu": "two cores", "threads": 1}, "host": "here",
}  # fmt: skip


@pytest.fixture
def original(tmp_path):
    return make(tmp_path / "original", [4.0, 3.5])


def make(path, losses, final=3.25, provenance=PROVENANCE):
    record = write_run(path, final)
    lines = [{"step": 10 * (i + 1), "time": 0, "train/loss": loss} for i, loss in enumerate(losses)]
    lines.append({"step": 20, "time": 0, "final/val_loss": final})
    write_text(path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_json(path / "provenance.json", provenance)
    return record


def test_equal_losses_agree_to_the_last_bit(tmp_path, original):
    found = compare_repetition(original, make(tmp_path / "again", [4.0, 3.5]))
    assert (found.equal, found.unexplained, found.compared, found.largest) == (True, False, 3, 0)
    assert describe_repetition(found)[-1] == "losses    equal, all 3 of them, to the last bit"
    assert [line.split()[1:] for line in describe_repetition(found)[:-1]] == [["the", "same"]] * 4


def test_the_smallest_difference_counts_and_is_unexplained_when_nothing_else_differs(tmp_path, original):
    found = compare_repetition(original, make(tmp_path / "again", [4.0, math.nextafter(3.5, 4)]))
    assert found.unexplained and found.differing == 1
    assert found.where == "train/loss, step 20" and found.largest == math.nextafter(3.5, 4) - 3.5
    assert "1 of 3 differ" in describe_repetition(found)[-1]
    assert compare_repetition(original, make(tmp_path / "b", [4.0, 3.5], final=3.26)).where == "final/val_loss"


@pytest.mark.parametrize("losses", [[4.0], [4.0, 3.5, 3.0], [4.0, math.nan]])
def test_a_step_that_only_one_run_has_is_no_agreement(tmp_path, original, losses):
    found = compare_repetition(original, make(tmp_path / "again", losses))
    assert not found.equal and found.largest == math.inf


@pytest.mark.parametrize(
    ("changed", "kind", "said"),
    [
        ({"git": {"sha": "def", "dirty": False}}, "code", "sha abc -> def"),
        ({"git": {"sha": "abc", "dirty": True}}, "code", "dirty false -> true; uncommitted changes in the repetition"),
        ({"git": {}}, "code", "sha abc -> –; dirty false -> –"),
        ({"data": {"digest": "d2"}}, "data", "digest d1 -> d2"),
        ({"versions": {"torch": "2.14"}}, "versions", "torch 2.13 -> 2.14"),
        ({"hardware": {"cpu": "two cores", "threads": 2}}, "hardware", "threads 1 -> 2"),
    ],
)
def test_what_else_differs_is_named_and_explains_other_losses(tmp_path, original, changed, kind, said):
    found = compare_repetition(original, make(tmp_path / "again", [4.0, 3.4], provenance=PROVENANCE | changed))
    assert list(found.differs) == [kind] and "; ".join(found.differs[kind]) == said
    assert not found.equal and not found.unexplained
    assert f"{kind:<9} {said}" in describe_repetition(found)


def test_a_run_that_was_begun_with_other_code_is_no_run_of_its_last_code(tmp_path):
    before = {**PROVENANCE, "git": {"sha": "old", "dirty": False}, "versions": {"torch": "2.12"}}
    original = make(tmp_path / "original", [4.0, 3.5], provenance=PROVENANCE | {"earlier": [before]})
    found = compare_repetition(original, make(tmp_path / "again", [4.0, 3.4]))
    assert found.differs == {
        "code": ["the original was begun with sha old"], "versions": ["the original was begun with torch 2.12"],
    }  # fmt: skip
    assert not found.unexplained


def test_of_runs_that_did_not_finish_the_steps_count_that_both_have(tmp_path, original):
    again = make(tmp_path / "again", [4.0])
    (again.path / "done").unlink()
    again.fail("expert 3 is on fire")
    lines = [line for line in again.metrics() if "final/val_loss" not in line]
    write_text(again.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    found = compare_repetition(original, again)
    assert (found.equal, found.compared, found.ended) == (True, 1, "original done, repetition failed")
    assert "ended     original done, repetition failed" in describe_repetition(found)
    write_text(again.path / "metrics.jsonl", "")
    with pytest.raises(UsageError, match="share no logged loss"):
        compare_repetition(original, again)


def test_code_with_uncommitted_changes_on_both_sides_is_not_known_to_be_the_same(tmp_path):
    dirty = PROVENANCE | {"git": {"sha": "abc", "dirty": True}}
    records = [make(tmp_path / name, [loss], provenance=dirty) for name, loss in (("a", 4.0), ("b", 4.1))]
    assert not compare_repetition(*records).unexplained


def test_another_host_is_no_excuse(tmp_path, original):
    again = make(tmp_path / "again", [4.0, 3.4], provenance=PROVENANCE | {"host": "there"})
    assert compare_repetition(original, again).unexplained
