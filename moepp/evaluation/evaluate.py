"""Runs tasks of lm-evaluation-harness on a model and keeps every example's scores."""

import importlib.metadata
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import replace
from datetime import UTC, datetime
from io import StringIO
from typing import TYPE_CHECKING, Any

from moepp.errors import RunError
from moepp.evaluation.results import About, Example, TaskResult
from moepp.evaluation.tasks import LoadedTask

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from moepp.evaluation.harness import MoEPlusPlus

FEWSHOT_SEED = 1234  # the harness's default
WHOLE_TEXT = "bits_per_byte"  # the harness's score of a whole text: nats and bytes


def about(loaded: LoadedTask, checkpoint: str = "") -> About:
    """What an evaluation would hold, before any model is asked."""
    return About(
        task=loaded.request.name,
        shots=loaded.shots,
        limit=loaded.limit,
        data=loaded.data,
        examples_from=loaded.examples_from,
        lm_eval=importlib.metadata.version("lm_eval"),
        versions={name: str(task.VERSION) for name, task in sorted(loaded.tasks.items())},
        examples=sum(loaded.sizes.values()),
        checkpoint=checkpoint,
    )


def evaluate_task(model: "MoEPlusPlus", loaded: LoadedTask, checkpoint: str = "") -> TaskResult:
    """The same examples and prompts for every model, whichever were scored before. `checkpoint` names the weights."""
    from lm_eval.evaluator import evaluate as run_harness

    for task in loaded.tasks.values():
        _prompts_once(task)
    model.cut = 0
    samples = {name: list(range(size)) for name, size in loaded.sizes.items()} if loaded.limit else None
    # Its progress bars, one for each of MMLU's 57 tasks, go nowhere; the model shows its own. Without standard errors:
    # those of means follow from the examples, the others take minutes of resampling.
    with redirect_stderr(StringIO()):
        found = run_harness(model, {"tasks": loaded.tasks}, samples=samples, bootstrap_iters=0)
    requests = sum(len(task.instances) for task in loaded.tasks.values())
    examples = [
        example
        for name, task in sorted(loaded.tasks.items())
        for example in _examples(model, task, found["samples"][name], "" if name == loaded.request.name else f"{name}/")
    ]
    if not examples:
        raise RunError(f"task {loaded.request.name} has no example to score")
    today = datetime.now(UTC).date().isoformat()
    made = replace(about(loaded, checkpoint), context=model.checkpoint.context, cut=model.cut / requests, date=today)
    return TaskResult(made, tuple(examples))


def _prompts_once(task: "Task") -> None:
    """Lets the harness build a task's prompts for the first model, and use these for all that follow."""
    if getattr(task, "_instances", None) is None:
        task.set_fewshot_seed(FEWSHOT_SEED)
        return
    task.build_all_requests = lambda **_: None
    for instance in task.instances:
        instance.resps, instance.filtered_resps = [], {}


def _examples(model: "MoEPlusPlus", task: "Task", samples: list[dict[str, Any]], prefix: str) -> Iterator[Example]:
    """One per document, in the task's order; a document that several filters saw counts as the first saw it."""
    from lm_eval.api.metrics import mean

    kept = {name for name, aggregate in task.aggregation().items() if aggregate is mean}
    first = samples[0]["filter"] if samples else None
    samples = sorted((s for s in samples if s["filter"] == first), key=lambda sample: sample["doc_id"])
    for sample, (nats, gold, size) in zip(samples, _gold(model, task, samples), strict=True):
        yield Example(
            id=f"{prefix}{sample['doc_id']}",
            gold_nats=nats,
            gold_bytes=size,
            metrics={name: float(sample[name]) for name in sample["metrics"] if name in kept},
            choices=tuple(nats for nats, _ in sample["filtered_resps"]) if gold is not None else (),
            gold=gold,
        )


def _gold(model: "MoEPlusPlus", task: "Task", samples: list[dict[str, Any]]) -> Iterator[tuple[float, int | None, int]]:
    """Of every sample the gold answer's log-likelihood, its index among the choices, and its bytes as scored. A text
    scored as a whole is its own gold answer, and has the bytes that the harness counts.
    """
    if task.OUTPUT_TYPE == "generate_until":
        yield from _generated_gold(model, task, samples)
        return
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        yield from ((nats, None, size) for nats, size in (sample[WHOLE_TEXT] for sample in samples))
        return
    for sample in samples:
        gold = None
        if task.OUTPUT_TYPE == "multiple_choice":
            # With several inputs (WinoGrande) the choice is in the context, and the text names the right one.
            gold = task.doc_to_text(sample["doc"]) if task.multiple_input else _index(task, sample)
        response, arguments = sample["filtered_resps"][gold or 0], sample["arguments"][gold or 0]
        yield response[0], gold, len(arguments[1].encode())


def _index(task: "Task", sample: dict[str, Any]) -> int:
    target = sample["target"][0] if isinstance(sample["target"], list) else sample["target"]
    return target if isinstance(target, int) else task.doc_to_choice(sample["doc"]).index(target)


def _generated_gold(
    model: "MoEPlusPlus", task: "Task", samples: list[dict[str, Any]]
) -> Iterator[tuple[float, int | None, int]]:
    """Where an answer is generated, the first reference answer is scored after the same prompt."""
    from lm_eval.api.instance import Instance

    texts = [_first(sample["target"]) for sample in samples]
    answers = [f"{task.config.target_delimiter}{text}" for text in texts]
    cut = model.cut  # the prompts were counted when they were continued
    scored = model.loglikelihood([
        Instance("loglikelihood", sample["doc"], (sample["arguments"][0][0], answer), 0)
        for sample, answer in zip(samples, answers, strict=True)
    ])  # fmt: skip
    model.cut = cut
    for (nats, _), answer in zip(scored, answers, strict=True):
        yield nats, None, len(answer.encode())


def _first(target: Any) -> str:
    return str(target[0] if isinstance(target, list) else target)
