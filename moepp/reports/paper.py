"""The paper's scores of the arms of a sweep, to stand beside ours."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace

from moepp.statistics.tables import Table, number
from moepp.sweeps.spec import Contrast


@dataclass(frozen=True)
class PaperRow:
    """One row of the paper's table. `scores` are task accuracies in %, in the order of `PaperScores.tasks`.

    `ffn_share` (of all routed slots) follows from the paper's Eq. 8; the time of the expert forward is measured there.
    """

    scores: tuple[float, ...]
    ffn_share: float
    expert_forward_ms: float | None = None

    @property
    def average(self) -> float:
        """The average as the paper prints it, which makes ties of rows it does not tell apart."""
        return round(statistics.fmean(self.scores), 1)


@dataclass(frozen=True)
class PaperScores:
    """Rows by size and arm, vanilla MoE first. Those of `size` stand beside ours."""

    tasks: tuple[str, ...]
    noisy_task: str  # the one task whose scores are near chance and carry much of the paper's average
    sizes: Mapping[str, Mapping[str, PaperRow]]  # size as in conf/size -> arm -> row
    size: str

    @property
    def rows(self) -> Mapping[str, PaperRow]:
        return self.sizes[self.size]

    def at_size(self, size: str) -> "PaperScores":
        """The rows of that size beside ours; as it stands where the paper has none."""
        return replace(self, size=size) if size in self.sizes else self

    def speedup(self, arm: str) -> float | None:
        """The expert forward of vanilla MoE over that of the arm; None where one of them was not timed."""
        (vanilla, base), row = next(iter(self.rows.items())), self.rows.get(arm)
        if arm == vanilla or row is None or not row.expert_forward_ms or not base.expert_forward_ms:
            return None
        return base.expert_forward_ms / row.expert_forward_ms

    def average_without_noisy_task(self, row: PaperRow) -> float:
        """The scores averaged over the other tasks, to two digits (which keeps exact ties exact)."""
        scores = [s for task, s in zip(self.tasks, row.scores, strict=True) if task != self.noisy_task]
        return round(statistics.fmean(scores), 2)

    def effect(self, contrast: Contrast) -> float | None:
        """The contrast in the averages, in percentage points; None where the paper lacks one of its arms."""
        if not all(arm in self.rows for arm in (*contrast.arms, *contrast.minus)):
            return None
        on, off = (statistics.fmean(self.rows[arm].average for arm in side) for side in (contrast.arms, contrast.minus))
        return on - off

    def table(self) -> Table:
        columns = ("size", "arm", *self.tasks, "average", f"without {self.noisy_task}", "FFN share",
                   "expert forward, ms", "speed-up")  # fmt: skip
        sizes = [self.at_size(size) for size in self.sizes]
        rows = tuple(of_size._cells(arm, row) for of_size in sizes for arm, row in of_size.rows.items())
        caption = "Scores in %, as printed; averages are over these tasks. FFN shares follow from the paper's Eq. 8."
        return Table("", caption, columns, rows)

    def _cells(self, arm: str, row: PaperRow) -> tuple[str, ...]:
        means = [f"{row.average:.1f}", f"{self.average_without_noisy_task(row):.2f}", f"{row.ffn_share:.3f}"]
        times = [number(row.expert_forward_ms, ".1f"), number(self.speedup(arm), ".2f")]
        return (self.size.upper(), arm, *(f"{score:.1f}" for score in row.scores), *means, *times)
