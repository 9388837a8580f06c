"""FFN experts per token by a label of the token: its string, its part of speech, word or fragment (Fig. 5).

Intervals are over texts, since the tokens of a text are not independent.
Shape suffixes: T tokens, X texts, G labels, D draws.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import rankdata

from moepp.statistics.hypotheses import Effect
from moepp.statistics.resampling import DRAWS, Interval, bootstrap_sums, correlation_of_moments, moments

LABELS_AT_A_TIME = 256
FREQUENCY_CLASSES = 10


@dataclass(frozen=True)
class TokenUse:
    """`ffn_T` FFN experts of each token, mean over layers; `nats_T` its loss, given what stands before it; `text_T` the
    text it is in; the label arrays hold strings, "" where there is none.
    """

    text_T: np.ndarray
    ffn_T: np.ndarray
    nats_T: np.ndarray
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

    return _over_texts(statistic, columns_X4)


def frequency_class(string_T: np.ndarray, classes: int = FREQUENCY_CLASSES) -> np.ndarray:
    """Tokens by how frequent their string is in these texts, in classes of about equally many tokens, rarest first;
    tokens of one string are in one class.
    """
    code_T, count_S = np.unique(string_T, return_inverse=True, return_counts=True)[1:]
    rank_T = rankdata(count_S[code_T], method="min") - 1
    return (classes * rank_T / len(rank_T)).astype(int)


def at_equal_frequency(use: TokenUse) -> TokenUse:
    """The same with each token's FFN experts relative to the mean of its frequency class, so that no difference between
    labels can be one of how frequent their tokens are.
    """
    return replace(use, ffn_T=_within(use.ffn_T, frequency_class(use.string_T)))


def loss_correlation(use: TokenUse, within_string: bool = False) -> Effect:
    """Spearman's rho over tokens between loss and FFN experts, over texts. `within_string` compares each token with
    others of its string alone: how frequent or how hard a string is can then make nothing.
    """
    ranks = [rankdata(values) for values in (use.nats_T, use.ffn_T)]
    if within_string:
        ranks = [_within(rank, np.unique(use.string_T, return_inverse=True)[1]) for rank in ranks]
    text_T, moments_TM = np.unique(use.text_T, return_inverse=True)[1], moments(*ranks)
    sums_XM = np.stack([np.bincount(text_T, weights=column) for column in moments_TM.T], axis=1)
    return _over_texts(correlation_of_moments, sums_XM)


def _over_texts(statistic: Callable[[np.ndarray], np.ndarray], sums_XM: np.ndarray) -> Effect:
    """A single text has no scatter: nothing is known of other texts."""
    drawn_DM = bootstrap_sums(sums_XM) if len(sums_XM) > 1 else np.full_like(sums_XM, np.nan)
    return Effect.of(float(statistic(sums_XM.sum(0))), statistic(drawn_DM))


def _within(value_T: np.ndarray, code_T: np.ndarray) -> np.ndarray:
    """Values minus the mean of all that share their code."""
    sums, counts = np.bincount(code_T, weights=value_T), np.bincount(code_T)
    return value_T - (sums / np.maximum(counts, 1))[code_T]
