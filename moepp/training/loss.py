"""What training minimises. Apart from the LightningModule, so that it can be timed without Lightning."""

from collections.abc import Callable

from torch import Tensor

from moepp.models.protocol import CausalLM, ModelOutput

Losses = Callable[[CausalLM, Tensor], tuple[Tensor, Tensor, ModelOutput]]


def training_losses(model: CausalLM, tokens: Tensor) -> tuple[Tensor, Tensor, ModelOutput]:
    """Cross-entropy of the next tokens and beta * L_b, whose sum is Eq. 9, and the output that they are of; `tokens`
    [B, S+1].
    """
    output = model(tokens[:, :-1], targets_BS=tokens[:, 1:])
    return output.cross_entropy, model.balance_loss(output), output
