"""What the routers of any MoE do with what passes through it, new experts or not.

Shape suffixes: B batch, S sequence, P cached and new positions, T = B*S tokens, K slots of a token, E experts of a
layer.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moepp.errors import UsageError
from moepp.records import RunRecord
from moepp.retrofit.modeling import blocks


class Unpadded:
    """Which tokens of a forward are text: those that its `attention_mask` [B, P] keeps, all without one. A module that
    is called on a part of the tokens, as experts of images are, has all of its own counted.
    """

    def __init__(self, model: nn.Module) -> None:
        self.signature = inspect.signature(model.forward)
        self.kept_T: Tensor | None = None

    def hear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self.signature.bind_partial(*args, **kwargs).arguments
        mask = given.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            self.kept_T = None
            return
        new = next(given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None).shape[1]
        self.kept_T = mask[:, -new:].flatten().bool()

    def of(self, rows: Tensor) -> Tensor:
        """[T, ...] without padding."""
        if self.kept_T is None or len(rows) != len(self.kept_T):
            return rows
        return rows[self.kept_T.to(rows.device)]


class Observed:
    """Sums of one layer, from which its row is made."""

    def __init__(self, unpadded: Unpadded) -> None:
        self.unpadded = unpadded
        self.count_E: Tensor | None = None
        self.tokens = 0
        self.entropy = self.top = 0.0

    def router(self, module: nn.Module, args: Any, output: Any) -> None:
        said_TE = self.unpadded.of(first_answer(output).detach().float().flatten(0, -2))
        probs_TE = said_TE if are_probabilities(said_TE) else said_TE.softmax(-1)
        self.entropy += torch.special.entr(probs_TE).sum().item()
        self.top += probs_TE.amax(-1).sum().item()
        self.tokens += len(probs_TE)
        self.width = probs_TE.shape[1]

    def experts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        expert_TK = self.unpadded.of((*args, *kwargs.values())[1].flatten(0, -2))
        count_E = torch.bincount(expert_TK.flatten(), minlength=self.width)
        self.count_E = count_E if self.count_E is None else self.count_E + count_E

    def row(self) -> dict[str, Any]:
        """Shares of all slots by expert, and means over tokens: entropy in nats, the largest probability."""
        load_E = self.count_E / self.count_E.sum()
        return {"load": load_E.tolist(), "entropy": self.entropy / self.tokens, "top_score": self.top / self.tokens}


def first_answer(output: Any) -> Tensor:
    """What a router says of all experts, [..., E]: logits, of some families probabilities."""
    return next(o for o in output if isinstance(o, Tensor) and o.is_floating_point())


def are_probabilities(said_TE: Tensor) -> bool:
    return bool((said_TE >= 0).all() and torch.allclose(said_TE.sum(-1), said_TE.new_ones(()), atol=1e-3))


@contextmanager
def observe(model: nn.Module, record: RunRecord | None = None, step: int = 0) -> Iterator[dict[str, dict[str, Any]]]:
    """Gives a dict that has, after the block, each layer's loads, entropy and top score by its path; with a run record
    they are logged there as `router/*`, from where MLflow shows them. The model's `attention_mask` leaves padding out.
    """
    if hasattr(model, "get_base_model"):  # adapters' forward names no arguments
        model = model.get_base_model()
    found = blocks(model)
    if not found:
        raise UsageError(f"{type(model).__name__} has no MoE block of a router and stacked experts")
    unpadded, rows = Unpadded(model), {}
    layers = {path: Observed(unpadded) for path in found}
    hooks = [model.register_forward_pre_hook(unpadded.hear, with_kwargs=True)]
    for path, (router, experts) in found.items():
        hooks.append(router.register_forward_hook(layers[path].router))
        hooks.append(experts.register_forward_pre_hook(layers[path].experts, with_kwargs=True))
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()
    rows.update({path: layer.row() for path, layer in layers.items() if layer.tokens})
    if record is not None:
        record.log(step, metrics(rows))


def metrics(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """One number per layer and expert."""
    found = {}
    for layer, row in enumerate(rows.values()):
        found |= {f"router/layer{layer}/{name}": row[name] for name in ("entropy", "top_score")}
        found |= {f"router/layer{layer}/expert{i}/load": load for i, load in enumerate(row["load"])}
    return found
