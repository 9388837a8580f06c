"""What an experiment file declares: a question, the sweep that answers it, and where there are any, the paper's numbers
beside ours.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class PaperRow:
    """One row of the paper's table. `scores` are task accuracies in %, in the order of `Experiment.tasks`.

    `ffn_share` (of all routed slots) follows from the paper's Eq. 8; the time of the expert forward is measured there,
    and `speedup` is that of its vanilla MoE over it.
    """

    scores: tuple[float, ...]
    ffn_share: float
    expert_forward_ms: float | None = None
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
class Trend:
    """A figure of loss and expert time against a number that arms differ in. An arm may be in several series; a
    baseline that is in none is drawn as a level.
    """

    x: str  # what the number is, for the axis
    series: Mapping[str, Mapping[str, float]]  # its name -> arm -> x


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
    paper: Mapping[str, PaperRow] = field(default_factory=dict)  # by arm: the rows set beside ours
    paper_size: str = ""  # the paper's model that `paper` is of, as in conf/size
    paper_sizes: Mapping[str, Mapping[str, PaperRow]] = field(default_factory=dict)  # where it has rows of several
    contrasts: Mapping[str, Contrast] = field(default_factory=dict)
    trend: Trend | None = None
    notes: tuple[str, ...] = ()  # what the paper leaves open and what was chosen here

    def at_size(self, size: str) -> "Experiment":
        """The paper's rows of that size beside ours; as it stands where the paper has none."""
        if size not in self.paper_sizes:
            return self
        return replace(self, paper=self.paper_sizes[size], paper_size=size)

    def average_without_noisy_task(self, row: PaperRow) -> float:
        """The paper's scores averaged over the other tasks, to two digits (which keeps exact ties exact)."""
        scores = [s for task, s in zip(self.tasks, row.scores, strict=True) if task != self.noisy_task]
        return round(statistics.fmean(scores), 2)

    def paper_effect(self, contrast: str) -> float | None:
        """The contrast in the paper's averages, in percentage points; None where the paper lacks one of its arms."""
        sides = self.contrasts[contrast].on, self.contrasts[contrast].off
        if not all(arm in self.paper for side in sides for arm in side):
            return None
        on, off = (statistics.fmean(self.paper[arm].average for arm in side) for side in sides)
        return on - off
