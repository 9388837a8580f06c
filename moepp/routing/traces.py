"""What the routers of a trained decoder do with texts, batch by batch, and the aggregates that the analyses need.

Nothing here keeps logits of more than one batch. Texts longer than the context are cut into windows that together hold
every token once; each window begins with the token before it (the prefix at the start), which is routed but not
counted. Routing is dropless, as in validation.

Shape suffixes: T counted tokens of a batch, B windows, S positions, L MoE layers, K slots of a token, N experts, X
texts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from moepp.errors import UsageError
from moepp.models.decoder import Decoder
from moepp.routing.loads import ExpertLoad
from moepp.routing.scores import RoutingScores
from moepp.routing.texts import Text

BATCH_TOKENS = 4096
BATCH_LOGITS = 2**25  # elements of the [T, vocabulary] logits of a batch


@dataclass(frozen=True)
class Trace:
    """What every MoE layer did with one batch of tokens. `text_T` and `position_T` say which token of which text."""

    text_T: np.ndarray
    position_T: np.ndarray
    nats_T: np.ndarray  # minus the log-probability of the token given what stands before it
    expert_LTK: np.ndarray  # id N in slots that are not used
    probs_LTN: np.ndarray  # the router's scores: the softmax, or the ReLU where that selects


@dataclass(frozen=True)
class _Window:
    text: int
    start: int
    ids: np.ndarray  # with the token before the window


@torch.inference_mode()
def trace(
    model: Decoder,
    texts: Sequence[Text],
    prefix: int,
    context: int,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Iterator[Trace]:
    """Routes every token of `texts` once, in batches of windows of similar length, on the model's device.

    `prefix` is the token that stands before a text, `context` the longest input in tokens. Raises UsageError for a
    model without MoE layers.
    """
    layers = model.moe_layers()
    if not layers:
        raise UsageError("a dense model routes nothing; choose a run with MoE layers")
    if any(layer.config.experts != model.config.experts for layer in layers):
        raise UsageError("per_layer.experts: layers of different experts cannot be traced together; choose another run")
    model.eval()
    device = model.embedding.weight.device
    for batch in _batches(texts, prefix, context, model.config.vocab_size):
        width = max(len(window.ids) for window in batch)
        ids_BS = np.full((len(batch), width), prefix, dtype=np.int64)  # causal: padding changes nothing before it
        for row, window in enumerate(batch):
            ids_BS[row, : len(window.ids)] = window.ids
        ids_BS = torch.from_numpy(ids_BS).to(device)
        with autocast():
            output = model(ids_BS)
            routings = [layer.route(stats.logits_TN) for layer, stats in zip(layers, output.stats, strict=True)]
        nats = F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), ids_BS[:, 1:].flatten(), reduction="none")
        counted_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
        for row, window in enumerate(batch):
            counted_BS[row, 1 : len(window.ids)] = True
        kept = counted_BS.flatten()
        yield Trace(
            np.concatenate([np.full(len(window.ids) - 1, window.text) for window in batch]),
            np.concatenate([window.start + np.arange(len(window.ids) - 1) for window in batch]),
            nats.view(len(batch), -1)[counted_BS[:, 1:]].cpu().numpy(),
            *(
                torch.stack([getattr(routing, name)[kept] for routing in routings]).float().cpu().numpy().astype(dtype)
                for name, dtype in (("expert_TK", np.int64), ("probs_TN", np.float32))
            ),
        )


def _batches(texts: Sequence[Text], prefix: int, context: int, vocab_size: int) -> Iterator[list[_Window]]:
    step = context - 1
    windows = [
        _Window(
            index,
            start,
            np.concatenate(([text.ids[start - 1] if start else prefix], text.ids[start : start + step])),
        )
        for index, text in enumerate(texts)
        for start in range(0, len(text.ids), step)
    ]
    windows.sort(key=lambda window: len(window.ids))
    tokens = max(context, min(BATCH_TOKENS, BATCH_LOGITS // vocab_size))
    batch: list[_Window] = []
    for window in windows:
        if batch and (len(batch) + 1) * len(window.ids) > tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def expert_load(model: Decoder, texts: Sequence[Text], traces: Iterator[Trace]) -> ExpertLoad:
    """Sums the traces of `texts` by text: the experts chosen in each layer, and the nats and bytes of the answers."""
    experts = model.config.experts
    layers, total = len(model.moe_layers()), experts.total
    chosen_XLN = np.zeros((len(texts), layers, total), dtype=np.int32)
    nats_X = np.zeros(len(texts))
    answer_X = np.array([text.answer for text in texts])
    for batch in traces:
        present, local_T = np.unique(batch.text_T, return_inverse=True)
        cell_LTK = (local_T[:, None] * layers + np.arange(layers)[:, None, None]) * (total + 1) + batch.expert_LTK
        counts = np.bincount(cell_LTK.ravel(), minlength=len(present) * layers * (total + 1))
        chosen_XLN[present] += counts.reshape(len(present), layers, total + 1)[..., :total].astype(np.int32)
        asked_T = batch.position_T >= answer_X[batch.text_T]
        nats_X += np.bincount(batch.text_T, weights=batch.nats_T * asked_T, minlength=len(texts))
    return ExpertLoad(
        kinds=tuple(experts.kinds()),
        chosen_XLN=chosen_XLN,
        tokens_X=np.array([len(text.ids) for text in texts]),
        nats_X=nats_X,
        bytes_X=np.array([text.bytes[text.answer :].sum() for text in texts]),
        group=tuple(text.group for text in texts),
        topic=tuple(text.topic for text in texts),
        subject=tuple(text.subject for text in texts),
    )


def routing_scores(model: Decoder, traces: Iterator[Trace]) -> RoutingScores:
    """The distributions of the two highest scores of each token, by layer (Fig. 6)."""
    scores = RoutingScores.empty(len(model.moe_layers()))
    for batch in traces:
        scores.add(-np.partition(-batch.probs_LTN, 1, axis=-1)[..., :2].astype(np.float64))
    return scores


def ffn_and_nats(
    model: Decoder, texts: Sequence[Text], traces: Iterator[Trace]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """FFN experts of every token, mean over MoE layers, and its loss, two arrays [S] per text (Fig. 5)."""
    ffn, nats = ([np.zeros(len(text.ids), dtype=np.float32) for text in texts] for _ in range(2))
    for batch in traces:
        used_T = (batch.expert_LTK < model.config.experts.ffn).sum(-1).mean(0)
        for index in np.unique(batch.text_T):
            here = batch.text_T == index
            ffn[index][batch.position_T[here]] = used_T[here]
            nats[index][batch.position_T[here]] = batch.nats_T[here]
    return ffn, nats
