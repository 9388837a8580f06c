"""A straight line through a handful of points, with what is known of its two numbers."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """y = intercept + slope * x by least squares; half widths of 95 % t-intervals with n - 2 degrees of freedom."""

    intercept: float
    slope: float
    intercept_half_width: float
    slope_half_width: float
    residual_std: float
    n: int

    def at(self, x: float) -> float:
        return self.intercept + self.slope * x


def fit_line(x: Sequence[float], y: Sequence[float], level: float = 0.95) -> Line:
    """Raises ValueError with fewer than three points, or where all x are the same."""
    n = len(x)
    if n < 3 or len(set(x)) < 2:
        raise ValueError(f"a line needs three points at two different x, not {list(x)}")
    from scipy.special import stdtrit

    slope, intercept = statistics.linear_regression(x, y)
    residuals = [b - intercept - slope * a for a, b in zip(x, y, strict=True)]
    std = math.sqrt(sum(r * r for r in residuals) / (n - 2))
    mean = statistics.fmean(x)
    spread = sum((a - mean) ** 2 for a in x)
    t = float(stdtrit(n - 2, (1 + level) / 2))
    return Line(intercept, slope, t * std * math.sqrt(1 / n + mean**2 / spread), t * std / math.sqrt(spread), std, n)
