"""What training minimises. Apart from the LightningModule, so that it can be timed without Lightning."""

from torch import Tensor

from moepp.models.decoder import Decoder, DecoderOutput


def training_losses(model: Decoder, tokens: Tensor) -> tuple[Tensor, Tensor, DecoderOutput]:
    """Cross-entropy of the next tokens and beta * L_b, whose sum is Eq. 9, and the output that they are of; `tokens`
    [B, S+1].
    """
    output = model(tokens[:, :-1], targets_BS=tokens[:, 1:])
    return output.cross_entropy, model.balance_loss(output), output
