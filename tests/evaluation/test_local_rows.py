import json

import pytest

from moepp.errors import UsageError
from moepp.evaluation.local_rows import check_rows, read_rows
from moepp.evaluation.tasks import FOLDERS, PAPER_SHOTS, TaskRequest, load_task

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
    assert read_rows(tmp_path / "sciq.jsonl") == [ROW] * 3


SUBJECT = {"question": "q?", "choices": ["1", "2", "3", "4"], "answer": 0}


@pytest.mark.parametrize(
    ("task", "shots", "rows", "message"),
    [
        ("sciq", 99, [ROW | {"question": f"{i}?"} for i in range(6)], "5 examples for prompts with 99; ask for sciq:5"),
        ("sciq", 1, [ROW] * 6, "0 examples for prompts with 1; ask for sciq:0"),
        (
            "mmlu", 2, [SUBJECT | {"subject": "anatomy", "question": f"{i}?"} for i in range(9)]
            + [SUBJECT | {"subject": "virology", "question": f"{i}?"} for i in range(2)],
            "1 examples of mmlu_virology for prompts with 2; ask for mmlu:1",
        ),
        ("gsm8k", None, [{"question": f"{i}?", "answer": "#### 1"} for i in range(4)],
         "3 examples for prompts with 5; ask for gsm8k:3"),
    ],
)  # fmt: skip
def test_more_shots_than_other_questions_are_refused_before_a_model_is_asked(
    tmp_path, task, shots, rows, message, monkeypatch
):
    pytest.importorskip("lm_eval")
    monkeypatch.setitem(FOLDERS, "gsm8k", "gsm8k")  # an index of all stock tasks takes many seconds
    monkeypatch.setitem(PAPER_SHOTS, "gsm8k", None)
    (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UsageError, match=rf"{task}\.jsonl has {message}"):
        load_task(TaskRequest(task, shots), tmp_path)


def test_a_task_that_spells_out_its_prompts_examples_keeps_them_on_local_data(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setitem(FOLDERS, "gsm8k_cot", "gsm8k")
    monkeypatch.setitem(PAPER_SHOTS, "gsm8k_cot", None)
    (tmp_path / "gsm8k_cot.jsonl").write_text(json.dumps({"question": "How many?", "answer": "#### 1"}) + "\n")
    loaded = load_task(TaskRequest("gsm8k_cot", None), tmp_path)
    (task,) = loaded.tasks.values()
    prompt = task.fewshot_context(task.eval_docs[0], loaded.shots)
    assert loaded.shots == 8 and prompt.startswith("Q: There are 15 trees") and prompt.count("How many?") == 1
    assert loaded.examples_from == "the harness's task file"
    with pytest.raises(UsageError, match="task file has 8 examples for prompts with 9; ask for gsm8k_cot:8"):
        load_task(TaskRequest("gsm8k_cot", 9), tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([SUBJECT], r"mmlu\.jsonl row 1 has no 'subject', the task that it belongs to, in text"),
        ([SUBJECT | {"subject": None}], "row 1 has no 'subject'"),
        ([SUBJECT | {"subject": "../a"}], r"there is no task mmlu_\.\./a with questions"),
    ],
)
def test_rows_that_are_of_no_subject_are_named(tmp_path, rows, message):
    pytest.importorskip("lm_eval")
    (tmp_path / "mmlu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UsageError, match=message):
        load_task(TaskRequest("mmlu", 0), tmp_path)


def test_subjects_are_read_of_an_array_too(tmp_path):
    pytest.importorskip("lm_eval")
    rows = [SUBJECT | {"subject": subject} for subject in ("anatomy", "virology")]
    (tmp_path / "mmlu.jsonl").write_text(json.dumps(rows, indent=1))
    assert load_task(TaskRequest("mmlu", 0), tmp_path).sizes == {"mmlu_anatomy": 1, "mmlu_virology": 1}


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
