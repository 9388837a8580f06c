"""The paper's eleven tasks as plain texts: the question as lm-evaluation-harness 0.4 puts it, and the gold answer.

Zero-shot: the examples of a few-shot prompt would be the same few in every text and drown the question. Files hold the
columns of the harness's stock tasks, one JSON object per line.
"""

import gzip
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moepp.errors import UsageError
from moepp.routing.texts import Passage, evenly_chosen

Fields = Mapping[str, Any]
Question = tuple[str, str]  # the question, and the gold answer with the space or line end before it

SUBJECT_AREAS = {  # of MMLU, as its authors group them
    "STEM": """abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics electrical_engineering
        elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
        high_school_mathematics high_school_physics high_school_statistics machine_learning""",
    "humanities": """formal_logic high_school_european_history high_school_us_history high_school_world_history
        international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory
        professional_law world_religions""",
    "social sciences": """econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
        professional_psychology public_relations security_studies sociology us_foreign_policy""",
    "other": """business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing
        medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology""",
}
ENDINGS = ("", "_test", "_validation")  # of file names, best first; examples to learn from are never read
AREA = {subject: area for area, subjects in SUBJECT_AREAS.items() for subject in subjects.split()}


def _sciq(row: Fields) -> Question:
    return f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:", f" {row['correct_answer']}"


def _piqa(row: Fields) -> Question:
    return f"Question: {row['goal']}\nAnswer:", f" {row[('sol1', 'sol2')[int(row['label'])]]}"


def _winogrande(row: Fields) -> Question:
    """The harness scores the common end of the sentence after the chosen option."""
    before, after = row["sentence"].split("_", 1)
    return f"{before}{row[('option1', 'option2')[int(row['answer']) - 1]]}", f" {after.strip()}"


def _arc(row: Fields) -> Question:
    choices = row["choices"]
    return f"Question: {row['question']}\nAnswer:", f" {choices['text'][choices['label'].index(row['answerKey'])]}"


def _hellaswag(row: Fields) -> Question:
    question = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _without_wikihow_marks(question), f" {_without_wikihow_marks(row['endings'][int(row['label'])])}"


def _without_wikihow_marks(text: str) -> str:
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _logiqa(row: Fields) -> Question:
    options = "".join(f"{letter}. {option}\n" for letter, option in zip("ABCD", row["options"], strict=True))
    question = f"Passage: {row['context']}\nQuestion: {row['question']}\nChoices:\n{options}Answer:"
    return question, f" {row['options']['abcd'.index(row['label'].strip())]}"


def _boolq(row: Fields) -> Question:
    return f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", f" {('no', 'yes')[int(row['label'])]}"


def _lambada(row: Fields) -> Question:
    question, _, last = row["text"].rpartition(" ")
    return question, f" {last}"


def _nq_open(row: Fields) -> Question:
    return f"Q: {row['question']}?\nA:", f" {row['answer'][0]}"


def _mmlu(row: Fields) -> Question:
    options = "".join(f"{letter}. {option}\n" for letter, option in zip("ABCD", row["choices"], strict=True))
    return f"{row['question'].strip()}\n{options}Answer:", f" {'ABCD'[int(row['answer'])]}"


TASKS: dict[str, tuple[str, Callable[[Fields], Question]]] = {  # file name -> name in the paper, form
    "sciq": ("SciQ", _sciq),
    "piqa": ("PIQA", _piqa),
    "winogrande": ("WinoGrande", _winogrande),
    "arc_easy": ("ARC-E", _arc),
    "arc_challenge": ("ARC-C", _arc),
    "hellaswag": ("HellaSwag", _hellaswag),
    "logiqa": ("LogiQA", _logiqa),
    "boolq": ("BoolQ", _boolq),
    "lambada_openai": ("LAMBADA", _lambada),
    "nq_open": ("NQ", _nq_open),
    "mmlu": ("MMLU", _mmlu),
}


def read_tasks(folder: Path, limit: int, subject_limit: int) -> list[Passage]:
    """Up to `limit` examples, evenly spread, of every task found in `folder` as `<task>.jsonl`, `<task>_test.jsonl` or
    `<task>_validation.jsonl`, plain or gzipped; of a task with subjects (MMLU) up to `subject_limit` of each subject.

    Raises UsageError for a folder without any, and for a line that lacks a task's columns.
    """
    files = {
        name: [folder / f"{name}{end}.jsonl{packed}" for end in ENDINGS for packed in ("", ".gz")] for name in TASKS
    }
    found = {name: [path for path in paths if path.is_file()] for name, paths in files.items()}
    if not any(found.values()):
        raise UsageError(f"{folder} holds no task: expected files such as {', '.join(list(TASKS)[:3])}.jsonl(.gz)")
    passages = []
    for name, paths in found.items():
        for path in paths[:1]:
            by_subject: dict[str, list[Passage]] = {}
            for number, line in enumerate(read_lines(path), start=1):
                passage = _passage(path, number, line, name)
                by_subject.setdefault(passage.subject, []).append(passage)
            for subject, examples in by_subject.items():
                passages += evenly_chosen(examples, subject_limit if subject else limit)
    return passages


def _passage(path: Path, number: int, line: str, name: str) -> Passage:
    task, form = TASKS[name]
    try:
        row = json.loads(line)
        question, answer = form(row)
        subject = row.get("subject", "")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{path} line {number} lacks columns of the task {name} ({type(error).__name__}: {error})"
        ) from None
    return Passage(question + answer, task, AREA.get(subject, subject), subject, len(question))


def read_lines(path: Path) -> list[str]:
    """The lines of a plain or gzipped UTF-8 file that are not blank. Raises UsageError where it cannot be read."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            return [line for line in file if line.strip()]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None
