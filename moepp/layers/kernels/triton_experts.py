"""The whole layer in four Triton kernels forward, and backward by hand: nothing is gathered into memory.

Forward: rows are read where the tokens lie, through both SwiGLU projections at once, then through w_out; one pass then
sums each token's rows onto what its zero-computation experts add. Never waits for the host and uses no atomics.
bfloat16, float16 and float32; any widths.

Shape suffixes as in experts.py; R rows, M tiles of rows.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .base import BackendError, RoutedTokens, SlotPlan
from .planned import planned_experts

TILE_ROWS = 128  # at most, of a tile; the tiles' other side is tuned kernel by kernel (triton_kernels.py)
# Not tuned: compiled for sm_90 with 128 columns it spills a kilobyte a thread.
BACKWARD_TILE = {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


@dataclass
class TilePlan:
    """Each tile computes rows from `start_M` on, before `end_M`, of expert `expert_M`; E marks a tile without rows."""

    expert_M: Tensor
    start_M: Tensor
    end_M: Tensor


def plan_tiles(plan: SlotPlan) -> TilePlan:
    """Tiles of at most TILE_ROWS rows, none across two experts; their number is the most that any routing needs."""
    experts, rows, size = len(plan.end_E), len(plan.slot_R), TILE_ROWS
    start_E = torch.nn.functional.pad(plan.end_E, (1, 0))[:-1]
    tiles_E = (plan.end_E - start_E + size - 1) // size
    last_E = tiles_E.cumsum(0, dtype=torch.int32)
    tile_M = torch.arange(-(-rows // size) + experts, device=last_E.device, dtype=torch.int32)
    expert_M = torch.searchsorted(last_E, tile_M, right=True, out_int32=True)
    owner_M = expert_M.clamp(max=experts - 1)
    start_M = start_E[owner_M] + (tile_M - (last_E - tiles_E)[owner_M]) * size
    return TilePlan(expert_M, start_M, plan.end_E[owner_M])


def dispatch(w_in: Tensor, w_out: Tensor, tokens: RoutedTokens) -> Tensor:
    """The map of base.py by Triton kernels. Raises BackendError where they cannot run on these weights."""
    _refuse_unsupported(w_in)
    return planned_experts(w_in, w_out, tokens, TritonProducts)


def _refuse_unsupported(w_in: Tensor) -> None:
    try:
        import triton
    except ImportError:
        raise BackendError(
            "backend=triton needs the package triton (pip install triton); or choose backend=auto"
        ) from None
    if not w_in.is_cuda and not triton.knobs.runtime.interpret:
        raise BackendError("backend=triton needs a GPU; choose backend=auto (TRITON_INTERPRET=1 emulates one, slowly)")
    if w_in.dtype == torch.float64:
        raise BackendError("backend=triton does not compute in float64; choose backend=sorted")


class TritonProducts:
    """`planned.Products` by Triton kernels, which find rows of tokens where the tokens lie."""

    def __init__(self, plan: SlotPlan):
        from . import triton_kernels, triton_rows  # the package triton may not be there

        self.kernels, self.rows, self.plan = triton_kernels, triton_rows, plan

    @cached_property
    def tiles(self) -> tuple[Tensor, Tensor, Tensor]:
        tiles = plan_tiles(self.plan)
        return tiles.expert_M, tiles.start_M, tiles.end_M

    def grid(self, columns: int, block: int) -> tuple[int, int]:
        """Blocks of columns vary fastest, so that neighbours read the same rows."""
        return -(-columns // block), len(self.tiles[0])

    def gather(self, x_TD: Tensor) -> Tensor:
        return x_TD

    def swiglu_in(self, x_TD: Tensor, w_in: Tensor, keep_z: bool) -> tuple[Tensor | None, Tensor]:
        experts, width, dim = w_in.shape
        hidden, rows = width // 2, len(self.plan.slot_R)
        z_R2F = x_TD.new_empty(rows, width) if keep_z else None
        h_RF = x_TD.new_empty(rows, hidden)
        self.kernels.swiglu_in_kernel[lambda tile: self.grid(hidden, tile["BLOCK_N"])](
            x_TD, w_in, z_R2F, h_RF, self.plan.slot_R, *self.tiles, dim, hidden, experts,
            TOP_K=self.plan.top_k, SAVE_Z=keep_z, PRECISION=_precision(), BLOCK_M=TILE_ROWS,
        )  # fmt: skip
        return z_R2F, h_RF

    def matmul(self, a_RK: Tensor, b_EKN: Tensor) -> Tensor:
        experts, inner, columns = b_EKN.shape
        c_RN = a_RK.new_empty(len(a_RK), columns)
        self.kernels.rows_matmul_kernel[lambda tile: self.grid(columns, tile["BLOCK_N"])](
            a_RK, b_EKN, c_RN, *self.tiles, columns, inner, experts, b_EKN.stride(2), b_EKN.stride(1),
            PRECISION=_precision(), BLOCK_M=TILE_ROWS,
        )  # fmt: skip
        return c_RN

    def swiglu_out_backward(
        self, grad_TD: Tensor, w_out: Tensor, z_R2F: Tensor, gate_TK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        experts, dim, hidden = w_out.shape
        dz_R2F, gated_h_RF = torch.empty_like(z_R2F), z_R2F.new_empty(len(z_R2F), hidden)
        grid = self.grid(hidden, BACKWARD_TILE["BLOCK_N"])
        dgate_RB = gate_TK.new_empty(len(z_R2F), grid[0])
        self.kernels.swiglu_out_backward_kernel[grid](
            grad_TD, w_out, z_R2F, gate_TK.contiguous(), self.plan.slot_R, dz_R2F, gated_h_RF, dgate_RB,
            *self.tiles, dim, hidden, experts,
            TOP_K=self.plan.top_k, PRECISION=_precision(), BLOCK_M=TILE_ROWS, **BACKWARD_TILE,
        )  # fmt: skip
        return dz_R2F, gated_h_RF, self.plan.of_slots(dgate_RB.sum(1))

    def outer(self, a: Tensor, b: Tensor, like: Tensor, gathered: str) -> Tensor:
        c_EAB = torch.empty_like(like)
        experts, rows, columns = like.shape
        self.kernels.rows_outer_kernel[
            lambda tile: (-(-columns // tile["BLOCK_N"]), -(-rows // tile["BLOCK_M"]), experts)
        ](
            a, b, c_EAB, self.plan.slot_R, self.plan.end_E, rows, columns,
            TOP_K=self.plan.top_k, GATHER_A=gathered == "a", GATHER_B=gathered == "b", PRECISION=_precision(),
        )  # fmt: skip
        return c_EAB

    def combine(
        self, y_RD: Tensor, gate_TK: Tensor | None, x_TD: Tensor, scale_T: Tensor | None,
        mix_TC: Tensor | None, vectors_CD: Tensor | None, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        return self.rows.combine(self.plan, y_RD, gate_TK, x_TD, scale_T, mix_TC, vectors_CD, dtype)

    def affine_backward(self, grad_TD: Tensor, x_TD: Tensor, vectors_CD: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.rows.affine_backward(grad_TD, x_TD, vectors_CD)

    def weighted_rows(self, weight_TC: Tensor, v_TD: Tensor) -> Tensor:
        return self.rows.weighted_rows(weight_TC, v_TD)


def _precision() -> str:
    """How float32 operands are multiplied, as torch's own products are; says nothing about 16-bit operands."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
