"""Which tasks, with how many examples in the prompt, on which data: the harness's own task files, or the same with
local data.
"""

import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from moepp.errors import RunError, UsageError
from moepp.evaluation.local_rows import check_examples, check_questions, check_rows, read_rows
from moepp.names import did_you_mean
from moepp.records import digest_of

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask, Task
    from lm_eval.tasks import TaskManager

# The paper's tasks (sections 3.3 and 4.1) with its numbers of examples in the prompt, in the order of its Table 4.
PAPER_SHOTS = {
    "sciq": 0, "piqa": 0, "winogrande": 0, "arc_easy": 0, "arc_challenge": 25, "hellaswag": 10, "logiqa": 0,
    "boolq": 32, "lambada_openai": 0, "nq_open": 32, "mmlu": 5,
}  # fmt: skip
# Their folders in the harness: reading only these saves the 15 seconds that an index of all its tasks takes.
FOLDERS = {
    "arc_easy": "arc", "arc_challenge": "arc", "boolq": "super_glue/boolq", "lambada_openai": "lambada",
    "mmlu": "mmlu/default",
}  # fmt: skip
EVALUATED, EXAMPLES = ("", "_test", "_validation"), ("_train", "_dev")  # endings of local files' names, best first
WORD = re.compile(r"""[^\s"',:\[\]]+""")
OWN_EXAMPLES = "the harness's task file"
SUBJECT = "subject"  # the column that divides a local file of MMLU into its 57 tasks


@dataclass(frozen=True)
class TaskRequest:
    """`shots`: examples in the prompt; None: as the harness's task file says."""

    name: str
    shots: int | None


@dataclass(frozen=True)
class LoadedTask:
    """The harness's tasks that make up one of ours (57 for MMLU), how many examples of each are scored, and where their
    data comes from.
    """

    request: TaskRequest
    tasks: "dict[str, Task]"
    sizes: dict[str, int]
    limit: int | None
    data: str
    examples_from: str

    @property
    def shots(self) -> int:
        return next(iter(self.tasks.values())).config.num_fewshot


def parse_tasks(text: str) -> list[TaskRequest]:
    """`paper`, or names separated by commas, each with its shots where they are given: `sciq,boolq:0`.

    A task of the paper has the paper's shots unless others are given.
    """
    names = ",".join(PAPER_SHOTS) if text == "paper" else text
    found: dict[str, TaskRequest] = {}
    for word in names.split(","):
        name, colon, shots = word.strip().partition(":")
        if not name or (colon and not shots.isdecimal()):
            raise UsageError(f"--tasks {text}: '{word}' is no task; write names with commas, as sciq,piqa or boolq:0")
        found[name] = TaskRequest(name, int(shots) if colon else PAPER_SHOTS.get(name))
    return list(found.values())


def refuse_what_is_missing(requests: Sequence[TaskRequest], folder: Path | None) -> None:
    """Raises UsageError for a task whose name stands in no task file of the harness, and for one without a file in
    `folder`: what can be seen in a few seconds, when an index of all tasks takes a minute on a busy machine.
    """
    if others := [request.name for request in requests if request.name not in PAPER_SHOTS]:
        files = [file for file in stock_folder().rglob("*") if file.suffix not in (".py", ".pyc", ".md")]
        texts = (file.read_text("utf-8", errors="replace") for file in files if file.is_file())
        known, stems = {word for text in texts for word in WORD.findall(text)}, {file.stem for file in files}
        for name in others:
            _refuse_unknown(name, known, stems | PAPER_SHOTS.keys())
    for request in requests if folder else ():
        _evaluated_file(folder, request.name)


def _refuse_unknown(name: str, known: Collection[str], likely: Collection[str]) -> None:
    if name not in known:
        raise UsageError(f"lm-evaluation-harness has no task '{name}'{did_you_mean(name, likely)}")


def load_task(request: TaskRequest, folder: Path | None, limit: int | None = None) -> LoadedTask:
    """The task on hub data, or on the files of `folder` (docs/evaluation.md says which); of its examples the first
    `limit`, spread evenly over the tasks it is made of.

    Raises UsageError for a task that the harness does not know or that has no file, RunError for data that cannot be
    read.
    """
    import datasets
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # notes on every default it falls back on
    if folder is not None:
        datasets.disable_progress_bars()
    manager = _manager(request.name)
    with TemporaryDirectory(prefix="moepp-tasks-") as scratch:
        if folder is None:
            specs, data, examples_from = [request.name], "hub", "the stock split"
        else:
            specs, data, examples_from = _local(request, manager, folder, Path(scratch))
        try:
            tasks = (manager if folder is None else TaskManager(include_defaults=False)).load(specs)["tasks"]
        except Exception as error:  # whatever the data's readers and the hub's client raise
            where = "from the hub; --tasks-dir takes local files" if folder is None else f"in {folder}"
            raise RunError(f"cannot load the data of task {request.name} {where}: {_line(error)}") from error
        for task in tasks.values():
            task.set_config("num_fewshot", (task.config.num_fewshot or 0) if request.shots is None else request.shots)
    if folder is not None:
        examples_from = _own_examples(tasks.values()) or examples_from
        _check_questions(tasks, request.name, folder)
    else:
        data = f"hub:{next(iter(tasks.values())).config.dataset_path}"
    sizes = shared_out({name: len(task.eval_docs) for name, task in tasks.items()}, limit)
    asked = {name: tasks[name] for name in sizes}
    loaded = LoadedTask(request, asked, sizes, limit, data, examples_from)
    return loaded if loaded.shots else replace(loaded, examples_from="")


def _own_examples(tasks: "Iterable[ConfigurableTask]") -> str:
    """Gives tasks whose file spells out the examples of its prompts these, as they have them on hub data; returns what
    they are, empty where data are the only source.
    """
    for task in (own := [task for task in tasks if task.fewshot_cfg.samples]):
        task.fewshot_cfg.split = None
        task.sampler.replace_df(list(task.fewshot_docs()))
    return OWN_EXAMPLES if own else ""


def _check_questions(tasks: "Mapping[str, ConfigurableTask]", name: str, folder: Path) -> None:
    """Of local files, those of the evaluated one first."""
    evaluated, examples = _find(folder, name, EVALUATED), _find(folder, name, EXAMPLES)
    for task in tasks.values():
        check_questions(task.eval_docs, task, evaluated)
        of_data = task.fewshot_cfg.split is not None
        if examples and of_data and task.config.num_fewshot:
            check_questions(task.fewshot_docs(), task, examples)
        check_examples(task, (examples or evaluated) if of_data else OWN_EXAMPLES, name)


def shared_out(sizes: Mapping[str, int], limit: int | None) -> dict[str, int]:
    """How many examples of each part make `limit` in all: one of each in turn, until a part has no more. Parts that get
    none are left out.
    """
    turns = sorted((turn, name) for name, size in sizes.items() for turn in range(size))
    counts = Counter(name for _, name in turns[:limit])
    return {name: counts[name] for name in sizes if counts[name]}


def stock_folder() -> Path:
    """Where the harness keeps its task files."""
    return Path(find_spec("lm_eval").origin).parent / "tasks"


def _manager(name: str) -> "TaskManager":
    """Of the task's folder alone where that is known."""
    from lm_eval.tasks import TaskManager

    folder = stock_folder() / FOLDERS.get(name, name) if name in PAPER_SHOTS else stock_folder()
    manager = TaskManager(include_defaults=False, include_path=str(folder))
    _refuse_unknown(name, manager.all_tasks, manager.all_tasks)
    return manager


def _local(request: TaskRequest, manager: "TaskManager", folder: Path, scratch: Path) -> tuple[list[str], str, str]:
    """Task files that include the stock ones and name local data, what that data is, and where examples come from."""
    evaluated = _evaluated_file(folder, request.name)
    examples = _find(folder, request.name, EXAMPLES)
    files = {"test": evaluated} | ({"examples": examples} if examples else {})
    entry = manager.task_index[request.name]
    for file in files.values():
        check_rows(file, entry.cfg or {})
    if entry.yaml_path is not None and isinstance(entry.cfg.get("task"), str):
        specs = [_write_task(scratch, request.name, entry.yaml_path, files)]
    else:
        specs = _write_subjects(request, manager, files, scratch)
    data = " ".join(f"{file.name}:{digest_of(file)}" for file in files.values())
    return specs, data, examples.name if examples else f"{evaluated.name}, without the question itself"


def _write_subjects(request: TaskRequest, manager: "TaskManager", files: dict[str, Path], scratch: Path) -> list[str]:
    """One task file for each subject in the data: `mmlu` stands for `mmlu_<subject>`."""
    parts: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for split, file in files.items():
        for subject, lines in _by_subject(file).items():
            parts[subject][split] = lines
    specs = []
    for subject, by_split in sorted(parts.items()):
        name = f"{request.name}_{subject}"
        if name not in manager.task_index or "test" not in by_split:
            raise UsageError(f"{files['test']}: there is no task {name} with questions to evaluate")
        paths = {split: scratch / f"{name}_{split}.jsonl" for split in by_split}
        for split, path in paths.items():
            path.write_text("".join(by_split[split]))
        specs.append(_write_task(scratch, name, manager.task_index[name].yaml_path, paths))
    return specs


def _by_subject(file: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for number, row in enumerate(read_rows(file), start=1):
        if not isinstance(row.get(SUBJECT), str):
            raise UsageError(f"{file} row {number} has no '{SUBJECT}', the task that it belongs to, in text")
        found[row[SUBJECT]].append(json.dumps(row) + "\n")
    return found


def _write_task(scratch: Path, name: str, stock: Path, files: dict[str, Path]) -> str:
    """A task file in JSON, which is YAML."""
    path = scratch / f"{name}.yaml"
    local = {
        "include": str(stock),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(file.resolve()) for split, file in files.items()}},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": "examples" if "examples" in files else "test",
    }
    path.write_text(json.dumps(local))
    return str(path)


def _evaluated_file(folder: Path, name: str) -> Path:
    if file := _find(folder, name, EVALUATED):
        return file
    names = " or ".join(f"{name}{ending}.jsonl[.gz]" for ending in EVALUATED)
    raise UsageError(f"{folder} has no data for task {name}: it needs {names}")


def _find(folder: Path, name: str, endings: Sequence[str]) -> Path | None:
    files = (folder / f"{name}{ending}.jsonl{packed}" for ending in endings for packed in ("", ".gz"))
    return next((file for file in files if file.is_file()), None)


def _line(error: BaseException) -> str:
    said = (str(error).strip().splitlines() or [""])[0]
    return said if said and not isinstance(error, LookupError) else f"{type(error).__name__} {said}".strip()
