"""Log-likelihoods of token sequences under a decoder: windows over what exceeds its context, batches by length, and
what windows begin with in common read once.

Shape suffixes: B windows of a batch, S their padded length, V vocabulary, Q scored tokens of a batch, flat.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moepp.models.attention import KeyValueCache

Tokens = tuple[int, ...]
Scorers = Mapping[Tokens, Sequence[tuple[int, Tokens]]]  # by a window's inputs, the requests and targets at its end
SHARED_STEP = 8  # tokens in common are read once in multiples of this: batches need equal lengths


class Reader(Protocol):
    """What scores: `Checkpoint`, for one."""

    def caches(self) -> list[KeyValueCache]:
        """Empty ones, of every layer."""

    def logits(
        self, ids_BS: Tensor, at: tuple[Tensor, Tensor] | None = None, caches: list[KeyValueCache] | None = None
    ) -> Tensor:
        """Of the ids that come next, [Q, V] `at` those rows and positions alone; ids follow those that are cached."""


@dataclass(frozen=True)
class Window:
    """One input of at most the context's length; `targets` follow its last `len(targets)` positions."""

    inputs: Tokens
    targets: Tokens


@dataclass(frozen=True)
class Likelihood:
    """Of a continuation: its log-probability in nats, and whether greedy decoding would produce it."""

    nats: float
    greedy: bool


def windows(tokens: Sequence[int], scored: int, context: int) -> list[Window]:
    """Predicts each of the last `scored` tokens once, from inputs of at most `context` tokens.

    What fits into one window is cut from the left. Otherwise several windows follow one another, and every target has
    at least half a context of the tokens before it, or all of them.
    """
    tokens, end, found = tuple(tokens), len(tokens) - scored, []
    if end < 1:
        raise ValueError("the first scored token needs a token before it")
    step = scored if scored <= context else context - context // 2
    while end < len(tokens):
        start, end = end, min(len(tokens), max(end + step, context + 1))
        found.append(Window(tokens[max(0, end - 1 - context) : end - 1], tokens[start:end]))
    return found


@dataclass(frozen=True)
class Family:
    """Windows whose inputs begin with the same `prefix`, and what follows it in each."""

    prefix: Tokens
    tails: tuple[Tokens, ...]

    @property
    def longest(self) -> int:
        return max(map(len, self.tails))


def families(scorers: Scorers) -> list[Family]:
    """The windows by what they have in common before the first target, the longest first. Those that share nothing are
    families of their own, without a prefix.
    """
    sharing: dict[Tokens, list[Tokens]] = {}
    for inputs, shared in scorers.items():
        before = len(inputs) - max(len(targets) for _, targets in shared)
        sharing.setdefault(inputs[: before // SHARED_STEP * SHARED_STEP], []).append(inputs)
    found = []
    for prefix, members in sharing.items():
        if prefix and len(members) > 1:
            found.append(Family(prefix, tuple(inputs[len(prefix) :] for inputs in members)))
        else:
            found += [Family((), (inputs,)) for inputs in members]
    return sorted(found, key=lambda family: (len(family.prefix) + family.longest, len(family.prefix)), reverse=True)


def batches(longest_first: Sequence[Family], batch_tokens: int) -> Iterator[list[Family]]:
    """Families of one length of prefix, read in at most `batch_tokens` padded tokens, or one that alone exceeds it."""
    open_: dict[int, list[Family]] = {}
    for family in longest_first:
        length = len(family.prefix)
        batch = open_.get(length, [])
        if batch and _padded([*batch, family]) > batch_tokens:
            yield open_.pop(length)
        open_.setdefault(length, []).append(family)
    yield from open_.values()


def _padded(batch: Sequence[Family]) -> int:
    rows, longest = sum(len(family.tails) for family in batch), max(family.longest for family in batch)
    return len(batch) * len(batch[0].prefix) + rows * longest


def log_likelihoods(
    reader: Reader,
    requests: Sequence[tuple[Sequence[int], int]],
    context: int,
    batch_tokens: int,
    device: torch.device,
    progress: Callable[[int], object] = lambda done: None,
) -> list[Likelihood]:
    """The likelihood of the last `scored` tokens of every request (tokens, scored), in the requests' order.

    Equal inputs are computed once, for the lettered answers to one question differ in their last token only; so is what
    the other answers to a question begin with.
    """
    scorers: dict[Tokens, list[tuple[int, Tokens]]] = {}
    for number, (tokens, scored) in enumerate(requests):
        for window in windows(tokens, scored, context):
            scorers.setdefault(window.inputs, []).append((number, window.targets))
    nats = torch.zeros(len(requests), dtype=torch.float64)
    wrong = torch.zeros(len(requests), dtype=torch.int64)
    for batch in batches(families(scorers), batch_tokens):
        owners, tokens_nats, missed = _score(reader, batch, scorers, device)
        nats.index_add_(0, owners, tokens_nats)
        wrong.index_add_(0, owners, missed)
        progress(sum(len(family.tails) for family in batch))
    return [Likelihood(value, missed == 0) for value, missed in zip(nats.tolist(), wrong.tolist(), strict=True)]


def _score(
    reader: Reader, batch: Sequence[Family], scorers: Scorers, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """For every scored token the request it belongs to, its log-probability, and 1 where it is not the likeliest."""
    tails = [(number, tail) for number, family in enumerate(batch) for tail in family.tails]
    places = [
        (row, len(tail) - len(targets) + offset, token, owner)
        for row, (number, tail) in enumerate(tails)
        for owner, targets in scorers[batch[number].prefix + tail]
        for offset, token in enumerate(targets)
    ]
    row_Q, position_Q, token_Q, owner_Q = torch.tensor(places, device=device).unbind(1)
    caches = _read_prefixes(reader, [family.prefix for family in batch], [number for number, _ in tails], device)
    ids_BS = _padded_ids([tail for _, tail in tails]).to(device)
    logits_QV = reader.logits(ids_BS, (row_Q, position_Q), caches).float()
    nats_Q = logits_QV.gather(1, token_Q[:, None])[:, 0] - logits_QV.logsumexp(-1)
    missed_Q = logits_QV.argmax(-1) != token_Q
    return owner_Q.cpu(), nats_Q.double().cpu(), missed_Q.long().cpu()


def _read_prefixes(
    reader: Reader, prefixes: Sequence[Tokens], prefix_of_row: Sequence[int], device: torch.device
) -> list[KeyValueCache] | None:
    """Keys and values of each row's prefix; None where there is none."""
    if not prefixes[0]:
        return None
    caches, nowhere = reader.caches(), torch.zeros(0, dtype=torch.int64, device=device)
    reader.logits(torch.tensor(prefixes, device=device), (nowhere, nowhere), caches)
    for cache in caches:
        cache.select(torch.tensor(prefix_of_row, device=device))
    return caches


def _padded_ids(rows: Sequence[Tokens]) -> Tensor:
    ids_BS = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, tokens in enumerate(rows):
        ids_BS[row, : len(tokens)] = torch.tensor(tokens)  # attention is causal: padding on the right changes nothing
    return ids_BS
