"""What a layer can be told, and what cannot go together. Read without torch, so that a sweep is planned, started and
looked at by processes that never load it.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from . import registry

Backend = Literal["auto", "sorted", "grouped", "triton"]


@dataclass
class ExpertCounts:
    """How many experts of each type a layer has. All three zero-computation counts at 0 is a vanilla MoE.

    `others` holds the counts of registered types. They are weighed and limited as zero-computation experts are (Eq. 7
    and 8), and counted among them.
    """

    ffn: int = 8
    zero: int = 1
    copy: int = 1
    constant: int = 2
    shared: int = 0  # FFN experts that every token passes, outside routing (DeepSeekMoE); not in `total`
    others: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind in self.others:
            if kind in (*self.built_in, "shared"):
                raise ValueError(f"experts.others.{kind} is one of the package's own types: set experts.{kind}")
            registry.expert.check_name(kind)
        for name, count in {**self.by_kind(), "shared": self.shared}.items():
            if count < 0:
                raise ValueError(f"experts.{name}={count} must not be negative")
        if self.ffn < 1:
            raise ValueError("experts.ffn must be at least 1")

    @property
    def built_in(self) -> dict[str, int]:
        return {"ffn": self.ffn, "constant": self.constant, "copy": self.copy, "zero": self.zero}

    @property
    def zero_computation(self) -> int:
        return self.total - self.ffn

    @property
    def total(self) -> int:
        return sum(self.by_kind().values())

    def by_kind(self) -> dict[str, int]:
        """The number of routed experts of each type, in expert order."""
        return self.built_in | self.others

    def ids(self, kind: str) -> range:
        """The ids of the experts of that type."""
        kinds = self.kinds()
        return range(start := kinds.index(kind), start + kinds.count(kind)) if kind in kinds else range(0)

    def kinds(self) -> list[str]:
        """The type of every expert, in expert order."""
        return [kind for kind, count in self.by_kind().items() for _ in range(count)]


@dataclass
class BalanceConfig:
    """How the load is balanced. `tau` in (0, 1] is the weight of a zero-computation expert against 1 for an FFN
    expert; docs/methods.md says which keys make which published method.
    """

    tau: float = 0.75
    beta: float = 0.01
    form: str = "switch"  # paper, switch, null_averaged, grouped, or a registered one
    options: dict[str, Any] = field(default_factory=dict)  # of a registered form
    expected_ffn: float | None = None  # FFN experts per token that `grouped`, `longcat` and `remoe` aim at
    z_loss: float = 0.0  # weight of the mean squared log-sum-exp of the logits
    entropy_loss: float = 0.0  # weight of the router's mean entropy
    control: str | None = None  # acts beside the gradient: loss_free, longcat, remoe, or a registered one
    control_options: dict[str, Any] = field(default_factory=dict)  # of a registered control
    control_rate: float = 1e-3
    control_decay: float = 1.0  # factor on a bias's rate after every optimizer step

    def __post_init__(self) -> None:
        registry.balance.check(self.form, self.options)
        if self.control is not None:
            registry.control.check(self.control, self.control_options)
        if not 0 < self.tau <= 1:
            raise ValueError(f"balance.tau={self.tau} must lie in (0, 1]")
        for name in ("beta", "z_loss", "entropy_loss", "control_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"balance.{name}={getattr(self, name)} must not be negative")
        if not 0 < self.control_decay <= 1:
            raise ValueError(f"balance.control_decay={self.control_decay} must lie in (0, 1]")
        if self.aims_at_expected_ffn and not (self.expected_ffn and self.expected_ffn > 0):
            user = self.control if self.control in ("longcat", "remoe") else self.form
            raise ValueError(f"balance.expected_ffn={self.expected_ffn}: {user} aims at it, set it above 0")

    @property
    def aims_at_expected_ffn(self) -> bool:
        return self.form == "grouped" or self.control in ("longcat", "remoe")


def ffn_share(counts: ExpertCounts, tau: float) -> float:
    """The share of all routed slots that a balanced layer sends to FFN experts: tau N_FFN / (tau N_FFN + N_ZC) (Table
    1).
    """
    return tau * counts.ffn / (tau * counts.ffn + counts.zero_computation)


@dataclass
class MoEConfig:
    """One MoE++ layer, or that of another method: docs/methods.md says which keys make which."""

    dim: int = 128
    hidden: int = 256  # of each FFN expert; a SwiGLU expert has 3 * dim * hidden parameters
    experts: ExpertCounts = field(default_factory=ExpertCounts)
    expert_options: dict[str, Any] = field(default_factory=dict)  # of registered expert types, each below its name
    selection: str = "top_k"  # top_k, top_p, relu, or a registered one; top_p and relu choose any number of experts
    selection_options: dict[str, Any] = field(default_factory=dict)  # of a registered selection
    top_k: int = 2
    top_p: float = 0.4  # cumulative probability that selection=top_p reaches
    gate: str = "released"  # released, softmax, renormalized, or a registered form
    gate_options: dict[str, Any] = field(default_factory=dict)  # of a registered form
    logits_norm: float | None = None  # std to which a token's logits are scaled before the softmax; released 7B: 1.0
    gating_residual: bool = True
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    capacity_factor: float | None = 1.1  # in training only; null is dropless
    ffn_rows: float | None = None  # FFN rows per token that a training step keeps for its backward pass; what a batch
    # needs beyond them is computed apart, and again in backward; null keeps all there can be
    router: str = "linear"  # linear, two_layer, shared_null, recurrent, or a registered one
    router_options: dict[str, Any] = field(default_factory=dict)  # of a registered router
    router_width: int = 128  # of the recurrent router's state
    multiply_by_top_k: bool = False  # experts see top_k * x, as released code does without its no_mul_topk flag
    backend: Backend = "auto"  # kernel of the FFN experts; changes speed and rounding, nothing else

    def __post_init__(self) -> None:
        self._check_parts()
        experts = self.experts
        if not 1 <= self.top_k <= experts.total:
            counts = ", ".join(f"{kind} {count}" for kind, count in experts.by_kind().items())
            raise ValueError(f"top_k={self.top_k} must lie between 1 and the {experts.total} experts ({counts})")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ValueError(f"capacity_factor={self.capacity_factor} must be positive, or null for dropless")
        if self.logits_norm is not None and self.logits_norm <= 0:
            raise ValueError(f"logits_norm={self.logits_norm} must be positive, or null for plain logits")
        if self.ffn_rows is not None and not 0 < self.ffn_rows < math.inf:
            raise ValueError(f"ffn_rows={self.ffn_rows} must be positive, or null for as many as there can be")
        if self.router_width < 1:
            raise ValueError(f"router_width={self.router_width} must be at least 1")
        for impossible, reason in _conflicts(self):
            if impossible:
                raise ValueError(reason)

    def _check_parts(self) -> None:
        registry.router.check(self.router, self.router_options)
        registry.selection.check(self.selection, self.selection_options)
        registry.gate.check(self.gate, self.gate_options)
        for kind in self.experts.others | self.expert_options:
            registry.expert.check(kind, self.expert_options.get(kind, {}))


def _conflicts(config: MoEConfig) -> list[tuple[bool, str]]:
    """Every pair of keys that cannot go together: whether it does, and what to change."""
    experts, balance = config.experts, config.balance
    variable, shared_null = config.selection in ("top_p", "relu"), config.router == "shared_null"
    no_zero_computation = experts.zero_computation == 0
    return [
        (
            config.gating_residual and config.router in ("shared_null", "recurrent"),
            f"router={config.router} carries no logits from layer to layer: set gating_residual=false",
        ),
        (shared_null and not experts.zero, "router=shared_null needs null experts: set experts.zero above 0"),
        (
            config.capacity_factor is not None and (variable or shared_null),
            f"{'selection=' + config.selection if variable else 'router=shared_null'} gives experts no fixed share of"
            " slots, so Eq. 8 gives no capacity: set capacity_factor=null",
        ),
        (
            balance.form in ("null_averaged", "grouped") and no_zero_computation,
            f"balance.form={balance.form} needs zero-computation experts: set experts.zero, copy or constant above 0",
        ),
        (
            balance.control == "longcat" and no_zero_computation,
            "balance.control=longcat needs zero-computation experts: set experts.zero, copy or constant above 0",
        ),
        (
            balance.control in ("loss_free", "longcat") and variable,
            f"balance.control={balance.control} biases a top-k choice: set selection=top_k",
        ),
        (
            balance.form == "grouped" and variable,
            "balance.form=grouped shares out a fixed number of slots: set selection=top_k",
        ),
        (
            balance.aims_at_expected_ffn and not variable and balance.expected_ffn >= config.top_k,
            f"balance.expected_ffn={balance.expected_ffn} must be less than top_k={config.top_k}",
        ),
        (
            balance.control == "remoe" and config.selection != "relu",
            "balance.control=remoe steers how many ReLU scores are positive: set selection=relu",
        ),
        (
            config.selection == "relu" and balance.entropy_loss > 0,
            "selection=relu has no probabilities: set balance.entropy_loss=0",
        ),
    ]
