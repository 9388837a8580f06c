import math

import numpy as np
import pytest

from moepp.statistics.ngrams import witten_bell


def by_hand(train, held, vocab):
    """The recursion of the module's docstring, one target at a time."""

    def chance(word, context):
        if context is None:
            return 1 / vocab
        lower = chance(word, context[1:] if context else None)
        n = len(context)
        seen = [w[i] for w in train for i in range(max(1, n), len(w)) if tuple(w[i - n : i]) == context]
        return (seen.count(word) + len(set(seen)) * lower) / (len(seen) + len(set(seen))) if seen else lower

    targets = [(w, i) for w in held for i in range(1, len(w))]
    return [
        -sum(math.log(chance(w[i], tuple(w[max(0, i - n) : i]))) for w, i in targets) / len(targets) for n in range(3)
    ]


def test_every_order_is_the_equation():
    generator = np.random.default_rng(0)
    train, held = generator.integers(0, 5, (6, 9)), generator.integers(0, 7, (4, 9))
    found = witten_bell(train, held, vocab_size=7)
    assert list(found.values()) == pytest.approx(by_hand(train.tolist(), held.tolist(), 7))


def test_a_vocabulary_whose_trigrams_do_not_fit_is_refused():
    with pytest.raises(ValueError, match="do not fit into 63 bits"):
        witten_bell(np.zeros((1, 3), int), np.zeros((1, 3), int), vocab_size=2**21)
