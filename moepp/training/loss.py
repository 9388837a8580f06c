"""What training minimises. Apart from the LightningModule, so that it can be timed without Lightning."""

from collections.abc import Callable

from torch import Tensor

from moepp.models.protocol import CausalLM, ModelOutput

LossFunction = Callable[[CausalLM, Tensor], tuple[Tensor, Tensor, ModelOutput]]


def training_losses(model: CausalLM, tokens: Tensor) -> tuple[Tensor, Tensor, ModelOutput]:
    """Cross-entropy of the next tokens and beta * L_b, whose sum is Eq. 9, and the output that they are of; `tokens`
    [B, S+1]. A model that learns from another has its divergence in place of the first.
    """
    output = model(tokens[:, :-1], targets_BS=tokens[:, 1:])
    learnt = output.cross_entropy if output.divergence is None else output.divergence
    return learnt, model.balance_loss(output), output
