"""Folders that transformers could load, as models that are read and not trained: exported runs and its families' own.

Shape suffixes: B batch, S sequence, V vocabulary, Q places.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from moepp.errors import UsageError
from moepp.lfs import refuse_pointer
from moepp.models.foreign import architecture_of
from moepp.models.protocol import ModelOutput
from moepp.models.weight_files import find_weights, some
from moepp.retrofit.folders import load
from moepp.retrofit.model import Cache, causal, imported
from moepp.retrofit.modeling import plus_plus

EXPORTED = "moepp"  # model_type of this package's own decoder in an exported folder


class ReadModel(nn.Module):
    """Calls `hf` as the decoder is called; of what its layers do it says nothing."""

    def __init__(self, hf: nn.Module):
        super().__init__()
        self.hf = hf

    def forward(
        self, ids_BS: Tensor, caches: list[Cache] | None = None, at: tuple[Tensor, Tensor] | None = None
    ) -> ModelOutput:
        """With `caches`, of ids that follow those already cached; logits [Q, V] `at` those rows and positions alone."""
        logits_BSV = caches[0].logits(self.hf, ids_BS) if caches else self.hf(ids_BS, use_cache=False).logits
        return ModelOutput([], logits=logits_BSV if at is None else logits_BSV[at])

    def caches(self) -> list[Cache]:
        """Empty, for `forward`."""
        return [Cache()]


def read_folder(folder: Path, dtype: torch.dtype | None, device: torch.device) -> ReadModel:
    """The causal language model in a folder, with weights in `dtype`, None: that of its files. No code in the folder is
    run. Raises UsageError, in one line, for what cannot be loaded, or not whole.
    """
    for file in find_weights(folder):
        refuse_pointer(file)
    architecture = architecture_of(str(folder))
    kind = class_of(architecture)
    try:
        if "zce_nums" in architecture:
            return ReadModel(load(folder, dtype=dtype or "auto").eval()).to(device)
        model, found = kind.from_pretrained(folder, dtype=dtype or "auto", output_loading_info=True)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{folder} cannot be loaded: {said}") from None
    if missing := sorted(found["missing_keys"]):
        raise UsageError(f"the weights in {folder} do not fit its config.json: {some(missing)} missing")
    return ReadModel(model.eval()).to(device)


def class_of(architecture: dict[str, Any]) -> Any:
    """The package's own for what it has exported, else that of transformers, with new experts where there are some."""
    imported()
    if architecture["model_type"] == EXPORTED:
        from moepp.retrofit.modeling_decoder import MoEPlusPlusForCausalLM

        return MoEPlusPlusForCausalLM
    cls = causal(architecture)[0]
    return plus_plus(cls) if "moepp" in architecture else cls
