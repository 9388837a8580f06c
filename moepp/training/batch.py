"""What a DataLoader may give a LanguageModel: ids, a pair with bytes, or a mapping as transformers' collators make.

Shape suffixes: B sequences, S predicted tokens of each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moepp.errors import UsageError

IGNORED = -100  # the label of what is not to be predicted, transformers' and torch's own
KEYS = ("input_ids", "labels", "attention_mask")


@dataclass(frozen=True)
class TokenBatch:
    """`ids` [B, S+1]. `labels` are as many: what is to be predicted at each place, IGNORED where nothing is; None where
    they are the ids. `lengths` [B, S] are the UTF-8 bytes that each target stands for.
    """

    ids: Tensor
    labels: Tensor | None = None
    lengths: Tensor | None = None

    def counted_labels(self) -> tuple[Tensor, Tensor]:
        """Targets [B, S], all of them ids, and which of these count."""
        targets = self.labels[:, 1:]
        return targets.clamp(min=0), targets != IGNORED


def read_batch(batch: Any) -> TokenBatch:
    """Raises UsageError, in one line, for what is none of the three, and for what a mapping asks beyond them. To see
    what a mapping asks waits for the device.
    """
    if isinstance(batch, Mapping) and "input_ids" in batch:
        return _of_mapping(batch)
    if isinstance(batch, Sequence) and batch:  # a DataLoader over a TensorDataset gives lists of one tensor
        return TokenBatch(_ids(batch[0]), lengths=batch[1] if len(batch) > 1 else None)
    return TokenBatch(_ids(batch))


def _of_mapping(batch: Mapping[str, Any]) -> TokenBatch:
    ids, labels, mask = _ids(batch["input_ids"]), batch.get("labels"), batch.get("attention_mask")
    if unknown := [key for key in batch if key not in KEYS]:
        raise UsageError(f"a batch has {unknown[0]}, which nothing here reads: leave it out beside {', '.join(KEYS)}")
    if mask is not None and not torch.as_tensor(mask).all():
        raise UsageError(
            "a batch's attention_mask has zeros, and padding would be routed and read as text: pack texts into"
            " sequences of one length"
        )
    if labels is None:
        return TokenBatch(ids)
    if not isinstance(labels, Tensor) or labels.shape != ids.shape:
        found = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise UsageError(f"a batch's labels are {found}; they must be {list(ids.shape)}, as its input_ids")
    if torch.equal(labels := labels.long(), ids):
        return TokenBatch(ids)
    if not (labels[:, 1:] != IGNORED).any():
        raise UsageError(f"a batch's labels are all {IGNORED} behind the first token: nothing is to be predicted")
    return TokenBatch(ids, labels)


def _ids(ids: Any) -> Tensor:
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] < 2 or ids.is_floating_point():
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise UsageError(
            f"a batch is {found}; token ids [sequences, 2 or more] are needed, a pair that begins so, or a mapping with"
            " them as input_ids"
        )
    return ids.long()
