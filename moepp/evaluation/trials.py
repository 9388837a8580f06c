"""Scores many runs on the same tasks, two and more at a time where no GPU does the work."""

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from pathlib import Path

import torch

from moepp.errors import RunError
from moepp.evaluation.evaluate import about, evaluate_task
from moepp.evaluation.harness import MoEPlusPlus
from moepp.evaluation.score_store import ScoreStore
from moepp.evaluation.tasks import LoadedTask, TaskRequest, load_task
from moepp.process import die_with

Asked = tuple[tuple[TaskRequest, ...], Path | None, int | None]  # tasks, folder of local data, limit


def score_runs(
    runs: Sequence[Path], requests: Sequence[TaskRequest], folder: Path | None, limit: int | None
) -> Iterator[Path]:
    """Every run once it has the scores of all requests; runs that have them come first.

    Each process has a model and its threads to itself: small models leave cores idle that share one. Raises RunError
    when such a process dies; what is scored is kept.
    """
    asked = (tuple(requests), folder, limit)
    left = [run for run in runs if _missing(run, asked)]
    yield from (run for run in runs if run not in left)
    cores = len(os.sched_getaffinity(0))
    processes = 1 if torch.cuda.is_available() else min(cores, len(left))
    if processes < 2:
        yield from (_score(run, asked) for run in left)
        return
    begin = (os.getpid(), cores // processes)
    # `spawn`: a fork would copy the locks of threads that it does not copy.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin, begin)
    try:
        for future in as_completed([pool.submit(_score, run, asked) for run in left]):
            yield future.result()
    except BrokenProcessPool:
        raise RunError("a process that scored trials was ended; the same command scores what is left") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(parent: int, threads: int) -> None:
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run being scored is finished, then the parent stops
    torch.set_num_threads(threads)


def _missing(run: Path, asked: Asked) -> list[LoadedTask]:
    store = ScoreStore.of(run)
    return [task for task in _load(asked) if store.find(about(task, store.checkpoint)) is None]


def _score(run: Path, asked: Asked) -> Path:
    store, missing = ScoreStore.of(run), _missing(run, asked)
    if missing:
        store.refuse_no_place()
    model = MoEPlusPlus(run) if missing else None
    for task in missing:
        store.keep(evaluate_task(model, task, store.checkpoint))
    return run


@lru_cache(maxsize=1)
def _load(asked: Asked) -> list[LoadedTask]:
    requests, folder, limit = asked
    return [load_task(request, folder, limit) for request in requests]
