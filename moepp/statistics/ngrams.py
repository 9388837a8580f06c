"""N-gram language models by interpolated Witten-Bell smoothing: what a loss is worth.

    P(w | h) = (c(h w) + T(h) P(w | h')) / (c(h) + T(h))

c counts the training tokens, T(h) is how many different tokens follow the context h there, and h' is h without its
oldest token; below the unigram all tokens are equally likely (Witten and Bell 1991; Chen and Goodman 1998, Eq. 14).

Shape suffixes: W windows, S targets of a window, G different n-grams.
"""

import numpy as np

NAMES = ("unigram", "bigram", "trigram")


def witten_bell(train_WS: np.ndarray, held_WS: np.ndarray, vocab_size: int) -> dict[str, float]:
    """Nats per target of the held-out windows, by name. Windows are [W, S + 1] ids, counted and judged apart: the first
    target has one token of context, as for a language model.

    Raises ValueError for a vocabulary whose trigrams do not fit into 63 bits.
    """
    if vocab_size ** len(NAMES) >= 2**63:
        raise ValueError(f"trigrams of {vocab_size:,} ids do not fit into 63 bits")
    chance_WS = np.full((len(held_WS), held_WS.shape[1] - 1), 1 / vocab_size)
    nats = {}
    for order, name in enumerate(NAMES, start=1):
        known_WS = chance_WS[:, max(0, order - 2) :]  # targets before these have too short a context
        known_WS[:] = _interpolated(
            _grams(train_WS, order, vocab_size), _grams(held_WS, order, vocab_size), known_WS, vocab_size
        )
        nats[name] = float(-np.log(chance_WS).mean())
    return nats


def _grams(tokens_WS: np.ndarray, order: int, vocab_size: int) -> np.ndarray:
    """Each target with the `order` - 1 tokens before it as one number, the target in the lowest place."""
    first = max(1, order - 1)
    grams_WS = np.zeros_like(tokens_WS[:, first:])
    for back in range(order - 1, -1, -1):
        grams_WS = grams_WS * vocab_size + tokens_WS[:, first - back : tokens_WS.shape[1] - back]
    return grams_WS


def _interpolated(train_WS: np.ndarray, held_WS: np.ndarray, lower_WS: np.ndarray, vocab_size: int) -> np.ndarray:
    grams_G, counts_G = np.unique(train_WS, return_counts=True)
    contexts, begin, types = np.unique(grams_G // vocab_size, return_index=True, return_counts=True)
    totals = np.add.reduceat(counts_G, begin)
    count_WS = _found(grams_G, counts_G, held_WS)
    total_WS, types_WS = (_found(contexts, values, held_WS // vocab_size) for values in (totals, types))
    seen = total_WS > 0
    return np.divide(count_WS + types_WS * lower_WS, total_WS + types_WS, out=lower_WS.copy(), where=seen)


def _found(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The value of each asked key; 0 of one that is not there. `keys` rise."""
    place = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[place] == asked, values[place], 0)
