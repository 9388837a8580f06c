"""`python run.py evaluate`: one checkpoint, or every finished trial of a sweep, on downstream tasks."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from moepp.analysis.tables import aligned, number
from moepp.errors import UsageError
from moepp.evaluation.results import (
    FOLDER,
    GOLD,
    TaskResult,
    final_metrics,
    load_task_results,
    means,
    write_task_result,
)
from moepp.evaluation.tasks import TaskRequest, parse_tasks
from moepp.records import RunRecord, read_json

BATCH_TOKENS = 4096  # padded, of one batch


def evaluate_checkpoint(source: Path, tasks: str, folder: Path | None, limit: int | None, batch_tokens: int) -> str:
    """Scores a checkpoint, keeps the scores and returns the table of them.

    The scores of a finished run go into its record and to MLflow; those of any other checkpoint go into a folder
    `evaluation` beside it.
    """
    run = _run_of(source)
    results = []
    for result in scored(source, tasks, folder, limit, batch_tokens):
        results.append(result)
        _keep(run, source, result)
    if run is not None:
        _mirror(run.path.parent)
    return "\n".join(describe(results))


def scored(
    source: Path, tasks: str, folder: Path | None, limit: int | None, batch_tokens: int = BATCH_TOKENS
) -> Iterator[TaskResult]:
    """The results of one task after the other, kept nowhere. Raises UsageError for what cannot be asked for."""
    requests = check_request(tasks, folder, limit)
    if batch_tokens < 1:
        raise UsageError(f"--batch-tokens {batch_tokens} must be at least 1")
    from moepp.evaluation.evaluate import evaluate
    from moepp.evaluation.harness import MoEPlusPlus

    model = MoEPlusPlus(source, batch_tokens=batch_tokens, progress=_terminal())
    yield from evaluate(model, requests, folder, limit)


def evaluate_sweep(directory: Path, tasks: str, folder: Path | None, limit: int | None) -> None:
    """Scores every finished trial of a sweep once: results for the same examples and prompts are not computed again."""
    requests = check_request(tasks, folder, limit)
    from moepp.evaluation.evaluate import about, evaluate_task
    from moepp.evaluation.harness import MoEPlusPlus
    from moepp.evaluation.tasks import load_task

    records = [RunRecord(directory / trial["path"]) for trial in read_json(directory / "sweep.json")["trials"]]
    runs = [record for record in records if record.status == "done"]
    with ExitStack() as stack:
        loaded = [stack.enter_context(load_task(request, folder)) for request in requests]
        for run in tqdm(runs, desc="scoring trials", file=_terminal(), disable=_terminal() is None):
            stored = {result.about.identity for result in load_task_results(run.path).values()}
            left = [task for task in loaded if about(task, limit).identity not in stored]
            model = MoEPlusPlus(run.path) if left else None
            for task in left:
                _keep(run, run.path, evaluate_task(model, task, limit))
    _mirror(directory)


def describe(results: Sequence[TaskResult]) -> list[str]:
    """A row per task, the means, and what to know about them."""
    rows = [["task", "shots", "n", "accuracy", "±", "acc_norm", "±", "gold bits/byte", "±", "cut"]]
    for result in results:
        scores = result.scores()
        row = [result.about.task, str(result.about.shots), str(len(result.examples))]
        for name in (result.accuracy_metric, "acc_norm", GOLD):
            score = scores.get(name)
            row += [number(score and score.value), number(score and score.error)]
        rows.append([*row, f"{result.about.cut:.0%}"])
    found = "; ".join(f"{name} {value:.4f}" for name, value in means(results).items())
    return [
        *aligned(rows),
        f"means over {len(results)} tasks: {found}",
        f"±: one standard error; cut: prompts longer than the context of {results[0].about.context} tokens, which keep"
        " their end",
    ]


def check_request(tasks: str, folder: Path | None, limit: int | None) -> list[TaskRequest]:
    """What is asked for. Raises UsageError for what can be seen to be impossible before a model is loaded."""
    if find_spec("lm_eval") is None:
        raise UsageError("evaluation needs lm-evaluation-harness: pip install 'moepp[eval]'")
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--tasks-dir {folder} is no folder")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} must be at least 1")
    return parse_tasks(tasks)


def _terminal() -> TextIO | None:
    return sys.stderr if sys.stderr.isatty() else None


def _run_of(source: Path) -> RunRecord | None:
    """The finished run whose final weights these are."""
    from moepp.training.run import FINAL_WEIGHTS

    path = source.parents[1] if source.name == FINAL_WEIGHTS else source
    return RunRecord(path) if RunRecord(path).status == "done" else None


def _keep(run: RunRecord | None, source: Path, result: TaskResult) -> None:
    from moepp.training.tracking import mirror_again

    if run is None:
        write_task_result((source.parent if source.is_file() else source) / FOLDER, result)
        return
    with run.lock():
        write_task_result(run.path / FOLDER, result)
        run.replace_final(final_metrics(result))
        mirror_again(run)


def _mirror(directory: Path) -> None:
    """Brings MLflow up to the records of `runs/<name>`, where they are tracked there."""
    from moepp.config import load
    from moepp.training.settings import RunConfig
    from moepp.training.tracking import FolderMirror, follow

    config = load(RunConfig, next(directory.glob("*/config.yaml")))
    if config.tracking.backend == "mlflow":
        with follow(FolderMirror(directory, config.tracking, directory.parent)):
            pass  # the last pass comes at the end of the block; a tracker that is away costs one line
