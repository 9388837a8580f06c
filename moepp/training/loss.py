"""What training minimises. Apart from the LightningModule, so that it can be timed without Lightning."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from moepp.models.cross_entropy import widened
from moepp.models.protocol import CausalLM, ModelOutput

LossFunction = Callable[..., tuple[Tensor, Tensor, ModelOutput]]  # as `training_losses`


def training_losses(
    model: CausalLM, tokens: Tensor, labels: Tensor | None = None
) -> tuple[Tensor, Tensor, ModelOutput]:
    """Cross-entropy of the next tokens and beta * L_b, whose sum is Eq. 9, and the output that they are of; `tokens`
    [B, S+1]. A model that learns from another has its divergence in place of the first. `labels` [B, S+1] are predicted
    in place of the tokens, the mean being over those that are not -100; the logits then exist as a whole.
    """
    if labels is None:
        output = model(tokens[:, :-1], targets_BS=tokens[:, 1:])
    else:
        output = model(tokens[:, :-1])
        output.cross_entropy = F.cross_entropy(widened(output.logits).transpose(1, 2), labels[:, 1:])
    learnt = output.cross_entropy if output.divergence is None else output.divergence
    return learnt, model.balance_loss(output), output
