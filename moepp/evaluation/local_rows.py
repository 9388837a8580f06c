"""Rows of local task data, looked at before the harness is: of what they lack it speaks in words of its own."""

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moepp.errors import UsageError
from moepp.lfs import refuse_pointer

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

ANSWERS, FIELDS = ("doc_to_target", "doc_to_choice"), ("doc_to_text", "doc_to_target", "doc_to_choice")


def check_rows(file: Path, task: Mapping[str, Any]) -> None:
    """Raises UsageError, with row and column, for what the task's templates cannot read.

    `task` is the harness's file. Where it makes other columns of these first (process_docs), only that rows are alike
    is known.
    """
    rows = read_rows(file)
    made = "process_docs" in task
    needed = {} if made else {name: field in ANSWERS for field in FIELDS for name in columns(task.get(field))}
    needed = dict.fromkeys(rows[0], False) | needed if made else needed
    for number, row in enumerate(rows, start=1):
        if missing := [name for name in needed if row.get(name) is None]:
            has = ", ".join(row)
            raise UsageError(f"{file} row {number} has no '{missing[0]}', which the task needs; it has {has}")
        if empty := [name for name, is_answer in needed.items() if is_answer and row[name] in ("", [])]:
            raise UsageError(f"{file} row {number}: '{empty[0]}', an answer, is empty")


def check_questions(docs: Iterable[Mapping[str, Any]], task: "ConfigurableTask", file: Path) -> None:
    """Has the task make its questions of all rows of a file. Raises UsageError for a row of which it cannot."""
    for number, doc in enumerate(docs, start=1):
        try:
            _refuse_no_question(task, doc)
        except Exception as error:  # whatever templates and the task's own functions raise
            said = " ".join(str(error).split())
            raise UsageError(f"{file} row {number} is none of task {task.config.task}: {said}") from error


def check_examples(task: "ConfigurableTask", source: Path | str, asked: str) -> None:
    """Raises UsageError where a prompt needs more examples than `source` has of the task, without those that are the
    question itself. `asked` is the task's name, or that of all tasks whose rows the source holds.
    """
    if not (shots := task.config.num_fewshot):
        return
    docs = [json.dumps(doc, sort_keys=True, default=str) for doc in task.fewshot_docs()]
    itself = max(Counter(docs).values()) if task.fewshot_cfg.split == task.config.test_split else 0
    if shots > (others := len(docs) - itself):
        part = "" if task.config.task == asked else f" of {task.config.task}"
        raise UsageError(f"{source} has {others} examples{part} for prompts with {shots}; ask for {asked}:{others}")


def _refuse_no_question(task: "ConfigurableTask", doc: Mapping[str, Any]) -> None:
    text, target = task.doc_to_text(doc), task.doc_to_target(doc)
    if task.OUTPUT_TYPE != "multiple_choice":
        _refuse_no_texts("answer", target)
        return
    choices = task.doc_to_choice(doc)
    _refuse_no_texts("choices", choices)
    if task.multiple_input:  # texts to choose from, with one continuation
        _refuse_no_texts("continuation", target)
    right = text if task.multiple_input else target
    right = choices.index(right) if right in choices else right
    for index in right if isinstance(right, list) else [right]:
        if type(index) is not int or not 0 <= index < len(choices):
            raise ValueError(f"the answer {index!r} is none of its {len(choices)} choices")


def _refuse_no_texts(what: str, found: Any) -> None:
    texts = found if isinstance(found, list) else [found]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"its {what} {found!r} must be text")


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Of JSON lines or an array. Raises UsageError for another file, and for one without rows."""
    refuse_pointer(file)
    try:
        text = (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8-sig").read()
        array = text.lstrip().startswith("[")
        rows = json.loads(text) if array else [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, EOFError, ValueError) as error:
        raise UsageError(f"{file} is no file of JSON rows: {' '.join(str(error).split())}") from None
    if not rows:
        raise UsageError(f"{file} has no rows")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UsageError(f"{file} row {number} is no JSON object")
        if re.search(r"\\u[dD][89a-fA-F]", text) and re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False)):
            raise UsageError(f"{file} row {number} holds half a character")
    return rows


def columns(template: Any) -> set[str]:
    """The columns that a field of a task names: in a template, or by itself. None of a template that asks which columns
    there are, as `answer if answer is defined else target` does.
    """
    from jinja2 import Environment, TemplateError, meta, nodes

    if not isinstance(template, str):
        return set()
    if "{{" not in template and "{%" not in template:
        return {template} if template.isidentifier() else set()
    try:
        parsed = Environment().parse(template)
        asks = any(test.name in ("defined", "undefined") for test in parsed.find_all(nodes.Test))
        return set() if asks else meta.find_undeclared_variables(parsed)
    except TemplateError:
        return set()
