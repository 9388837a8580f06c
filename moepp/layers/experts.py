"""FFN experts, which cost a matrix product, and the other types of experts; the zero-computation ones cost next to
nothing.

A registered type is an AffineExperts, or any module that maps the rows of its tokens, `(x_RD, expert_R) -> y_RD` with
`expert_R` counting the experts of the type. Either is built from `(config, count)`.
Shape suffixes: T tokens, K top-k, R rows handed to experts, D model width, F hidden width, E FFN experts, C experts of
one other type, N all experts. Expert order is FFN, constant, copy, zero, then registered types.
"""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import registry
from .dispatch import LocalDispatcher, Meanwhile, SlotCounts
from .initial import draw
from .kernels.base import Affine, RoutedTokens, takes_triton
from .registry import PartError
from .router import Routing
from .settings import Backend, MoEConfig

Terms = tuple[Tensor | float, Tensor | None]  # of AffineExperts.terms


class FFNExperts(nn.Module):
    """E SwiGLU experts, stacked so that a strategy can slice dimension 0 and nothing else.

    `w_in` [E, 2F, D] holds the gate projection in its first F rows and the up projection in the others; `w_out` is
    [E, D, F]. The `dispatcher` decides where and by which kernel the rows are computed; a strategy replaces it, the
    layer never asks for a rank.
    """

    def __init__(self, experts: int, dim: int, hidden: int, backend: Backend = "auto"):
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(experts, 2 * hidden, dim))
        self.w_out = nn.Parameter(torch.empty(experts, dim, hidden))
        self.dispatcher = LocalDispatcher(backend)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        draw(self)

    def forward(
        self, tokens: RoutedTokens, counts: SlotCounts | None = None, meanwhile: Meanwhile | None = None
    ) -> Tensor:
        """Sum over k of gate * expert(x), plus what the other experts add, [T, D] in the gates' dtype."""
        return self.dispatcher(self.w_in, self.w_out, tokens, counts, meanwhile)


class AffineExperts(nn.Module):
    """Experts of one type whose output is a multiple of the input plus a mix of vectors, a x + b V: all types together
    are one affine map of the input, which the FFN experts' pass adds, nothing gathered.

    A type gives `terms`, and `vectors_CD` where it has vectors. C is the number of experts of the type.
    """

    def __init__(self, config: MoEConfig, count: int):
        super().__init__()
        self.count = count

    def reset_parameters(self) -> None:
        draw(self)

    def terms(self, x_TD: Tensor, dtype: torch.dtype) -> Terms:
        """a and b of every token and expert, chosen or not: a [T, C], or one number for all, and b [T, C], None without
        vectors. In `dtype`, which is the gates'.
        """
        raise NotImplementedError

    def vectors_CD(self) -> Tensor | None:
        """V, a vector for each expert."""
        return None


@registry.expert("zero")
class ZeroExperts(AffineExperts):
    """Nothing (Eq. 3)."""

    def terms(self, x_TD: Tensor, dtype: torch.dtype) -> Terms:
        return 0.0, None


@registry.expert("copy")
class CopyExperts(AffineExperts):
    """The input (Eq. 4)."""

    def terms(self, x_TD: Tensor, dtype: torch.dtype) -> Terms:
        return 1.0, None


@registry.expert("constant")
class ConstantExperts(AffineExperts):
    """The input mixed with a learned vector (Eq. 5): a_1 x + a_2 v, [a_1, a_2] = softmax(W_c x)."""

    no_weight_decay = ("vectors",)

    def __init__(self, config: MoEConfig, count: int):
        super().__init__(config, count)
        self.w_mix = nn.Parameter(torch.empty(2 * count, config.dim))  # W_c, two rows per expert
        self.vectors = nn.Parameter(torch.empty(count, config.dim))  # v
        self.reset_parameters()

    def terms(self, x_TD: Tensor, dtype: torch.dtype) -> Terms:
        mix_TC2 = F.linear(x_TD.to(dtype), self.w_mix.to(dtype)).unflatten(1, (self.count, 2)).softmax(-1)
        return mix_TC2.unbind(-1)

    def vectors_CD(self) -> Tensor:
        return self.vectors


@registry.expert("vector")
class VectorExperts(AffineExperts):
    """A learned vector alone: Eq. 5 without mixing, E(x) = v."""

    no_weight_decay = ("vectors",)

    def __init__(self, config: MoEConfig, count: int):
        super().__init__(config, count)
        self.vectors = nn.Parameter(torch.empty(count, config.dim))  # v
        self.reset_parameters()

    def terms(self, x_TD: Tensor, dtype: torch.dtype) -> Terms:
        return 0.0, torch.ones(x_TD.shape[0], self.count, dtype=dtype, device=x_TD.device)

    def vectors_CD(self) -> Tensor:
        return self.vectors


@registry.expert("scaled_copy")
class ScaledCopyExperts(AffineExperts):
    """The input times a learned number: E(x) = s x, s from 1."""

    no_weight_decay = ("factors",)

    def __init__(self, config: MoEConfig, count: int):
        super().__init__(config, count)
        self.factors = nn.Parameter(torch.empty(count))  # s
        self.initial = {"factors": nn.init.ones_}
        self.reset_parameters()

    def terms(self, x_TD: Tensor, dtype: torch.dtype) -> Terms:
        return self.factors.to(dtype).expand(x_TD.shape[0], -1), None


def module_name(kind: str) -> str:
    """What the layer calls the experts of a type: checkpoints know the constant ones by another name."""
    return {"constant": "zero_computation"}.get(kind, f"{kind}_experts")


def one_affine(types: dict[str, AffineExperts], ids: dict[str, range], routing: Routing, terms: list[Terms]) -> Affine:
    """All types as one map; `terms` are those of each, `ids` those of all types but FFN."""
    gates = gates_by_type(routing, ids)
    scales, mixes, vectors = [], [], []
    for (kind, experts), given in zip(types.items(), terms, strict=True):
        if not (isinstance(given, tuple) and len(given) == 2):
            raise registry.expert.unusable(kind, given, "a pair, a and b", "gave terms")
        (a, b_TC), gate_TC = given, gates[kind]
        for name, term in (("a", a), ("b", b_TC)):
            if isinstance(term, Tensor) and term.ndim:
                _refuse_others(kind, f"term {name}", term, gate_TC)
        if isinstance(a, Tensor):
            scales.append((gate_TC * a).sum(1))
        elif a:
            scales.append(gate_TC.sum(1) if a == 1 else a * gate_TC.sum(1))
        if b_TC is not None:
            vectors_CD = experts.vectors_CD()
            if vectors_CD is None:
                raise PartError(f"{registry.expert.described(kind)} gave a term b; vectors_CD() is needed for it")
            mixes.append(gate_TC * b_TC)
            vectors.append(vectors_CD.to(gate_TC.dtype))
    scale_T = reduce(torch.add, scales) if scales else routing.gate_TK.new_zeros(routing.gate_TK.shape[0])
    return Affine(scale_T, *((_joined(mixes, 1), _joined(vectors, 0)) if mixes else ()))


def fused_affine(types: dict[str, AffineExperts], ids: dict[str, range], routing: Routing, x_TD: Tensor) -> Affine:
    """The same of the paper's types, where `fusible`."""
    from .kernels.triton_affine import AffineIds, AffineSums

    chosen, constant = AffineIds(ids.get("copy", range(0)), ids["constant"]), types["constant"]
    sums = AffineSums.apply(x_TD, constant.w_mix, routing.gate_TK, routing.expert_TK, chosen)
    return Affine(*sums, constant.vectors_CD().to(routing.gate_TK.dtype))


def fusible(types: dict[str, AffineExperts], gate_TK: Tensor) -> bool:
    """Whether Triton kernels read the slots and the input of all types at once: for the paper's, on a device that they
    are for, unless torch.compile fuses what is there in their place.
    """
    of_paper = (ZeroExperts, CopyExperts, ConstantExperts)
    if not ("constant" in types and all(type(experts) in of_paper for experts in types.values())):
        return False
    return takes_triton(gate_TK)


def gates_by_type(routing: Routing, ids: dict[str, range]) -> dict[str, Tensor]:
    """Every token's gates of each type's experts, [T, C], 0 where not chosen."""
    ranges = [*ids.values()]
    first, total = ranges[0].start, ranges[-1].stop
    gate_TN = routing.gate_TK.new_zeros(routing.gate_TK.shape[0], total + 1)  # column N takes dropped slots
    gate_TN = gate_TN.scatter_add(1, routing.expert_TK, routing.gate_TK)
    return dict(zip(ids, gate_TN[:, first:total].split([len(each) for each in ranges], 1), strict=True))


def _refuse_others(kind: str, what: str, given: Tensor, like: Tensor) -> None:
    """Raises PartError where experts, somebody's own, give another shape than `like` has."""
    if not isinstance(given, Tensor) or given.shape != like.shape:
        shape = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise PartError(f"{registry.expert.described(kind)} gave {what} {shape}; {list(like.shape)} is needed")


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def add_rows(y_TD: Tensor, x_TD: Tensor, routing: Routing, ids: range, kind: str, experts: nn.Module) -> Tensor:
    """`y_TD` and the gated outputs of a type that is not affine, computed for the rows of its slots alone."""
    expert_TK = routing.expert_TK
    token_R, slot_R = ((expert_TK >= ids.start) & (expert_TK < ids.stop)).nonzero(as_tuple=True)
    x_RD = x_TD[token_R]
    y_RD = experts(x_RD, expert_TK[token_R, slot_R] - ids.start)
    _refuse_others(kind, "output", y_RD, x_RD)
    return y_TD.index_add(0, token_R, (routing.gate_TK[token_R, slot_R, None] * y_RD).to(y_TD.dtype))
