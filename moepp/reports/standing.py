"""What the models of a report can do, which it says before anything else: their loss beside that of n-gram models of
the same training tokens on the same held-out windows, and their tasks beside chance.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from moepp.errors import UsageError
from moepp.evaluation.results import TaskResult, load_task_results
from moepp.records import read_json, write_json
from moepp.reports.results import Run, SweepResults
from moepp.statistics.tables import Table
from moepp.statistics.wording import among, several

if TYPE_CHECKING:  # numpy comes with these, and listing experiments does not wait for it
    from moepp.data.token_files import TokenFiles

MOST_TOKENS = 2**27  # that are counted: beyond these the trigrams of a corpus take minutes and gigabytes
DECIDE = (  # which tokens are counted, and on which they are judged
    "data.digest", "data.seq_len", "data.batch_size", "data.order", "data.val_sequences", "data.final_val_sequences",
    "trainer.steps", "seed",
)  # fmt: skip
STANDARD_ERRORS = 2  # over examples, above chance


@dataclass(frozen=True)
class Standing:
    """`losses` are means over seeds by arm. `references` are of the tokens that one run of the baseline has seen; empty
    where their tokens were never counted and are not on this machine, or are too many. `tasks`: whether the runs
    together answer more of them right than chance would.
    """

    losses: Mapping[str, float]
    references: Mapping[str, float]
    tokens: int  # different ones
    tasks: Mapping[str, bool]

    @property
    def mechanics_only(self) -> bool:
        """Whether a model here has not even learnt which token follows which."""
        return bool(self.references) and max(self.losses.values()) > self.references["bigram"]

    def __str__(self) -> str:
        return " ".join([self._loss(), *([self._above_chance()] if self.tasks else [])])

    def _loss(self) -> str:
        best, worst = (choose(self.losses, key=self.losses.__getitem__) for choose in (min, max))
        arms = f"{self.losses[best]:.3f} ({best})"
        arms += f" to {self.losses[worst]:.3f} ({worst})" if worst != best else ""
        said = f"What the models can do: they end at a validation loss of {arms} nats per token"
        if not self.references:
            return f"{said}; no n-gram stands beside it, for their tokens are not on this machine or too many to count."
        references = ", ".join(f"{name} {nats:.3f}" for name, nats in self.references.items())
        below = "; ".join(f"below the {name}: {self._below(nats)}" for name, nats in self.references.items())
        same = f"on the same held-out windows n-grams of the same {self.tokens:,} training tokens have"
        return f"{said}; {same} {references}. Of {several(len(self.losses), 'arm')} {below}."

    def _below(self, nats: float) -> str:
        arms = [arm for arm, loss in self.losses.items() if loss < nats]
        return "none" if not arms else "all" if len(arms) == len(self.losses) else among(arms, self.losses, "arm")

    def _above_chance(self) -> str:
        above = [task for task, found in self.tasks.items() if found]
        return f"Above chance: {', '.join(above) or 'none'} of {several(len(self.tasks), 'task')}."

    def table(self) -> Table:
        rows = [*self.references.items(), *self.losses.items()]
        caption = "Loss of n-gram models and of every arm on held-out text, nats per token."
        return Table("standing", caption, ("model", "validation loss"), tuple(rows))


def standing(results: SweepResults, arms: Sequence[str] = ()) -> Standing:
    """Of these arms, or of all that have finished runs."""
    runs = {arm: by_seed for arm, by_seed in results.runs.items() if not arms or arm in arms}
    losses = {arm: loss for arm in runs if (loss := results.mean(arm, "val_loss")) is not None}
    of_baseline = runs.get(results.baseline) or next(iter(runs.values()))
    references, tokens = references_of(of_baseline[min(of_baseline)])
    return Standing(losses, references, tokens, _tasks(run for by_seed in runs.values() for run in by_seed.values()))


def references_of(run: Run) -> tuple[dict[str, float], int]:
    """Nats per token of n-grams of what the run has seen, on its held-out windows, and how many tokens that were.

    Counted once and kept in the record: it may be read where its tokens are not.
    """
    kept = run.path / "ngrams.json"
    asked = {key: run.config.get(key) for key in DECIDE}
    known = read_json(kept) or {}
    if known.get("asked") != asked:
        counted = _counted(run.config)
        if counted is None:
            return {}, 0
        known = {"asked": asked, **counted}
        with suppress(OSError):
            write_json(kept, known)
    return known["nats"], known["tokens"]


def _counted(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """`nats` by n-gram and `tokens`; None where the tokens are not here, or too many."""
    from moepp.data.windows import evenly_spread, gather_windows, visited, window_count
    from moepp.statistics.ngrams import NAMES, witten_bell

    files = _token_files(config)
    if files is None or "data.batch_size" not in config:
        return None
    length, seed = config["data.seq_len"], config.get("seed", 0)
    sequences = config["trainer.steps"] * config["data.batch_size"]
    windows = window_count(files.header.train.tokens, length)
    seen = min(windows, sequences)
    if seen * length > MOST_TOKENS:
        return None
    last = config.get("data.final_val_sequences")
    sequences_held = config["data.val_sequences"] if last is None else last
    held = evenly_spread(window_count(files.header.val.tokens, length), sequences_held)
    order = visited(windows, sequences, seed, config.get("data.order", "permuted"))
    found = witten_bell(
        gather_windows(files.train, order, length), gather_windows(files.val, held, length), files.header.vocab_size
    )
    return {"nats": {name: found[name] for name in NAMES}, "tokens": seen * length}


def _token_files(config: Mapping[str, object]) -> "TokenFiles | None":
    """Those of a run, where they are on this machine. Nothing is prepared anew for a report."""
    from moepp.data.token_files import TokenFiles

    digest, prepared = config.get("data.digest"), config.get("data.corpus") == "tokens"
    folder = Path(config["data.path"]) if prepared else Path(config.get("data.cache", ""), str(digest))
    with suppress(UsageError):
        files = TokenFiles.open(folder.expanduser())
        return files if files.header.digest == digest else None
    return None


def _tasks(runs: Iterable[Run]) -> dict[str, bool]:
    scores: dict[str, list[TaskResult]] = {}
    for run in runs:
        for task, result in load_task_results(run.path).items():
            if result.accuracy_metric:
                scores.setdefault(task, []).append(result)
    return {task: _above_chance(results) for task, results in scores.items()}


def _above_chance(results: Sequence[TaskResult]) -> bool:
    """Over the examples that all runs answered, each counted once with the mean of the runs."""
    examples = zip(*(result.examples for result in results), strict=False)
    metric = results[0].accuracy_metric
    over = [
        fmean(one.metrics[metric] for one in answers) - (1 / len(answers[0].choices) if answers[0].choices else 0.0)
        for answers in examples
    ]
    return fmean(over) > STANDARD_ERRORS * pstdev(over) / len(over) ** 0.5
