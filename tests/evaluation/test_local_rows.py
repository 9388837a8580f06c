import json

import pytest

from moepp.errors import UsageError
from moepp.evaluation.local_rows import check_rows
from moepp.evaluation.tasks import TaskRequest, load_task

TASK = {
    "doc_to_text": "{{support.lstrip()}}\nQuestion: {{question}}\nAnswer:",
    "doc_to_target": 3,
    "doc_to_choice": "{{[distractor1, distractor2, distractor3, correct_answer]}}",
}
ROW = {"support": "", "question": "q?", "correct_answer": "a", **{f"distractor{i}": f"d{i}" for i in (1, 2, 3)}}


def without(name):
    return {key: value for key, value in ROW.items() if key != name}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([without("distractor3")] * 3, r"row 1 has no 'distractor3', which the task needs; it has support, question"),
        ([ROW, ROW, without("support")], r"row 3 has no 'support'"),
        ([ROW | {"question": None}], r"row 1 has no 'question'"),
        ([ROW, ROW | {"correct_answer": ""}], r"row 2: 'correct_answer', an answer, is empty"),
        ([], "has no rows"),
        (["x"], "row 1 is no JSON object"),
    ],
)
def test_rows_that_a_task_cannot_read_are_named(tmp_path, rows, message):
    path = tmp_path / "sciq.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UsageError, match=rf"sciq.jsonl.*{message}"):
        check_rows(path, TASK)


@pytest.mark.parametrize("form", ["lines", "array", "crlf with a mark"])
def test_rows_are_read_in_every_form_that_the_harness_reads(tmp_path, form):
    lines = [json.dumps(ROW)] * 3
    array, marked = f"[{','.join(lines)}]", "\ufeff" + "\r\n".join(lines)
    text = {"lines": "\n".join(lines), "array": array, "crlf with a mark": marked}
    (tmp_path / "sciq.jsonl").write_bytes(text[form].encode())
    assert check_rows(tmp_path / "sciq.jsonl", TASK) == 3


def test_more_shots_than_examples_are_refused_before_the_harness_loads(tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "sciq.jsonl").write_text((json.dumps(ROW) + "\n") * 6)
    with pytest.raises(UsageError, match=r"has 5 examples for prompts with 99; ask for sciq:5"):
        load_task(TaskRequest("sciq", 99), tmp_path)
