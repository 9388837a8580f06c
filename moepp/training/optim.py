"""AdamW and the learning-rate schedules."""

import math

import torch
from torch import nn

from moepp.training.settings import OptimConfig


def learning_rate_scale(step: int, steps: int, config: OptimConfig) -> float:
    """The factor on `lr` for the update after `step` finished steps, of `steps` in all.

    Linear warm-up, then `cosine` to the final share, or `wsd`: constant, then linear decay over the last `decay_share`
    of the run.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    final = config.final_lr_share
    if config.schedule == "wsd":
        decay_steps = max(1, round(steps * config.decay_share))
        return 1 - (1 - final) * min(1.0, max(0.0, (step - (steps - decay_steps)) / decay_steps))
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only.

    Norm scales and the constant experts' vectors are not matrices, though the latter are stacked; a module lists such
    parameter names in `no_weight_decay`.
    """
    exempt = {id(getattr(m, name, None)) for m in module.modules() for name in getattr(m, "no_weight_decay", ())}
    parameters = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim >= 2 and id(p) not in exempt]
    kept = [p for p in parameters if p.ndim < 2 or id(p) in exempt]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    # Lightning takes a fused optimizer for one that unscales gradients itself and refuses to clip under bf16-mixed,
    # where there is no scaler.
    optimizer._step_supports_amp_scaling = False
    return optimizer
