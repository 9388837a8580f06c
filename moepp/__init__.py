"""MoE++ (arXiv 2410.07348): zero-computation experts, gating residuals, and the experiments that test them.

`moepp.MoELayer(moepp.MoEConfig(dim=64, hidden=128))` is a layer that computes, and
`moepp.train(moepp.compose(moepp.RunConfig, ["size=smoke"]))` a run with its record.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moepp import register
    from moepp.config import compose
    from moepp.data.batches import TokenDataModule
    from moepp.layers.moe import MoELayer
    from moepp.layers.settings import MoEConfig
    from moepp.models.decoder import Decoder
    from moepp.models.settings import DecoderConfig
    from moepp.training.loading import load_run, load_sweep
    from moepp.training.module import LanguageModel
    from moepp.training.run import train
    from moepp.training.settings import RunConfig

__version__ = "0.1.0"
__all__ = [
    "Decoder", "DecoderConfig", "LanguageModel", "MoEConfig", "MoELayer", "RunConfig", "TokenDataModule", "compose",
    "load_run", "load_sweep", "register", "train",
]  # fmt: skip
# Modules by the names they give; imported when first asked for: sweeps are planned without torch.
_MODULES = {
    "Decoder": "models.decoder",
    "DecoderConfig": "models.settings",
    "LanguageModel": "training.module",
    "MoEConfig": "layers.settings",
    "MoELayer": "layers.moe",
    "RunConfig": "training.settings",
    "TokenDataModule": "data.batches",
    "compose": "config",
    "load_run": "training.loading",
    "load_sweep": "training.loading",
    "train": "training.run",
}


def __getattr__(name: str) -> Any:
    if name == "register":
        return importlib.import_module("moepp.register")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"moepp.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
