"""What an experiment file declares: a question, the sweep that answers it, and where there are any, the paper's numbers
beside ours.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PaperRow:
    """One row of the paper's table. `scores` are task accuracies in %, in the order of `Experiment.tasks`.

    `ffn_share` (of all routed slots) follows from the paper's Eq. 8; `speedup` of the expert forward is measured there.
    """

    scores: tuple[float, ...]
    ffn_share: float
    speedup: float | None = None

    @property
    def average(self) -> float:
        """The average as the paper prints it, which makes ties of rows it does not tell apart."""
        return round(statistics.fmean(self.scores), 1)


@dataclass(frozen=True)
class Contrast:
    """An effect: the mean over the arms `on` minus the mean over the arms `off`, within each seed."""

    on: tuple[str, ...]
    off: tuple[str, ...]


@dataclass(frozen=True)
class Experiment:
    """One table or figure of the paper, or a question of our own. Where there are no numbers of the paper, `paper`,
    `tasks` and `noisy_task` stay empty. `arms` are arms of the sweep in display order; the sweep says which is the
    baseline.
    """

    name: str
    title: str
    question: str
    sweep: str
    arms: tuple[str, ...]
    reference: str = ""  # where in the paper
    tasks: tuple[str, ...] = ()  # columns of PaperRow.scores
    noisy_task: str = ""  # the one task whose scores are near chance and carry much of the paper's average
    paper: Mapping[str, PaperRow] = field(default_factory=dict)  # of every arm, or of none
    contrasts: Mapping[str, Contrast] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what the paper leaves open and what was chosen here

    def average_without_noisy_task(self, arm: str) -> float:
        """The paper's scores averaged over the other tasks, to two digits (which keeps exact ties exact)."""
        scores = [s for task, s in zip(self.tasks, self.paper[arm].scores, strict=True) if task != self.noisy_task]
        return round(statistics.fmean(scores), 2)

    def paper_effect(self, contrast: str) -> float:
        """The contrast in the paper's averages, in percentage points."""
        on, off = (
            statistics.fmean(self.paper[arm].average for arm in side)
            for side in (self.contrasts[contrast].on, self.contrasts[contrast].off)
        )
        return on - off
