"""Control of the router beside the gradient: selection biases and an adaptive loss weight.

State lives in buffers, so that checkpoints carry it. `step` is called once per optimizer step with the counts of all
its micro-batches and devices. Of a control's buffers the layer reads `bias_N`, which counts in the top-k choice, and
`multiplier`, which the balance loss is multiplied by. Shape suffixes: N all experts.
"""

import torch
from torch import Tensor, nn

from . import registry
from .balance import load_targets
from .registry import PartError
from .settings import BalanceConfig, ExpertCounts


@registry.control("loss_free")
@registry.control("longcat")
class SelectionBias(nn.Module):
    """A bias per expert that counts in the top-k choice only.

    `loss_free` (arXiv 2408.15664): b_i += rate * sign(target load - load_i), the targets in the ratio of an FFN
    expert's 1 to a zero-computation expert's 1 / tau. `longcat` (arXiv 2509.01322): b_i += rate * (K_e / (K N_FFN) -
    load_i) for FFN experts, 0 for the others. Loads are shares of all slots; after each step the rate is multiplied by
    its decay.
    """

    def __init__(self, config: BalanceConfig, counts: ExpertCounts):
        super().__init__()
        self.config, self.counts = config, counts
        self.register_buffer("bias_N", torch.zeros(counts.total))
        self.register_buffer("rate", torch.tensor(config.control_rate))

    def reset_parameters(self) -> None:
        self.bias_N.zero_()
        self.rate.fill_(self.config.control_rate)

    def step(self, chosen_N: Tensor, tokens: int) -> None:
        load_N = chosen_N / chosen_N.sum()
        if self.config.control == "loss_free":
            change_N = (load_targets(self.counts, self.config.tau, self.config.tau_of).to(load_N) - load_N).sign()
        else:
            top_k = chosen_N.sum() / tokens
            change_N = self.config.expected_ffn / (top_k * self.counts.ffn) - load_N
            change_N[self.counts.ffn :] = 0
        self.bias_N += self.rate * change_N
        self.rate *= self.config.control_decay


@registry.control("remoe")
class SparsityControl(nn.Module):
    """ReMoE's multiplier on the loss (arXiv 2412.14711): times 1 + rate where a token has more than `expected_ffn`
    active FFN experts on average, divided by it where fewer.
    """

    def __init__(self, config: BalanceConfig, counts: ExpertCounts):
        super().__init__()
        self.config, self.counts = config, counts
        self.register_buffer("multiplier", torch.ones(()))

    def reset_parameters(self) -> None:
        self.multiplier.fill_(1)

    def step(self, chosen_N: Tensor, tokens: int) -> None:
        excess = chosen_N[: self.counts.ffn].sum() / tokens - self.config.expected_ffn
        self.multiplier *= (1 + self.config.control_rate) ** excess.sign()


def build_control(config: BalanceConfig, counts: ExpertCounts) -> nn.Module | None:
    """Raises PartError where the control, somebody's own, is no module with `step` and `reset_parameters`."""
    if config.control is None:
        return None
    control = registry.control[config.control](config, counts, **config.control_options)
    if not isinstance(control, nn.Module):
        raise registry.control.unusable(config.control, control, "an nn.Module")
    for method in ("step", "reset_parameters"):
        if not hasattr(control, method):
            raise PartError(f"{registry.control.described(config.control)} has no {method}()")
    return control
