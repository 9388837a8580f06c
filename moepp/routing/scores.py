"""The two highest routing scores of every token (Fig. 6) as histograms and moments, added up batch by batch.

Shape suffixes: L MoE layers, T tokens; 2 is the rank of the score, the highest first.
"""

from dataclasses import dataclass

import numpy as np

BINS = 1000  # over [0, 1]: about the width of the paper's
MODE_BINS = 200  # a mode is the middle of the fullest of these: in narrower ones chance decides between neighbours


@dataclass
class RoutingScores:
    """Scores lie in [0, 1], as a softmax's do. The moments are exact; only the histogram and quantiles are binned."""

    counts_L2B: np.ndarray
    sum_L2: np.ndarray
    squares_L2: np.ndarray
    low_L2: np.ndarray
    high_L2: np.ndarray

    @classmethod
    def empty(cls, layers: int) -> "RoutingScores":
        shape = (layers, 2)
        counts = np.zeros((*shape, BINS), dtype=np.int64)
        return cls(counts, np.zeros(shape), np.zeros(shape), np.full(shape, np.inf), np.full(shape, -np.inf))

    def add(self, scores_LT2: np.ndarray) -> None:
        layers = len(scores_LT2)
        bins = np.clip((scores_LT2 * BINS).astype(int), 0, BINS - 1)
        cells = (np.arange(layers)[:, None, None] * 2 + np.arange(2)) * BINS + bins
        self.counts_L2B += np.bincount(cells.ravel(), minlength=layers * 2 * BINS).reshape(layers, 2, BINS)
        self.sum_L2 += scores_LT2.sum(1)
        self.squares_L2 += (scores_LT2**2).sum(1)
        self.low_L2 = np.minimum(self.low_L2, scores_LT2.min(1))
        self.high_L2 = np.maximum(self.high_L2, scores_LT2.max(1))

    @property
    def tokens(self) -> int:
        return int(self.counts_L2B[0, 0].sum())

    def pooled(self) -> "RoutingScores":
        """All layers as one, as the paper's histogram shows them."""
        return RoutingScores(
            self.counts_L2B.sum(0, keepdims=True),
            self.sum_L2.sum(0, keepdims=True),
            self.squares_L2.sum(0, keepdims=True),
            self.low_L2.min(0, keepdims=True),
            self.high_L2.max(0, keepdims=True),
        )

    def statistics(self) -> dict[str, np.ndarray]:
        """Mean, variance, range and mode of each layer's two scores, [L, 2]. `range` is highest minus lowest, which
        grows with the number of tokens; `range98` is between the percentiles 1 and 99, which does not.
        """
        count_L2 = self.counts_L2B.sum(-1)
        mean_L2 = self.sum_L2 / count_L2
        return {
            "mean": mean_L2,
            "variance": np.maximum(self.squares_L2 / count_L2 - mean_L2**2, 0),
            "range": self.high_L2 - self.low_L2,
            "range98": self._quantile(0.99) - self._quantile(0.01),
            "mode": (self.coarse().argmax(-1) + 0.5) / MODE_BINS,
        }

    def coarse(self) -> np.ndarray:
        """Counts in MODE_BINS bins, [L, 2, MODE_BINS]."""
        return self.counts_L2B.reshape(*self.counts_L2B.shape[:2], MODE_BINS, -1).sum(-1)

    def _quantile(self, share: float) -> np.ndarray:
        cumulative = self.counts_L2B.cumsum(-1)
        return (cumulative >= share * cumulative[..., -1:]).argmax(-1) / BINS
