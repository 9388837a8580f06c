"""The whole layer in four Triton kernels forward, and backward by hand: nothing is gathered into memory.

Forward: rows are read where the tokens lie, through both SwiGLU projections at once, then through w_out; one pass then
sums each token's rows onto what its zero-computation experts add. Backward keeps [gate, up] of every row and recomputes
the rest. Never waits for the host and uses no atomics. bfloat16, float16 and float32; any widths.

Shape suffixes as in experts.py; S = T*K rows, M tiles of rows.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moepp.layers.kernels.grouped import BackendError, SlotPlan, plan_slots

if TYPE_CHECKING:
    from moepp.layers.experts import Affine

# Chosen for Hopper's shared memory and registers, not measured: two float32 accumulators of BLOCK_M x BLOCK_N in the
# first kernel. BLOCK_K is the step along the summed dimension.
BLOCKS = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64}
LAUNCH = {"num_warps": 8, "num_stages": 3}
COMBINE = {"BLOCK_T": 16, "BLOCK_D": 256}


@dataclass
class TilePlan:
    """Each tile computes rows from `start_M` on, before `end_M`, of expert `expert_M`; E marks a tile without rows."""

    expert_M: Tensor
    start_M: Tensor
    end_M: Tensor


def plan_tiles(plan: SlotPlan) -> TilePlan:
    """Tiles of at most BLOCK_M rows, none across two experts; their number is the most that any routing needs."""
    experts, slots, size = len(plan.end_E), len(plan.slot_S), BLOCKS["BLOCK_M"]
    start_E = torch.nn.functional.pad(plan.end_E, (1, 0))[:-1]
    tiles_E = (plan.end_E - start_E + size - 1) // size
    last_E = tiles_E.cumsum(0, dtype=torch.int32)
    tile_M = torch.arange(-(-slots // size) + experts, device=last_E.device, dtype=torch.int32)
    expert_M = torch.searchsorted(last_E, tile_M, right=True, out_int32=True)
    owner_M = expert_M.clamp(max=experts - 1)
    start_M = start_E[owner_M] + (tile_M - (last_E - tiles_E)[owner_M]) * size
    return TilePlan(expert_M, start_M, plan.end_E[owner_M])


def dispatch(
    w_in: Tensor, w_out: Tensor, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor, others: "Affine | None",
    sizes: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """The dispatcher's map (dispatch.py); rows are multiplied in the weights' dtype, summed in the gates'."""
    kernels = load_kernels(w_in)
    affine = (None, None, None) if others is None else (others.scale_T, others.mix_TC, others.vectors_CD)
    plan = plan_slots(expert_TK, len(w_in))
    return FusedExperts.apply(w_in, w_out, x_TD, gate_TK, *affine, Launcher(kernels, plan, plan_tiles(plan)))


def load_kernels(w_in: Tensor) -> ModuleType:
    """The kernels' module; BackendError where they cannot run on these weights."""
    try:
        import triton

        from moepp.layers.kernels import triton_kernels
    except ImportError:
        raise BackendError(
            "backend=triton needs the package triton (pip install triton); or choose backend=auto"
        ) from None
    if not w_in.is_cuda and not triton.knobs.runtime.interpret:
        raise BackendError("backend=triton needs a GPU; choose backend=auto (TRITON_INTERPRET=1 emulates one, slowly)")
    if w_in.dtype == torch.float64:
        raise BackendError("backend=triton does not compute in float64; choose backend=sorted")
    return triton_kernels


class FusedExperts(torch.autograd.Function):
    """out = scale x + mix V + sum over k of gate_k expert_k(x), [T, D] in the gates' dtype."""

    @staticmethod
    def forward(
        ctx: Any, w_in: Tensor, w_out: Tensor, x_TD: Tensor, gate_TK: Tensor,
        scale_T: Tensor | None, mix_TC: Tensor | None, vectors_CD: Tensor | None, launch: "Launcher",
    ) -> Tensor:  # fmt: skip
        w_in, w_out, x_rows_TD = w_in.contiguous(), w_out.contiguous(), x_TD.to(w_in.dtype).contiguous()
        z_S2F, h_SF = launch.swiglu_in(x_rows_TD, w_in, save_z=any(ctx.needs_input_grad))
        y_SD = launch.rows_matmul(h_SF, w_out.transpose(1, 2))
        ctx.save_for_backward(w_in, w_out, x_TD, x_rows_TD, gate_TK, scale_T, mix_TC, vectors_CD, z_S2F)
        ctx.launch = launch
        return launch.combine(y_SD, gate_TK, x_TD, scale_T, mix_TC, vectors_CD, gate_TK.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        w_in, w_out, x_TD, x_rows_TD, gate_TK, scale_T, mix_TC, vectors_CD, z_S2F = ctx.saved_tensors
        launch, grad_TD = ctx.launch, grad_TD.contiguous()
        grad_rows_TD = grad_TD.to(w_in.dtype)
        dz_S2F, gated_h_SF, dgate_TK = launch.swiglu_out_backward(grad_rows_TD, w_out, z_S2F, gate_TK)
        dx_SD = launch.rows_matmul(dz_S2F, w_in)
        dx_TD = launch.combine(dx_SD, None, grad_TD, scale_T, None, None, x_TD.dtype)
        dw_in = launch.rows_outer(dz_S2F, x_rows_TD, gather="b", like=w_in)
        dw_out = launch.rows_outer(grad_rows_TD, gated_h_SF, gather="a", like=w_out)
        dscale_T = None if scale_T is None else (grad_TD * x_TD).sum(-1)
        dmix_TC = None if mix_TC is None else grad_TD @ vectors_CD.t()
        dvectors_CD = None if mix_TC is None else mix_TC.t() @ grad_TD
        return dw_in, dw_out, dx_TD, dgate_TK, dscale_T, dmix_TC, dvectors_CD, None


@dataclass
class Launcher:
    """The kernels with one routing's plan; every method allocates its outputs and fills their served rows."""

    kernels: ModuleType
    plan: SlotPlan
    tiles: TilePlan

    @property
    def top_k(self) -> int:
        return self.plan.row_TK.shape[1]

    def tile_arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.tiles.expert_M, self.tiles.start_M, self.tiles.end_M

    def grid(self, columns: int) -> tuple[int, int]:
        """Blocks of columns vary fastest, so that neighbours read the same rows."""
        return -(-columns // BLOCKS["BLOCK_N"]), len(self.tiles.expert_M)

    def swiglu_in(self, x_TD: Tensor, w_in: Tensor, save_z: bool) -> tuple[Tensor | None, Tensor]:
        """([gate, up] [S, 2F] or None, h [S, F])."""
        experts, width, dim = w_in.shape
        hidden, rows = width // 2, len(self.plan.slot_S)
        z_S2F = x_TD.new_empty(rows, width) if save_z else None
        h_SF = x_TD.new_empty(rows, hidden)
        self.kernels.swiglu_in_kernel[self.grid(hidden)](
            x_TD, w_in, z_S2F, h_SF, self.plan.slot_S, *self.tile_arguments(), dim, hidden, experts,
            TOP_K=self.top_k, SAVE_Z=save_z, PRECISION=precision(), **BLOCKS, **LAUNCH,
        )  # fmt: skip
        return z_S2F, h_SF

    def rows_matmul(self, a_SK: Tensor, b_EKN: Tensor) -> Tensor:
        """a[r] b[e] for every row r of every expert e, [S, N]; b is contiguous or the transpose of such a tensor."""
        experts, inner, columns = b_EKN.shape
        c_SN = a_SK.new_empty(len(a_SK), columns)
        self.kernels.rows_matmul_kernel[self.grid(columns)](
            a_SK, b_EKN, c_SN, *self.tile_arguments(), columns, inner, experts, b_EKN.stride(2), b_EKN.stride(1),
            PRECISION=precision(), **BLOCKS, **LAUNCH,
        )  # fmt: skip
        return c_SN

    def combine(
        self, y_SD: Tensor, gate_TK: Tensor | None, x_TD: Tensor, scale_T: Tensor | None,
        mix_TC: Tensor | None, vectors_CD: Tensor | None, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """scale x + mix V + the sum of each token's rows, each times its gate if there are gates; [T, D] in `dtype`."""
        tokens, dim = x_TD.shape
        out_TD = x_TD.new_empty(tokens, dim, dtype=dtype)
        grid = -(-dim // COMBINE["BLOCK_D"]), -(-tokens // COMBINE["BLOCK_T"])
        inputs = [None if t is None else t.contiguous() for t in (gate_TK, x_TD, scale_T, mix_TC, vectors_CD)]
        self.kernels.combine_kernel[grid](
            y_SD, self.plan.row_TK, self.plan.end_E, *inputs, out_TD, tokens, dim,
            EXPERTS=len(self.plan.end_E), TOP_K=self.top_k, C=0 if mix_TC is None else mix_TC.shape[1],
            GATED=gate_TK is not None, SCALED=scale_T is not None, **COMBINE,
        )  # fmt: skip
        return out_TD

    def swiglu_out_backward(
        self, grad_TD: Tensor, w_out: Tensor, z_S2F: Tensor, gate_TK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of [gate, up] [S, 2F], gate * h [S, F], and the gates' gradient [T, K]."""
        experts, dim, hidden = w_out.shape
        dz_S2F, gated_h_SF = torch.empty_like(z_S2F), z_S2F.new_empty(len(z_S2F), hidden)
        grid = self.grid(hidden)
        dgate_SB = gate_TK.new_empty(len(z_S2F), grid[0])
        self.kernels.swiglu_out_backward_kernel[grid](
            grad_TD, w_out, z_S2F, gate_TK.contiguous(), self.plan.slot_S, dz_S2F, gated_h_SF, dgate_SB,
            *self.tile_arguments(), dim, hidden, experts,
            TOP_K=self.top_k, PRECISION=precision(), **BLOCKS, **LAUNCH,
        )  # fmt: skip
        dgate_TK = torch.where(self.plan.served_TK, dgate_SB.sum(1)[self.plan.row_TK], 0)
        return dz_S2F, gated_h_SF, dgate_TK

    def rows_outer(self, a: Tensor, b: Tensor, gather: str, like: Tensor) -> Tensor:
        """Each expert's sum over its rows of a^T b, in the shape [E, A, B] of `like`; `gather` names the operand in
        token order.
        """
        c_EAB = torch.empty_like(like)
        experts, rows, columns = like.shape
        grid = -(-columns // BLOCKS["BLOCK_N"]), -(-rows // BLOCKS["BLOCK_M"]), experts
        self.kernels.rows_outer_kernel[grid](
            a, b, c_EAB, self.plan.slot_S, self.plan.end_E, rows, columns,
            TOP_K=self.top_k, GATHER_A=gather == "a", GATHER_B=gather == "b", PRECISION=precision(), **BLOCKS, **LAUNCH,
        )  # fmt: skip
        return c_EAB


def precision() -> str:
    """How float32 operands are multiplied, as torch's own products are; says nothing about 16-bit operands."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
