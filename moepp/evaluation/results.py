"""What an evaluation leaves beside a run: one file per task with every example's scores. Needs neither torch nor the
harness.

    evaluation/<task>.jsonl   first line: what was evaluated and how (`About`); then one line per example (`Example`)

Scores of a run's other checkpoints lie in `checkpoints/evaluation/<stem of the file>/`.
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from moepp.errors import RunError
from moepp.records import write_text

FOLDER = "evaluation"
GOLD = "gold_bits_per_byte"
ACCURACIES = ("acc", "exact_match")  # what the paper may have printed; a task has one of them
NOISY_TASK = "boolq"  # near chance for small models, and in the paper some rows lie far below it


@dataclass(frozen=True)
class About:
    """What a file of scores holds. Two evaluations with equal `asked` put the same questions in the same words."""

    task: str
    shots: int
    limit: int | None  # examples at most; None: all
    data: str  # "hub:<dataset>", or digests of local files
    examples_from: str  # where few-shot examples come from; "" without any
    lm_eval: str  # version of the harness
    versions: Mapping[str, str]  # of the harness's task definitions, by subtask
    context: int = 0  # tokens
    cut: float = 0.0  # share of the requests whose context was cut from the left
    date: str = ""
    examples: int = 0
    checkpoint: str = ""  # name and digest of the weights, and of what says how they are fed

    @property
    def asked(self) -> dict[str, object]:
        """What was asked, whoever answered."""
        names = ("task", "shots", "examples", "data", "examples_from", "lm_eval")
        return {name: getattr(self, name) for name in names} | {"versions": dict(self.versions)}


@dataclass(frozen=True)
class Example:
    """`gold_nats` and `gold_bytes` are of the gold answer as it is scored, with the space before it.

    `choices` holds the log-likelihood of every choice in nats, empty where there is no choice; `metrics` the harness's
    values.
    """

    id: str  # <number> in the task, or <subtask>/<number>
    gold_nats: float
    gold_bytes: int
    metrics: Mapping[str, float]
    choices: tuple[float, ...] = ()
    gold: int | None = None  # index of the right choice


@dataclass(frozen=True)
class Score:
    """The mean over examples and its standard error; None with one example."""

    value: float
    error: float | None


@dataclass(frozen=True)
class TaskResult:
    about: About
    examples: tuple[Example, ...]

    @property
    def accuracy_metric(self) -> str:
        """The metric the paper reports: acc, or exact_match where an answer is generated; "" of whole texts, whose only
        score is bits per byte.
        """
        names = self.examples[0].metrics
        return next((name for name in ACCURACIES if name in names), min(names, default=""))

    def scores(self) -> dict[str, Score]:
        """Every metric of the harness that is a mean over examples, and `gold_bits_per_byte`."""
        names = self.examples[0].metrics
        means = {name: mean_score([example.metrics[name] for example in self.examples]) for name in names}
        return means | {GOLD: gold_bits_per_byte(self.examples)}


def mean_score(values: Sequence[float]) -> Score:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Score(statistics.fmean(values), error)


def gold_bits_per_byte(examples: Sequence[Example]) -> Score:
    """Bits over bytes of all gold answers, as validation counts them, with the standard error of that ratio (linear
    in the examples' residuals).
    """
    size, n = sum(example.gold_bytes for example in examples), len(examples)
    ratio = -sum(example.gold_nats for example in examples) / size
    squares = math.fsum((-example.gold_nats - ratio * example.gold_bytes) ** 2 for example in examples)
    error = math.sqrt(squares * n / (n - 1)) / size if n > 1 else None
    return Score(ratio / math.log(2), error and error / math.log(2))


def final_metrics(result: TaskResult) -> dict[str, float]:
    """What run records and MLflow keep: `final/<task>_acc`, `final/<task>_acc_stderr`, ..., `final/<task>_examples`."""
    found: dict[str, float] = {f"final/{result.about.task}_examples": len(result.examples)}
    for name, score in result.scores().items():
        found[f"final/{result.about.task}_{name}"] = score.value
        if score.error is not None:
            found[f"final/{result.about.task}_{name}_stderr"] = score.error
    return found


def write_task_result(folder: Path, result: TaskResult) -> Path:
    """Replaces the task's file in one step. Raises RunError when it cannot be written."""
    path = folder / f"{result.about.task}.jsonl"
    lines = [asdict(result.about), *(asdict(example) for example in result.examples)]
    try:
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def find_task_result(folder: Path, wanted: About) -> TaskResult | None:
    """The stored answers of the wanted checkpoint to what is asked; None where there are none, or none to read."""
    try:
        found = read_task_result(folder / f"{wanted.task}.jsonl")
    except RunError:
        return None
    same = (found.about.asked, found.about.checkpoint) == (wanted.asked, wanted.checkpoint)
    return found if same else None


def read_task_result(path: Path) -> TaskResult:
    """Raises RunError for a file that is no such result."""
    try:
        about, *examples = (json.loads(line) for line in path.read_text("utf-8").splitlines())
        found = tuple(Example(**{**line, "choices": tuple(line["choices"])}) for line in examples)
        if not found:
            raise ValueError("it holds no example")
        return TaskResult(About(**about), found)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(f"{path} is no result of `run.py evaluate` ({error}); evaluate again") from None


def load_task_results(run: Path | str) -> dict[str, TaskResult]:
    """Every task's stored scores of a run directory, by task; empty where nothing was evaluated."""
    return {path.stem: read_task_result(path) for path in sorted(Path(run).glob(f"{FOLDER}/*.jsonl"))}


def means(results: Iterable[TaskResult]) -> dict[str, float]:
    """Unweighted means over tasks, with and without BoolQ: of the paper's accuracy and of bits per byte."""
    found, results = {}, list(results)
    others = [result for result in results if result.about.task != NOISY_TASK]
    for suffix, kept in (("", results), (" without BoolQ", others if len(others) < len(results) else [])):
        if accuracies := [r.scores()[r.accuracy_metric].value for r in kept if r.accuracy_metric]:
            found[f"accuracy{suffix}"] = statistics.fmean(accuracies)
        if kept:
            found[f"bits per byte{suffix}"] = statistics.fmean(r.scores()[GOLD].value for r in kept)
    return found
