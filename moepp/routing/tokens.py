"""FFN experts per token by a label of the token: its string, its part of speech, word or fragment (Fig. 5).

Intervals are over texts, since the tokens of a text are not independent.
Shape suffixes: T tokens, X texts, G labels, D draws.
"""

from dataclasses import dataclass, replace

import numpy as np

from moepp.statistics.hypotheses import Effect
from moepp.statistics.resampling import DRAWS, Interval, bootstrap_sums

LABELS_AT_A_TIME = 256


@dataclass(frozen=True)
class TokenUse:
    """`ffn_T` FFN experts of each token, mean over layers; `text_T` the text it is in; the label arrays hold strings,
    "" where there is none.
    """

    text_T: np.ndarray
    ffn_T: np.ndarray
    string_T: np.ndarray
    tag_T: np.ndarray
    part_T: np.ndarray

    def select(self, keep_T: np.ndarray) -> "TokenUse":
        return replace(self, **{name: values[keep_T] for name, values in vars(self).items()})


@dataclass(frozen=True)
class LabelUse:
    """`texts` are those that hold the label; with fewer than two there is no interval, and both ends are NaN."""

    label: str
    tokens: int
    texts: int
    ffn: Interval


def by_label(use: TokenUse, label_T: np.ndarray, draws: int = DRAWS) -> list[LabelUse]:
    """FFN experts per token of every label but "", most first."""
    text_T = np.unique(use.text_T, return_inverse=True)[1]
    names, code_T = np.unique(label_T, return_inverse=True)
    found = []
    for start in range(0, len(names), LABELS_AT_A_TIME):
        chosen_T = (code_T >= start) & (code_T < start + LABELS_AT_A_TIME)
        shown = names[start : start + LABELS_AT_A_TIME]
        ffn_XG, count_XG = _sums(text_T[chosen_T], code_T[chosen_T] - start, use.ffn_T[chosen_T], text_T, len(shown))
        drawn = bootstrap_sums(np.concatenate([ffn_XG, count_XG], axis=1), draws)
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio_DG = drawn[:, : len(shown)] / drawn[:, len(shown) :]
        low_G, high_G = np.nanquantile(ratio_DG, (0.025, 0.975), axis=0)
        for g, label in enumerate(shown):
            if label:
                tokens, texts = int(count_XG[:, g].sum()), int((count_XG[:, g] > 0).sum())
                low, high = (float(low_G[g]), float(high_G[g])) if texts > 1 else (float("nan"),) * 2
                value = float(ffn_XG[:, g].sum() / tokens)
                found.append(LabelUse(str(label), tokens, texts, Interval(value, low, high)))
    return sorted(found, key=lambda label: -label.ffn.value)


def _sums(text_T: np.ndarray, code_T: np.ndarray, ffn_T: np.ndarray, every_T: np.ndarray, labels: int) -> np.ndarray:
    """FFN experts and tokens by text and label, [2, X, G], of all texts."""
    texts = every_T.max() + 1
    cell_T = text_T * labels + code_T
    sums = [np.bincount(cell_T, weights=weights, minlength=texts * labels) for weights in (ffn_T, None)]
    return np.stack(sums).reshape(2, texts, labels)


def difference(use: TokenUse, one_T: np.ndarray, other_T: np.ndarray) -> Effect:
    """FFN experts per token where `one_T` minus where `other_T` holds (masks), over texts."""
    text_T = np.unique(use.text_T, return_inverse=True)[1]
    sums = [_sums(text_T[mask], np.zeros(mask.sum(), int), use.ffn_T[mask], text_T, 1) for mask in (one_T, other_T)]
    columns_X4 = np.concatenate([side for pair in sums for side in pair], axis=1)

    def statistic(sums: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return sums[..., 0] / sums[..., 1] - sums[..., 2] / sums[..., 3]

    return Effect.of(float(statistic(columns_X4.sum(0))), statistic(bootstrap_sums(columns_X4)))
