"""Log-likelihoods of token sequences under a decoder: windows over what exceeds its context, batches by length.

Shape suffixes: B windows of a batch, S their padded length, V vocabulary, Q scored tokens of a batch, flat.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tokens = tuple[int, ...]


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


def log_likelihoods(
    logits_of: Callable[[Tensor], Tensor],
    requests: Sequence[tuple[Sequence[int], int]],
    context: int,
    batch_tokens: int,
    device: torch.device,
    progress: Callable[[int], object] = lambda done: None,
) -> list[Likelihood]:
    """The likelihood of the last `scored` tokens of every request (tokens, scored), in the requests' order.

    `logits_of` maps ids [B, S] to logits [B, S, V]. Batches hold at most `batch_tokens` padded tokens, the longest
    windows first, so that the first batch needs the most memory. Equal inputs are computed once: the lettered answers
    to one question differ in their last token only.
    """
    scorers: dict[Tokens, list[tuple[int, Tokens]]] = {}
    for number, (tokens, scored) in enumerate(requests):
        for window in windows(tokens, scored, context):
            scorers.setdefault(window.inputs, []).append((number, window.targets))
    nats = torch.zeros(len(requests), dtype=torch.float64)
    wrong = torch.zeros(len(requests), dtype=torch.int64)
    for batch in batches(sorted(scorers, key=len, reverse=True), batch_tokens):
        owners, tokens_nats, missed = _score(logits_of, batch, [scorers[inputs] for inputs in batch], device)
        nats.index_add_(0, owners, tokens_nats)
        wrong.index_add_(0, owners, missed)
        progress(len(batch))
    return [Likelihood(value, missed == 0) for value, missed in zip(nats.tolist(), wrong.tolist(), strict=True)]


def batches(longest_first: Sequence[Tokens], batch_tokens: int) -> Iterator[Sequence[Tokens]]:
    """Slices whose padded size is at most `batch_tokens`, or a single row that alone exceeds it."""
    start = 0
    while start < len(longest_first):
        end = start + max(1, batch_tokens // len(longest_first[start]))
        yield longest_first[start:end]
        start = end


def _score(
    logits_of: Callable[[Tensor], Tensor],
    batch: Sequence[Tokens],
    scorers: Sequence[Sequence[tuple[int, Tokens]]],
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """For every scored token the request it belongs to, its log-probability, and 1 where it is not the likeliest."""
    ids_BS = torch.zeros(len(batch), len(batch[0]), dtype=torch.int64)
    for row, inputs in enumerate(batch):
        ids_BS[row, : len(inputs)] = torch.tensor(inputs)  # attention is causal: padding on the right changes nothing
    places = [
        (row, len(batch[row]) - len(targets) + offset, token, owner)
        for row, shared in enumerate(scorers)
        for owner, targets in shared
        for offset, token in enumerate(targets)
    ]
    row_Q, position_Q, token_Q, owner_Q = torch.tensor(places, device=device).unbind(1)
    logits_QV = logits_of(ids_BS.to(device))[row_Q, position_Q].float()
    nats_Q = logits_QV.gather(1, token_Q[:, None])[:, 0] - logits_QV.logsumexp(-1)
    missed_Q = logits_QV.argmax(-1) != token_Q
    return owner_Q.cpu(), nats_Q.double().cpu(), missed_Q.long().cpu()
