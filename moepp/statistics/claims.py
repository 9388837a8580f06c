"""Statements, and what the numbers make of them."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["holds", "fails", "undecided"]


@dataclass(frozen=True)
class Claim:
    """A statement and what the numbers make of it. `effect` with its interval is in `unit`; None where the statement is
    no estimate. `p` is corrected within its family, where there is one.
    """

    statement: str
    verdict: Verdict
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    p: float | None = None
    paper: str = ""  # what the paper reports for it
    note: str = ""  # how it was decided, or what stands against it

    def __str__(self) -> str:
        said = self.statement
        if self.effect is not None:
            interval = "" if self.low is None else f" [{self.low:.4g}, {self.high:.4g}]"
            corrected = "" if self.p is None else f", p {self.p:.3f}" if self.p >= 0.001 else ", p <0.001"
            said += f": {self.effect:.4g}{interval}{f' {self.unit}' if self.unit else ''}{corrected}"
        said += f". Paper: {self.paper}" if self.paper else ""
        return f"{said}. {self.note}" if self.note else f"{said}."


def judge(low: float | None, high: float | None, above: float | None = None, below: float | None = None) -> Verdict:
    """`holds` where the whole interval lies above (below) the bound, `fails` where all of it lies on the other side.

    Give one of the two bounds. Without an interval nothing is decided.
    """
    if (above is None) == (below is None):
        raise ValueError("give either above or below")
    if low is None or high is None:
        return "undecided"
    if above is not None:
        return "holds" if low > above else "fails" if high < above else "undecided"
    return "holds" if high < below else "fails" if low > below else "undecided"
