"""How a language model continues text, whichever model it is.

Shape suffixes: B batch, S sequence, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from moepp.errors import UsageError


@torch.inference_mode()
def continue_ids(
    model: nn.Module,
    last_logits: Callable[[Tensor], Tensor],
    ids_BS: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`ids_BS` with `max_new_tokens` more ids, [B, S + max_new_tokens]; greedy at temperature 0, else sampled.

    `last_logits` maps ids that have not been seen yet, [B, S] and then [B, 1], to the logits behind the last, [B, V].
    Raises UsageError for no ids to continue, and for a temperature that is none.
    """
    if ids_BS.ndim != 2 or not ids_BS.shape[1]:
        raise UsageError(f"ids of shape {list(ids_BS.shape)}: sequences [B, S] of one id or more can be continued")
    if not 0 <= temperature < math.inf:
        raise UsageError(f"temperature={temperature} must not be negative, and finite")
    was_training, step_BS = model.training, ids_BS
    model.eval()
    try:
        for _ in range(max_new_tokens):
            logits_BV = last_logits(step_BS).float()
            if temperature == 0:
                step_BS = logits_BV.argmax(-1, keepdim=True)
            else:
                step_BS = torch.multinomial((logits_BV / temperature).softmax(-1), 1, generator=generator)
            ids_BS = torch.cat([ids_BS, step_BS], dim=1)
    finally:
        model.train(was_training)
    return ids_BS
