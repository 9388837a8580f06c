"""What a layer can be told, and what cannot go together. Read without torch, so that a sweep is planned, started and
looked at by processes that never load it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from . import registry
from .bounds import Bounded, Count, Positive, Range, Share, Weight, Whole

Backend = Literal["auto", "sorted", "grouped", "triton"]
TOP_K_SELECTIONS = ("top_k", "sigmoid")  # those that choose `top_k` experts for every token


@dataclass
class ExpertCounts(Bounded, key="experts"):
    """How many experts of each type a layer has. All three zero-computation counts at 0 is a vanilla MoE.

    `others` holds the counts of registered types. They are weighed and limited as zero-computation experts are (Eq. 7
    and 8), and counted among them.
    """

    ffn: Count = 8  # SwiGLU experts, which compute
    zero: Whole = 1  # give nothing
    copy: Whole = 1  # give their input
    constant: Whole = 2  # give a mix of their input and a learnt vector
    shared: Whole = 0  # FFN experts that every token passes, outside routing (DeepSeekMoE); not in `total`
    others: dict[str, Whole] = field(default_factory=dict)  # of registered types, by name

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind in self.others:
            if kind in (*self.built_in, "shared"):
                raise ValueError(f"experts.others.{kind} is one of the package's own types: set experts.{kind}")
            registry.expert.check_name(kind)

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
class BalanceConfig(Bounded, key="balance"):
    """How the load is balanced. `tau` in (0, 1] is the weight of a zero-computation expert against 1 for an FFN
    expert; docs/methods.md says which keys make which published method.

    `over` is the batch that f of Eq. 7 counts: one sequence (the loss is then the mean of theirs), one device's
    micro-batch, the micro-batch over all devices, or all of an optimizer step. A step of several micro-batches learns
    what it would as one batch only over `step`, which takes a forward pass more of each. Capacity (Eq. 8) has a scope
    of its own, `capacity_over`. Where neither needs them, no layer waits for the counts of other devices.
    """

    tau: Share = 0.75  # weight of a zero-computation expert in the balance loss and in capacities, 1 for an FFN expert
    tau_of: dict[str, Share] = field(default_factory=dict)  # of single types in place of tau: {zero: 0.5}
    # the batch whose shares the balance loss counts
    over: Literal["sequence", "micro_batch", "global_batch", "step"] = "step"
    beta: Weight = 0.01  # weight of the balance loss
    form: str = "switch"  # paper, switch, null_averaged, grouped, or a registered one
    options: dict[str, Any] = field(default_factory=dict)  # of a registered form
    expected_ffn: Positive | None = None  # FFN experts per token that `grouped`, `longcat` and `remoe` aim at
    z_loss: Weight = 0.0  # weight of the mean squared log-sum-exp of the logits
    entropy_loss: Weight = 0.0  # weight of the router's mean entropy
    control: str | None = None  # acts beside the gradient: loss_free, longcat, remoe, or a registered one
    control_options: dict[str, Any] = field(default_factory=dict)  # of a registered control
    control_rate: Annotated[float, Range(0, 1)] = 1e-3  # how fast a control moves its bias
    control_decay: Share = 1.0  # factor on a bias's rate after every optimizer step

    def __post_init__(self) -> None:
        super().__post_init__()
        registry.balance.check(self.form, self.options)
        if self.control is not None:
            registry.control.check(self.control, self.control_options)
        elif self.control_options:
            raise ValueError(f"balance.control_options={self.control_options} are of no control: set balance.control")
        if self.aims_at_expected_ffn and self.expected_ffn is None:
            user = self.control if self.control in ("longcat", "remoe") else self.form
            raise ValueError(f"balance.expected_ffn={self.expected_ffn}: {user} aims at it, set it above 0")

    @property
    def aims_at_expected_ffn(self) -> bool:
        return self.form == "grouped" or self.control in ("longcat", "remoe")


def load_weights(counts: ExpertCounts, tau: float, tau_of: Mapping[str, float] | None = None) -> dict[str, float]:
    """What an expert of each type gets in a balanced layer, in ratios: tau for an FFN expert to 1 for any other, and
    tau / tau_of to 1 for a type with a weight of its own (Eq. 7 is least where loads are as 1 / eta).
    """
    own = tau_of or {}
    return {kind: tau if kind == "ffn" else tau / own.get(kind, tau) for kind in counts.by_kind()}


def total_weight(counts: ExpertCounts, weights: Mapping[str, float]) -> float:
    """The sum of `load_weights` over all experts."""
    by_kind = counts.by_kind()
    return weights["ffn"] * counts.ffn + sum(weights[kind] * n for kind, n in by_kind.items() if kind != "ffn")


def ffn_share(counts: ExpertCounts, tau: float, tau_of: Mapping[str, float] | None = None) -> float:
    """The share of all routed slots that a balanced layer sends to FFN experts: tau N_FFN / (tau N_FFN + N_ZC) (Table
    1).
    """
    weights = load_weights(counts, tau, tau_of)
    return tau * counts.ffn / total_weight(counts, weights)


@dataclass
class MoEConfig(Bounded):
    """One MoE++ layer, or that of another method: docs/methods.md says which keys make which."""

    dim: Count = 128  # width of the residual stream
    hidden: Count = 256  # of each FFN expert; a SwiGLU expert has 3 * dim * hidden parameters
    experts: ExpertCounts = field(default_factory=ExpertCounts)
    expert_options: dict[str, Any] = field(default_factory=dict)  # of registered expert types, each below its name
    selection: str = "top_k"  # top_k, sigmoid (its scores), top_p, relu, or a registered one; top_p and relu choose
    # any number of experts
    selection_options: dict[str, Any] = field(default_factory=dict)  # of a registered selection
    top_k: Count = 2  # experts per token
    # node-limited routing (DeepSeek-V3, arXiv 2412.19437): FFN experts in so many equal groups, those of a node say
    expert_groups: Count = 1
    groups_per_token: Count = 1  # whose FFN experts a token may choose; zero-computation experts are on every device
    top_p: Share = 0.4  # cumulative probability that selection=top_p reaches
    gate: str = "released"  # released, softmax, renormalized, or a registered form
    gate_options: dict[str, Any] = field(default_factory=dict)  # scale, of softmax and renormalized; of registered ones
    # std to which a token's logits are scaled before the softmax; released 7B: 1.0
    logits_norm: Annotated[float, Range(above=0, most=100)] | None = None
    # added to the logits of zero-computation experts: more of it, less FFN compute
    zero_computation_bias: Annotated[float, Range(-100, 100)] = 0.0
    gating_residual: bool = True  # the router adds a learnt map of the logits of the layer before (Eq. 6)
    residual_detached: bool = False  # no gradient goes through the carried logits to earlier layers
    residual_init: Literal["normal", "identity"] = "normal"  # of W_g
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    capacity_factor: Positive | None = 1.1  # in training only; null is dropless
    # the batch that an expert's capacity is of: a sequence, a device's micro-batch, or the micro-batch over all devices
    capacity_over: Literal["sequence", "micro_batch", "global_batch"] = "global_batch"
    # which slots stay: first choices of all tokens, then the batch's order; or those with the highest score (Megatron's
    # default)
    drop_order: Literal["position", "probability"] = "position"
    # FFN rows per token that a training step keeps for its backward pass; what a batch needs beyond them is computed
    # apart, and again in backward; null keeps all there can be
    ffn_rows: Positive | None = None
    router: str = "linear"  # linear, two_layer, shared_null, recurrent, or a registered one
    router_options: dict[str, Any] = field(default_factory=dict)  # of a registered router
    router_width: Count = 128  # of the recurrent router's state
    multiply_by_top_k: bool = False  # experts see top_k * x, as released code does without its no_mul_topk flag
    backend: Backend = "auto"  # kernel of the FFN experts; changes speed and rounding, nothing else

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_parts()
        experts = self.experts
        if not 1 <= self.top_k <= experts.total:
            counts = ", ".join(f"{kind} {count}" for kind, count in experts.by_kind().items())
            raise ValueError(f"top_k={self.top_k} must lie between 1 and the {experts.total} experts ({counts})")
        for impossible, reason in _conflicts(self):
            if impossible:
                raise ValueError(reason)

    def _check_parts(self) -> None:
        registry.router.check(self.router, self.router_options)
        registry.selection.check(self.selection, self.selection_options)
        registry.gate.check(self.gate, self.gate_options)
        for kind in self.balance.tau_of:
            if kind == "ffn" or kind not in self.experts.by_kind():
                others = ", ".join(other for other in self.experts.by_kind() if other != "ffn")
                raise ValueError(f"balance.tau_of.{kind}: choose from the zero-computation types {others}")
        for kind in self.experts.others | self.expert_options:
            registry.expert.check(kind, self.expert_options.get(kind, {}))


def _conflicts(config: MoEConfig) -> list[tuple[bool, str]]:
    """Every pair of keys that cannot go together: whether it does, and what to change."""
    experts, balance = config.experts, config.balance
    variable, shared_null = config.selection in ("top_p", "relu"), config.router == "shared_null"
    no_zero_computation = experts.zero_computation == 0
    groups, reachable = config.expert_groups, config.groups_per_token * experts.ffn // config.expert_groups
    return [
        (
            groups > 1 and config.selection not in TOP_K_SELECTIONS,
            f"expert_groups={groups} limits a top-k choice, which selection={config.selection} is not: set"
            " expert_groups=1",
        ),
        (
            experts.ffn % groups > 0,
            f"expert_groups={groups} must divide experts.ffn={experts.ffn}",
        ),
        (
            config.groups_per_token > groups,
            f"groups_per_token={config.groups_per_token} must not exceed expert_groups={groups}",
        ),
        (
            groups > 1 and config.top_k > reachable + experts.zero_computation,
            f"top_k={config.top_k} needs more experts than the {reachable} of groups_per_token="
            f"{config.groups_per_token} and {experts.zero_computation} zero-computation ones",
        ),
        (
            config.residual_init != "normal" and not config.gating_residual,
            f"residual_init={config.residual_init} is of the gating residual: set gating_residual=true",
        ),
        (
            config.residual_detached and not config.gating_residual,
            "residual_detached=true is of the gating residual: set gating_residual=true",
        ),
        (
            config.zero_computation_bias != 0 and no_zero_computation,
            f"zero_computation_bias={config.zero_computation_bias} needs zero-computation experts: set experts.zero,"
            " copy or constant above 0",
        ),
        (
            config.logits_norm is not None and experts.total < 2,
            f"logits_norm={config.logits_norm} needs two experts, since one logit has no spread: set it to null",
        ),
        (
            bool(balance.tau_of) and balance.form == "grouped",
            "balance.form=grouped has no tau: leave balance.tau_of out",
        ),
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
            config.capacity_over != "global_batch" and config.capacity_factor is None,
            f"capacity_over={config.capacity_over} limits nothing without a capacity: set capacity_factor",
        ),
        (
            config.drop_order != "position" and config.capacity_factor is None,
            f"drop_order={config.drop_order} drops nothing without a capacity: set capacity_factor",
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
            balance.control == "remoe" and balance.expected_ffn >= experts.ffn,
            f"balance.expected_ffn={balance.expected_ffn} must be less than experts.ffn={experts.ffn}",
        ),
        (
            balance.control == "remoe" and balance.beta == 0,
            "balance.control=remoe multiplies balance.beta, which is 0: set it above 0",
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
