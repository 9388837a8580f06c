"""Which windows of a token file a run learns from, and which it is judged on: by its seed and sizes alone, without
torch.
"""

import numpy as np


def window_count(tokens: int, seq_len: int) -> int:
    """Windows of seq_len + 1 tokens, seq_len apart: each token but the first is a target once."""
    return (tokens - 1) // seq_len


def epoch_order(windows: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation in which an epoch visits all windows, [windows]."""
    return np.random.default_rng((seed, epoch)).permutation(windows)


def visited(windows: int, sequences: int, seed: int) -> np.ndarray:
    """The distinct windows among the first so many sequences of a run, in rising order."""
    return np.sort(epoch_order(windows, seed, epoch=0)[:sequences])


def evenly_spread(windows: int, wanted: int) -> np.ndarray:
    """So many windows of a split, all of them where `wanted` is 0 or more than there are."""
    count = min(wanted or windows, windows)
    return np.arange(count) * windows // count


def gather(ids: np.ndarray, windows: np.ndarray, seq_len: int) -> np.ndarray:
    """[tokens] and window numbers [B] -> [B, seq_len + 1], int64."""
    return ids[windows[:, None] * seq_len + np.arange(seq_len + 1)].astype(np.int64)
