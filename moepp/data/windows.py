"""Which windows of a token file a run learns from, and which it is judged on: by its seed and sizes alone, without
torch.
"""

from dataclasses import dataclass

import numpy as np

ROUNDS = 8  # of the Feistel network; four make a permutation that looks random (Luby and Rackoff 1988)


def window_count(tokens: int, seq_len: int) -> int:
    """Windows of seq_len + 1 tokens, seq_len apart: each token but the first is a target once."""
    return (tokens - 1) // seq_len


def epoch_order(windows: int, seed: int, epoch: int, order: str = "permuted") -> "np.ndarray | KeyedPermutation":
    """The permutation in which an epoch visits all windows, indexed by arrays of positions; `order` as data.order."""
    if order == "keyed":
        return KeyedPermutation(windows, (seed, epoch))
    return np.random.default_rng((seed, epoch)).permutation(windows)


@dataclass(frozen=True)
class KeyedPermutation:
    """A permutation of `size` numbers, computed where it is read: nothing is stored, any position costs the same.

    A Feistel network permutes the numbers of 2b bits, of which there are at most four times `size`; what falls outside
    goes through it again until it falls inside (cycle walking; Black and Rogaway 2002).
    """

    size: int
    key: tuple[int, ...]

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """The numbers at these positions, each in 0 .. size - 1; int64."""
        half_bits = np.uint64(max(1, ((self.size - 1).bit_length() + 1) // 2))
        keys = np.random.SeedSequence(self.key).generate_state(ROUNDS, np.uint64)
        found = _feistel(positions.astype(np.uint64), half_bits, keys)
        while (outside := found >= self.size).any():
            found[outside] = _feistel(found[outside], half_bits, keys)
        return found.astype(np.int64)


def _feistel(numbers: np.ndarray, half_bits: np.uint64, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = numbers >> half_bits, numbers & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return (left << half_bits) | right


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele, Lea and Flood 2014)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def visited(windows: int, sequences: int, seed: int, order: str = "permuted") -> np.ndarray:
    """The distinct windows among the first so many sequences of a run, in rising order."""
    return np.sort(epoch_order(windows, seed, 0, order)[np.arange(min(sequences, windows))])


def evenly_spread(windows: int, wanted: int) -> np.ndarray:
    """So many windows of a split, all of them where `wanted` is 0 or more than there are."""
    count = min(wanted or windows, windows)
    return np.arange(count) * windows // count


def gather_windows(ids: np.ndarray, windows: np.ndarray, seq_len: int) -> np.ndarray:
    """[tokens] and window numbers [B] -> [B, seq_len + 1], int64."""
    return ids[windows[:, None] * seq_len + np.arange(seq_len + 1)].astype(np.int64)
