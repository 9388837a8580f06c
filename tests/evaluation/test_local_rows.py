import json

import pytest

from moepp.errors import UsageError
from moepp.evaluation.local_rows import check_rows, read_rows
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


QUESTIONS = {
    "winogrande": [
        {"sentence": "Ann met Bo, so _ smiled.", "option1": "Ann", "option2": "Bo", "answer": a} for a in "12"
    ],
    "arc_easy": [
        {"id": i, "question": f"{i}?", "choices": {"text": ["red", "blue"], "label": ["A", "B"]}, "answerKey": i}
        for i in "AB"
    ],
    "piqa": [{"goal": "go", "sol1": "walk", "sol2": "fly", "label": label} for label in (0, 1)],
    "sciq": [ROW, ROW],
}


@pytest.mark.parametrize(
    ("task", "changed", "message"),
    [
        ("winogrande", {"answer": "3"}, "row 2 is none of task winogrande: '3'"),
        ("arc_easy", {"answerKey": "Z"}, "row 2 is none of task arc_easy: 'Z' is not in list"),
        ("piqa", {"label": 7}, "row 2 is none of task piqa: the answer 7 is none of its 2 choices"),
        ("piqa", {"label": -1}, "the answer -1 is none of its 2 choices"),
        ("sciq", {"correct_answer": 3}, r"its choices \['d1', 'd2', 'd3', 3\] must be text"),
    ],
)
def test_rows_that_make_no_question_are_named_before_a_model_is_asked(tmp_path, task, changed, message):
    pytest.importorskip("lm_eval")
    first, last = QUESTIONS[task]
    (tmp_path / f"{task}.jsonl").write_text(f"{json.dumps(first)}\n{json.dumps(last | changed)}\n")
    with pytest.raises(UsageError, match=message) as caught:
        load_task(TaskRequest(task, 0), tmp_path)
    assert f"{task}.jsonl row 2" in str(caught.value) and "\n" not in str(caught.value)


def test_half_a_character_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "\\u00e9"}\n{"q": "\\ud800"}\n')
    with pytest.raises(UsageError, match=r"a\.jsonl row 2 holds half a character"):
        read_rows(tmp_path / "a.jsonl")
