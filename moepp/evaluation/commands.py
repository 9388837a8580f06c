"""`python run.py evaluate`: one checkpoint, or every finished trial of a sweep, on downstream tasks."""

import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from moepp.errors import UsageError
from moepp.evaluation.results import GOLD, TaskResult, means
from moepp.evaluation.tasks import TaskRequest, parse_tasks, refuse_what_is_missing
from moepp.records import RunRecord, read_json
from moepp.statistics.tables import Table, as_lines, number

BATCH_TOKENS = 4096  # padded, of one batch


def evaluate_checkpoint(source: Path, tasks: str, folder: Path | None, limit: int | None, batch_tokens: int) -> str:
    """The table of a checkpoint's scores; those of a finished run are sent to MLflow too."""
    from moepp.evaluation.score_store import ScoreStore

    results = list(scored(source, tasks, folder, limit, batch_tokens))
    run = ScoreStore.of(source).run
    if run is not None:
        _mirror(run.path)
    return "\n".join(score_lines(results))


def scored(
    source: Path, tasks: str, folder: Path | None, limit: int | None, batch_tokens: int = BATCH_TOKENS
) -> Iterator[TaskResult]:
    """The results of one task after the other. Each is kept before the next begins, and what the same weights have
    answered before is not asked again: in a finished run's record, else in a folder `evaluation` beside the weights.

    Raises UsageError for what cannot be asked for.
    """
    requests = check_request(tasks, folder, limit)
    if batch_tokens < 1:
        raise UsageError(f"--batch-tokens {batch_tokens} must be at least 1")
    from moepp.evaluation.evaluate import about, evaluate_task
    from moepp.evaluation.harness import MoEPlusPlus
    from moepp.evaluation.score_store import ScoreStore
    from moepp.evaluation.tasks import load_task

    store, model = ScoreStore.of(source), None
    for request in requests:
        task = load_task(request, folder, limit)
        result = store.find(about(task, store.checkpoint))
        if result is None:
            store.refuse_no_place()
            model = model or MoEPlusPlus(source, batch_tokens=batch_tokens, progress=_terminal())
            result = evaluate_task(model, task, store.checkpoint)
            store.keep(result)
        yield result


def evaluate_sweep(directory: Path, tasks: str, folder: Path | None, limit: int | None) -> None:
    """Scores every finished trial of a sweep once: results for the same examples and prompts are not computed again."""
    requests = check_request(tasks, folder, limit)
    from moepp.evaluation.trials import score_runs

    records = [RunRecord(directory / trial["path"]) for trial in read_json(directory / "sweep.json")["trials"]]
    runs = [record.path for record in records if record.status == "done"]
    done = score_runs(runs, requests, folder, limit)
    list(tqdm(done, "scoring trials", len(runs), file=_terminal(), disable=_terminal() is None))
    for run in runs[:1]:
        _mirror(run)


def score_lines(results: Sequence[TaskResult]) -> list[str]:
    """A row per task, the means, and what to know about them."""
    columns = ("task", "shots", "n", "accuracy", "±", "acc_norm", "±", "gold bits/byte", "±", "cut")
    rows = []
    for result in results:
        scores = result.scores()
        row = [result.about.task, str(result.about.shots), str(len(result.examples))]
        for name in (result.accuracy_metric, "acc_norm", GOLD):
            score = scores.get(name)
            row += [number(score and score.value), number(score and score.error)]
        rows.append((*row, f"{result.about.cut:.0%}"))
    found = "; ".join(f"{name} {value:.4f}" for name, value in means(results).items())
    return [
        *as_lines(Table("", "", columns, tuple(rows))),
        f"means over {len(results)} tasks: {found}",
        f"±: one standard error; cut: prompts longer than the context of {results[0].about.context} tokens, which keep"
        " their end",
    ]


def check_request(tasks: str, folder: Path | None, limit: int | None) -> list[TaskRequest]:
    """What is asked for. Raises UsageError for what can be seen to be impossible before a model is loaded."""
    if find_spec("lm_eval") is None:
        raise UsageError("evaluation needs lm-evaluation-harness: pip install lm-eval")
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--tasks-dir {folder} is no folder")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} must be at least 1")
    requests = parse_tasks(tasks)
    refuse_what_is_missing(requests, folder)
    return requests


def _terminal() -> TextIO | None:
    return sys.stderr if sys.stderr.isatty() else None


def _mirror(run: Path) -> None:
    """Brings MLflow up to the records of the `runs/<name>` that a run lies in, where it is tracked there."""
    from moepp.config import load
    from moepp.tracking.mirror import FolderMirror, follow
    from moepp.training.settings import RunConfig

    config, folder = load(RunConfig, run / "config.yaml"), run.parent
    if config.tracking.backend == "mlflow":
        with follow(FolderMirror(folder, config.tracking, folder.parent)):
            pass  # the last pass comes at the end of the block; a tracker that is away costs one line
