"""Models by their registered name, from a config or from the plain description that a checkpoint holds."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

from omegaconf import OmegaConf
from torch import nn

from moepp import register
from moepp.layers.registry import PartError
from moepp.models.protocol import CausalLM
from moepp.models.settings import DecoderConfig


def build_model(config: DecoderConfig | Mapping[str, Any], seed: int | None = None) -> CausalLM:
    """With initial weights by `seed`; None leaves them unset, for what is loaded into them. Raises PartError for a
    model of somebody's own that lacks what CausalLM asks for.
    """
    if not isinstance(config, DecoderConfig):
        config = cast(DecoderConfig, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DecoderConfig), config)))
    model = register.model[config.name](config, seed, **config.options)
    if not isinstance(model, nn.Module):
        raise register.model.unusable(config.name, model, "an nn.Module")
    if lacking := [name for name in vars(CausalLM) if not name.startswith("_") and not hasattr(model, name)]:
        raise PartError(
            f"{register.model.described(config.name)} has no {', '.join(lacking)}; moepp/models/protocol.py says what"
            " training asks of a model"
        )
    return model


def describe_model(model: CausalLM) -> dict[str, Any]:
    """`{"model": what build_model takes}`; empty for a model that no registered name builds, which whoever loads a
    checkpoint has to bring.
    """
    config = model.config
    if not isinstance(config, DecoderConfig):
        return {}
    part = register.model[config.name]
    return {"model": asdict(config)} if not isinstance(part, type) or isinstance(model, part) else {}
