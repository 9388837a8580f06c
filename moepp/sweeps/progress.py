"""One progress bar over the optimizer steps of all trials of a sweep, read from their records."""

import sys
from collections.abc import Sequence
from contextlib import suppress

from tqdm import tqdm

from moepp.records import MetricsTail, RunRecord, UnreadableRecord

SHOWN = {"loss": ("train/loss", ".3f"), "tokens/s": ("perf/tokens_per_s", ",.0f")}
FORM = "{desc}{percentage:.0f}% |{bar}| {remaining} left{postfix}"  # of all steps; 80 columns leave no room for more


class TrialProgress:
    """The steps a trial has finished, and its newest loss and throughput."""

    def __init__(self, record: RunRecord, steps: int):
        self.record, self.steps = record, steps
        self.step = steps if record.status in ("done", "pruned") else 0
        self.newest: dict[str, str] = {}
        self._tail = MetricsTail(record)
        self.read()

    def read(self) -> None:
        if self.step == self.steps:
            return
        lines = []
        with suppress(UnreadableRecord):  # its trial says so
            lines = self._tail.read()
        for line in lines:
            self.step = min(int(line["step"]), self.steps)
            shown = {name: (line.get(key), form) for name, (key, form) in SHOWN.items()}
            self.newest |= {name: format(value, form) for name, (value, form) in shown.items() if value is not None}


def step_bar(total: int, done: int, enabled: bool = True) -> tqdm:
    """Steps `done` before count as done and not towards the rate, so the time left is honest."""
    return tqdm(
        total=total,
        initial=done,
        bar_format=FORM,
        dynamic_ncols=True,
        smoothing=0,
        disable=not enabled,
        mininterval=0.5 if sys.stderr.isatty() else 60,  # in a log file a line a minute
    )


class SweepProgress:
    """The bar of a worker."""

    def __init__(self, enabled: bool):
        self._trials: list[TrialProgress] = []
        self._finished_before = 0
        self._bar = step_bar(0, 0, enabled)

    def add(self, trials: Sequence[TrialProgress]) -> None:
        first = not self._trials
        self._trials += trials
        self._bar.total += sum(trial.steps for trial in trials)
        finished = sum(trial.step for trial in trials)
        self._bar.n += finished
        self._bar.initial = self._finished_before = self._finished_before + finished
        if first:
            self._bar.refresh()

    def describe(self, text: str) -> None:
        self._bar.set_description(text, refresh=False)

    def show(self, running: Sequence[TrialProgress]) -> None:
        for trial in running:
            trial.read()
            self._bar.set_postfix(trial.newest, refresh=False)
        self._bar.update(sum(trial.step for trial in self._trials) - self._bar.n)

    def close(self) -> None:
        self._bar.close()
