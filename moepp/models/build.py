"""Models by their registered name, from a config or from the plain description that a checkpoint holds."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

from omegaconf import OmegaConf

from moepp import register
from moepp.models.protocol import CausalLM
from moepp.models.settings import DecoderConfig


def build_model(config: DecoderConfig | Mapping[str, Any], seed: int | None = None) -> CausalLM:
    """With initial weights by `seed`; None leaves them unset, for what is loaded into them."""
    if not isinstance(config, DecoderConfig):
        config = cast(DecoderConfig, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DecoderConfig), config)))
    return register.model[config.name](config, seed, **config.options)


def describe_model(model: CausalLM) -> dict[str, Any]:
    """`{"model": what build_model takes}`; empty for a model that no registered name builds, which whoever loads a
    checkpoint has to bring.
    """
    config = model.config
    if not isinstance(config, DecoderConfig):
        return {}
    part = register.model[config.name]
    return {"model": asdict(config)} if not isinstance(part, type) or isinstance(model, part) else {}
