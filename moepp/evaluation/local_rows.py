"""Rows of local task data, looked at before the harness is: of what they lack it speaks in words of its own."""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moepp.errors import UsageError
from moepp.lfs import refuse_pointer

ANSWERS, FIELDS = ("doc_to_target", "doc_to_choice"), ("doc_to_text", "doc_to_target", "doc_to_choice")


def check_rows(file: Path, task: Mapping[str, Any]) -> int:
    """How many rows a file has. Raises UsageError, with row and column, for what the task's templates cannot read.

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
    return len(rows)


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
    return rows


def columns(template: Any) -> set[str]:
    """The columns that a field of a task names: in a template, or by itself."""
    from jinja2 import Environment, TemplateError, meta

    if not isinstance(template, str):
        return set()
    if "{{" not in template and "{%" not in template:
        return {template} if template.isidentifier() else set()
    try:
        return meta.find_undeclared_variables(Environment().parse(template))
    except TemplateError:
        return set()
