"""Optimizers by name, and the learning-rate schedules.

A registered optimizer is called with the module and the config; its other parameters are its options.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from moepp import register
from moepp.errors import UsageError
from moepp.layers.bounds import Range
from moepp.training.muon import MuonAdamW
from moepp.training.settings import OptimConfig

Momentum = Annotated[float, Range(0, below=1)]
SET_HERE = ("params", "lr", "weight_decay")  # by OptimConfig
STEPS_TRIED = 10  # of an optimizer with options, before a run begins
NONE_OF_OURS = ("maximize", "differentiable")  # would climb the loss, or keep a graph of every step


def learning_rate_scale(step: int, steps: int, config: OptimConfig) -> float:
    """The factor on `lr` for the update after `step` finished steps, of `steps` in all.

    Linear warm-up, then `cosine` to the final share, or `wsd`: constant, then linear decay over the last `decay_share`
    of the run.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    final = config.final_lr_share
    if config.schedule == "wsd":
        start = config.decay_start(steps)
        return 1 - (1 - final) * min(1.0, max(0.0, (step - start) / (steps - start)))
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(module: nn.Module, config: OptimConfig) -> Optimizer:
    """The optimizer that the config names. Raises UsageError for options that torch's refuses, and for somebody's own
    that is none.
    """
    try:
        made = register.optimizer[config.name](module, config, **config.options)
    except (TypeError, ValueError) as error:
        if config.name not in register.optimizer.defined:
            raise
        said = " ".join(str(error).split())
        raise UsageError(f"optim.options={config.options}: optimizer {config.name} refuses this: {said}") from error
    if not isinstance(made, Optimizer):
        named = register.optimizer.described(config.name)
        raise UsageError(f"{named} returned {type(made).__name__}; a torch.optim.Optimizer is needed")
    if config.name not in register.optimizer.defined:
        _refuse_steps(made, module, register.optimizer.described(config.name))
    return made


def _refuse_steps(optimizer: Optimizer, module: nn.Module, named: str) -> None:
    """Raises UsageError where nothing of the module would learn, the schedule cannot set the rate, or Lightning cannot
    step.
    """
    given = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(parameter.requires_grad and id(parameter) in given for parameter in module.parameters()):
        raise UsageError(f"{named} has none of the parameters that are trained")
    if any("lr" not in group for group in optimizer.param_groups):
        raise UsageError(f"{named} has parameter groups without lr, which the schedule sets")
    step = inspect.signature(optimizer.step).parameters
    if "closure" not in step and not any(p.kind is p.VAR_KEYWORD for p in step.values()):
        raise UsageError(f"{named} has a step() without closure, which computes the loss and its gradients")


def _walk_down(name: str, options: Mapping[str, Any]) -> None:
    """Of the optimizer with these options, from 0 down an even slope: libraries do not check all of their ranges, and
    what lies outside ends in NaN there or climbs. Raises ValueError.
    """
    module = torch.nn.utils.skip_init(nn.Linear, 2, 2)  # draws no random numbers
    for parameter in module.parameters():
        parameter.data.zero_()
        parameter.grad = torch.ones_like(parameter)
    optimizer = register.optimizer[name](module, OptimConfig(), **options)
    for _ in range(STEPS_TRIED):
        optimizer.step()
    ends = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    if not ((ends <= 0) & ends.isfinite()).all():
        raise ValueError(f"{STEPS_TRIED} steps down a slope, begun at 0, end at {ends.max():.3g}")


register.optimizer.attempt = _walk_down


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """The trained parameters, with weight decay on matrices only.

    Norm scales and the constant experts' vectors are not matrices, though the latter are stacked; a module lists such
    parameter names in `no_weight_decay`.
    """
    exempt = {id(getattr(m, name, None)) for m in module.modules() for name in getattr(m, "no_weight_decay", ())}
    parameters = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim >= 2 and id(p) not in exempt]
    kept = [p for p in parameters if p.ndim < 2 or id(p) in exempt]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@register.optimizer("adamw")
def adamw(module: nn.Module, config: OptimConfig) -> Optimizer:
    return clipped_under_autocast(torch.optim.AdamW(parameter_groups(module, config), **_adam_options(config)))


@register.optimizer("muon")
def muon(
    module: nn.Module,
    config: OptimConfig,
    momentum: Momentum = 0.95,
    nesterov: bool = True,
    ns_steps: Annotated[int, Range(1, 99)] = 5,
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
) -> Optimizer:
    """Muon for the matrices between embedding and head, AdamW for the rest. By default the update has the size of
    AdamW's (arXiv 2502.16982), so that `optim.lr` means the same.
    """
    tokens = {id(m.weight) for name, m in module.named_modules() if _reads_or_writes_tokens(name, m)}
    options = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
    decayed, *kept = parameter_groups(module, config)
    groups = [
        {**decayed, "params": [p for p in decayed["params"] if id(p) not in tokens], "muon": options},
        {**decayed, "params": [p for p in decayed["params"] if id(p) in tokens]},
        *kept,
    ]
    return clipped_under_autocast(MuonAdamW([g for g in groups if g["params"]], **_adam_options(config)))


def _reads_or_writes_tokens(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) or (name.rpartition(".")[2] == "head" and isinstance(module, nn.Linear))


def _adam_options(config: OptimConfig) -> dict[str, Any]:
    return {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps, "fused": True}


def clipped_under_autocast(optimizer: Optimizer) -> Optimizer:
    """Lightning takes a fused optimizer for one that unscales gradients itself and refuses to clip under bf16-mixed,
    where there is no scaler.
    """
    optimizer._step_supports_amp_scaling = False
    return optimizer


def _from_torch(made: type[Optimizer]) -> Callable[..., Optimizer]:
    """`made` as a registered optimizer, with its own options but for what OptimConfig says."""

    def build(module: nn.Module, config: OptimConfig, **options: Any) -> Optimizer:
        return clipped_under_autocast(made(parameter_groups(module, config), lr=config.lr, **options))

    parameters = list(inspect.signature(made, eval_str=True).parameters.values())
    given = list(inspect.signature(build).parameters.values())[:2]
    own = [p for p in parameters if p.name not in (*SET_HERE, *NONE_OF_OURS)]
    own = [p.replace(annotation=Momentum) if p.name == "momentum" else p for p in own]
    build.__signature__ = inspect.Signature(given + [p.replace(kind=p.KEYWORD_ONLY) for p in own])
    return build


for _name in register.OPTIMIZERS:
    register.optimizer(_name)(_from_torch(getattr(torch.optim, _name)))
