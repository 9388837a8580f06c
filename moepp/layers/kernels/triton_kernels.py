"""The Triton kernels behind triton_experts.py and triton_rows.py. Importing this module needs the package `triton`.

Rows are sorted by expert; where they are multiplied they are cut into tiles of BLOCK_M rows, each of one expert. How
many there are is known on the device only, so grids have the most programs there can be, and those past the end return
at once. Every sum has a fixed order and every output one writer: no atomics. Products accumulate in float32. All
tensors are contiguous; row offsets are int64, since rows * width passes 2^31 in real batches. The model's sizes are
compile-time constants, T is not.

Shape suffixes as in experts.py; R rows, M tiles.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

Tile = tuple[int, int, int, int]  # BLOCK_N, BLOCK_K, warps, stages


EXACT_TILE: Tile = (64, 32, 8, 2)  # of float32 without tensor cores: larger ones spill, and compile for up to 40 s


def tuned(key: str, tiles: list[Tile], **blocks: int) -> Callable[[Any], Any]:
    """Lets triton measure the tiles once for each value of the compile-time constants that `key` names; it keeps the
    fastest's name beside its compiled kernels (TRITON_CACHE_DIR), for all processes.
    """
    configs = [
        triton.Config({**blocks, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
        for n, k, warps, stages in [*tiles, EXACT_TILE]
    ]
    keys = [*key.split(), "PRECISION"]
    return triton.autotune(configs, key=keys, prune_configs_by={"early_config_prune": suited}, cache_results=True)


def suited(configs: list[triton.Config], arguments: dict[str, Any], PRECISION: str, **_: Any) -> list[triton.Config]:
    """The tiles to measure: by how the product is computed there are several, or just one."""
    exact = PRECISION == "ieee" and next(iter(arguments.values())).dtype == torch.float32
    return configs[-1:] if exact else configs[:-1]


@tuned("D F EXPERTS", [(64, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 4)])
@triton.jit
def swiglu_in_kernel(
    x_TD, w_in, z_R2F, h_RF, slot_R, expert_M, start_M, end_M,
    D: tl.constexpr, F: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    SAVE_Z: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h = silu(gate) * up with [gate, up] = w_in x, x read where the tokens lie. SAVE_Z keeps z = [gate, up]."""
    tile = tl.program_id(1)
    expert = tl.load(expert_M + tile).to(tl.int64)
    if expert == EXPERTS:
        return
    row = tl.load(start_M + tile) + tl.arange(0, BLOCK_M)
    served = row < tl.load(end_M + tile)
    token = tl.load(slot_R + row, mask=served, other=0) // TOP_K
    f = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    gate_weights = w_in + expert * 2 * F * D + f[:, None] * D
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        inside = (f[:, None] < F) & (d < D)
        x = tl.load(x_TD + token[:, None] * D + d, mask=served[:, None] & (d < D), other=0)
        w_gate = tl.load(gate_weights + d, mask=inside, other=0)
        w_up = tl.load(gate_weights + F * D + d, mask=inside, other=0)
        gate = tl.dot(x, tl.trans(w_gate), gate, input_precision=PRECISION)
        up = tl.dot(x, tl.trans(w_up), up, input_precision=PRECISION)
    row = row.to(tl.int64)[:, None]
    inside = served[:, None] & (f < F)
    if SAVE_Z:
        tl.store(z_R2F + row * 2 * F + f, gate, mask=inside)
        tl.store(z_R2F + row * 2 * F + F + f, up, mask=inside)
    tl.store(h_RF + row * F + f, gate * tl.sigmoid(gate) * up, mask=inside)


@tuned("N K EXPERTS STRIDE_N", [(128, 64, 8, 3), (128, 64, 8, 4), (256, 64, 8, 3), (64, 64, 8, 4)])
@triton.jit
def rows_matmul_kernel(
    a_RK, b, c_RN, expert_M, start_M, end_M, N: tl.constexpr, K: tl.constexpr, EXPERTS: tl.constexpr,
    STRIDE_N: tl.constexpr, STRIDE_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """c[r] = a[r] b[e] for the rows r of each expert e, where b[e] is [K, N] with the given strides."""
    tile = tl.program_id(1)
    expert = tl.load(expert_M + tile).to(tl.int64)
    if expert == EXPERTS:
        return
    row = tl.load(start_M + tile) + tl.arange(0, BLOCK_M)
    served = row < tl.load(end_M + tile)
    row = row.to(tl.int64)[:, None]
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = b + expert * N * K + n * STRIDE_N
    c = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a_tile = tl.load(a_RK + row * K + k, mask=served[:, None] & (k < K), other=0)
        b_tile = tl.load(columns + k[:, None] * STRIDE_K, mask=(k[:, None] < K) & (n < N), other=0)
        c = tl.dot(a_tile, b_tile, c, input_precision=PRECISION)
    tl.store(c_RN + row * N + n, c, mask=served[:, None] & (n < N))


@triton.jit
def block_of(WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """This program's block of rows and its block of columns, which varies fastest. Both lie along the grid's first
    axis: the others end at 65,535, which is a million rows.
    """
    columns = tl.cdiv(WIDTH, BLOCK)
    return tl.program_id(0) // columns, tl.program_id(0) % columns


@triton.jit
def gather_kernel(
    x_TD, slot_R, end_E, x_RD, D: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x_RD[r] = x of row r's token."""
    rows = tl.load(end_E + EXPERTS - 1)
    block, column = block_of(D, BLOCK_D)
    start = block * BLOCK_R
    if start >= rows:
        return
    row = start + tl.arange(0, BLOCK_R)
    d = column * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (d < D)
    token = tl.load(slot_R + row, mask=row < rows, other=0) // TOP_K
    x = tl.load(x_TD + token[:, None] * D + d, mask=inside, other=0)
    tl.store(x_RD + row.to(tl.int64)[:, None] * D + d, x, mask=inside)


@triton.jit
def swiglu_kernel(
    z_R2F, end_E, h_RF, F: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr
):
    """h = silu(gate) * up with z = [gate, up]."""
    rows = tl.load(end_E + EXPERTS - 1)
    block, column = block_of(F, BLOCK_F)
    start = block * BLOCK_R
    if start >= rows:
        return
    row = (start + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    f = column * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = (row < rows) & (f < F)
    gate = tl.load(z_R2F + row * 2 * F + f, mask=inside, other=0).to(tl.float32)
    up = tl.load(z_R2F + row * 2 * F + F + f, mask=inside, other=0).to(tl.float32)
    tl.store(h_RF + row * F + f, gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit
def swiglu_backward_kernel(
    dh_RF, z_R2F, gate_TK, slot_R, end_E, dz_R2F, gated_h_RF, dgate_R, F: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Back through gate * h, h = silu(a) * up: the gradients of z = [a, up] and of the gates, and gate * h."""
    rows = tl.load(end_E + EXPERTS - 1)
    start = tl.program_id(0) * BLOCK_R
    if start >= rows:
        return
    row = start + tl.arange(0, BLOCK_R)
    served = row < rows
    gate = tl.load(gate_TK + tl.load(slot_R + row, mask=served, other=0), mask=served, other=0)[:, None]
    row = row.to(tl.int64)
    dgate = tl.zeros([BLOCK_R], tl.float32)
    for first in range(0, F, BLOCK_F):
        f = first + tl.arange(0, BLOCK_F)
        inside = served[:, None] & (f < F)
        at = row[:, None] * 2 * F + f
        a = tl.load(z_R2F + at, mask=inside, other=0).to(tl.float32)
        up = tl.load(z_R2F + at + F, mask=inside, other=0).to(tl.float32)
        dh = tl.load(dh_RF + row[:, None] * F + f, mask=inside, other=0).to(tl.float32)
        sigmoid = tl.sigmoid(a)
        h = a * sigmoid * up
        dgate += tl.sum(h * dh, 1)
        dh *= gate
        tl.store(gated_h_RF + row[:, None] * F + f, gate * h, mask=inside)
        tl.store(dz_R2F + at, dh * up * sigmoid * (1 + a * (1 - sigmoid)), mask=inside)
        tl.store(dz_R2F + at + F, dh * a * sigmoid, mask=inside)
    tl.store(dgate_R + row, dgate, mask=served)


@triton.jit
def combine_kernel(
    y_RD, row_TK, end_E, gate_TK, x_TD, scale_T, mix_TC, vectors_CD, out_TD, T, D: tl.constexpr,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, C: tl.constexpr,
    GATED: tl.constexpr, SCALED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[t] = scale_t x[t] + mix[t] V + sum over k of gate[t, k] y[row of (t, k)], in one write.

    Rows at or past end_E[-1] were computed by no FFN expert and are not read. Without GATED all gates are 1; without
    SCALED the first term is absent; C = 0 leaves out the second.
    """
    block, column = block_of(D, BLOCK_D)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    d = column * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (t[:, None] < T) & (d < D)
    at = t.to(tl.int64)[:, None] * D + d
    out = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    if SCALED:
        scale = tl.load(scale_T + t, mask=t < T, other=0)
        out += scale[:, None] * tl.load(x_TD + at, mask=inside, other=0).to(tl.float32)
    for c in tl.static_range(C):
        mix = tl.load(mix_TC + t * C + c, mask=t < T, other=0)
        out += mix[:, None] * tl.load(vectors_CD + c * D + d, mask=d < D, other=0)
    rows = tl.load(end_E + EXPERTS - 1)
    for k in tl.static_range(TOP_K):
        row = tl.load(row_TK + t * TOP_K + k, mask=t < T, other=0)
        y = tl.load(y_RD + row[:, None] * D + d, mask=inside & (row[:, None] < rows), other=0).to(tl.float32)
        if GATED:
            y *= tl.load(gate_TK + t * TOP_K + k, mask=t < T, other=0)[:, None]
        out += y
    tl.store(out_TD + at, out, mask=inside)


@triton.jit
def affine_backward_kernel(
    grad_TD, x_TD, vectors_CD, dscale_T, dmix_TC, T, D: tl.constexpr, C: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dscale_t = <grad_t, x_t>, and for C > 0 dmix_tc = <grad_t, V_c>, for which grad is read again from the cache."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    at = t.to(tl.int64)[:, None] * D
    dscale = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (t[:, None] < T) & (d < D)
        grad = tl.load(grad_TD + at + d, mask=inside, other=0).to(tl.float32)
        dscale += tl.sum(grad * tl.load(x_TD + at + d, mask=inside, other=0).to(tl.float32), 1)
    tl.store(dscale_T + t, dscale, mask=t < T)
    for c in tl.static_range(C):
        dmix = tl.zeros([BLOCK_T], tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            grad = tl.load(grad_TD + at + d, mask=(t[:, None] < T) & (d < D), other=0).to(tl.float32)
            dmix += tl.sum(grad * tl.load(vectors_CD + c * D + d, mask=d < D, other=0), 1)
        tl.store(dmix_TC + t * C + c, dmix, mask=t < T)


@triton.jit
def slot_of(expert_TK, gate_TK, at, inside, wanted, TOP_K: tl.constexpr):
    """Whether each token chose one expert, and its gate there."""
    chosen, found = tl.zeros(at.shape, tl.int32), tl.zeros(at.shape, tl.float32)
    for k in range(TOP_K):
        here = tl.load(expert_TK + at * TOP_K + k, mask=inside, other=-1) == wanted
        chosen |= here.to(tl.int32)
        found += tl.where(here, tl.load(gate_TK + at * TOP_K + k, mask=inside, other=0), 0)
    return chosen != 0, found


@triton.jit
def affine_sums_kernel(
    expert_TK, gate_TK, x_TD, w_mix, scale_T, mix_TC, a_TC, T, D: tl.constexpr,
    COPY: tl.constexpr, COPIES: tl.constexpr, CONSTANT: tl.constexpr, C: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """scale_t = the gates of copies + the gate times a of each constant expert; mix_tc = its gate times 1 - a, where
    a = sigmoid((w_2c - w_2c+1) x), the first of the softmax of both. x is read of the tokens that chose the expert.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = t < T
    at = t.to(tl.int64)
    scale = tl.zeros([BLOCK_T], tl.float32)
    for c in range(COPIES):
        scale += slot_of(expert_TK, gate_TK, at, inside, COPY + c, TOP_K)[1]
    for c in range(C):
        chosen, gate = slot_of(expert_TK, gate_TK, at, inside, CONSTANT + c, TOP_K)
        logit = tl.zeros([BLOCK_T], tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            x = tl.load(x_TD + at[:, None] * D + d, mask=chosen[:, None] & (d < D), other=0).to(tl.float32)
            first = tl.load(w_mix + 2 * c * D + d, mask=d < D, other=0).to(tl.float32)
            second = tl.load(w_mix + (2 * c + 1) * D + d, mask=d < D, other=0).to(tl.float32)
            logit += tl.sum(x * (first - second), 1)
        a = tl.sigmoid(logit)
        scale += gate * a
        tl.store(mix_TC + at * C + c, gate * (1 - a), mask=inside)
        tl.store(a_TC + at * C + c, a, mask=inside)
    tl.store(scale_T + at, scale, mask=inside)


@triton.jit
def affine_sums_backward_kernel(
    expert_TK, gate_TK, a_TC, dscale_T, dmix_TC, dgate_TK, dlogit_TM, T,
    COPY: tl.constexpr, COPIES: tl.constexpr, CONSTANT: tl.constexpr, C: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """dgate_tk = dscale_t where slot k chose a copy, a dscale_t + (1 - a) dmix_tc where constant expert c, else 0;
    dlogit_t,2c = the gate of c times a (1 - a) (dscale_t - dmix_tc), 0 where not chosen; dlogit_t,2c+1 is -dlogit_t,2c.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = t < T
    at = t.to(tl.int64)
    dscale = tl.load(dscale_T + at, mask=inside, other=0)
    for k in range(TOP_K):
        expert = tl.load(expert_TK + at * TOP_K + k, mask=inside, other=-1)
        c = expert - CONSTANT
        constant = inside & (c >= 0) & (c < C)
        a = tl.load(a_TC + at * C + c, mask=constant, other=0)
        dmix = tl.load(dmix_TC + at * C + c, mask=constant, other=0)
        copied = (expert >= COPY) & (expert < COPY + COPIES)
        dgate = tl.where(copied, dscale, tl.where(constant, a * dscale + (1 - a) * dmix, 0))
        tl.store(dgate_TK + at * TOP_K + k, dgate, mask=inside)
    for c in range(C):
        chosen, gate = slot_of(expert_TK, gate_TK, at, inside, CONSTANT + c, TOP_K)
        a = tl.load(a_TC + at * C + c, mask=chosen, other=0)
        dmix = tl.load(dmix_TC + at * C + c, mask=chosen, other=0)
        dlogit = gate * a * (1 - a) * (dscale - dmix)
        tl.store(dlogit_TM + at * 2 * C + 2 * c, dlogit, mask=inside)
        tl.store(dlogit_TM + at * 2 * C + 2 * c + 1, -dlogit, mask=inside)


@triton.jit
def mixed_rows_kernel(
    weight_TM, v_MD, out_TD, T, D: tl.constexpr, M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    """out_t = the sum over m of weight_tm v_m."""
    block, column = block_of(D, BLOCK_D)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    d = column * BLOCK_D + tl.arange(0, BLOCK_D)
    out = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for m in range(M):
        weight = tl.load(weight_TM + t * M + m, mask=t < T, other=0)
        out += weight[:, None] * tl.load(v_MD + m * D + d, mask=d < D, other=0).to(tl.float32)
    tl.store(out_TD + t.to(tl.int64)[:, None] * D + d, out, mask=(t[:, None] < T) & (d < D))


@triton.jit
def weighted_rows_kernel(
    weight_TM, v_TD, sum_PMD, T, CHUNK, D: tl.constexpr, M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Each chunk's sum over its tokens of weight_tm v_t, for every m; v is read where the weight is not 0."""
    chunk, m = tl.program_id(1), tl.program_id(2)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    summed = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, CHUNK, BLOCK_T):
        t = chunk * CHUNK + start + tl.arange(0, BLOCK_T)
        weight = tl.load(weight_TM + t * M + m, mask=t < T, other=0)
        v = tl.load(v_TD + t.to(tl.int64)[:, None] * D + d, mask=(weight != 0)[:, None] & (d < D), other=0)
        summed += tl.sum(weight[:, None] * v.to(tl.float32), 0)
    tl.store(sum_PMD + (chunk * M + m) * D + d, summed, mask=d < D)


@triton.jit
def swiglu_out_backward_kernel(
    grad_TD, w_out, z_R2F, gate_TK, slot_R, dz_R2F, gated_h_RF, dgate_RB, expert_M, start_M, end_M,
    D: tl.constexpr, F: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Back through gate * w_out (silu(.) * up): the gradients of [gate, up], and gate * h for w_out's gradient.

    With dh = w_out^T grad, <grad, w_out h> = <dh, h>, so the gates' gradient needs no saved expert output; each block
    of F writes its part of that sum.
    """
    tile = tl.program_id(1)
    expert = tl.load(expert_M + tile).to(tl.int64)
    if expert == EXPERTS:
        return
    row = tl.load(start_M + tile) + tl.arange(0, BLOCK_M)
    served = row < tl.load(end_M + tile)
    slot = tl.load(slot_R + row, mask=served, other=0)
    token = slot // TOP_K
    f = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dh = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        grad = tl.load(grad_TD + token[:, None] * D + d, mask=served[:, None] & (d < D), other=0)
        w = tl.load(w_out + expert * D * F + d[:, None] * F + f, mask=(d[:, None] < D) & (f < F), other=0)
        dh = tl.dot(grad, w, dh, input_precision=PRECISION)
    row = row.to(tl.int64)
    inside = served[:, None] & (f < F)
    at = row[:, None] * 2 * F + f
    a = tl.load(z_R2F + at, mask=inside, other=0).to(tl.float32)
    up = tl.load(z_R2F + at + F, mask=inside, other=0).to(tl.float32)
    sigmoid = tl.sigmoid(a)
    h = a * sigmoid * up
    tl.store(dgate_RB + row * tl.num_programs(0) + tl.program_id(0), tl.sum(h * dh, 1), mask=served)
    gate = tl.load(gate_TK + slot, mask=served, other=0)[:, None]
    dh *= gate
    tl.store(gated_h_RF + row[:, None] * F + f, gate * h, mask=inside)
    tl.store(dz_R2F + at, dh * up * sigmoid * (1 + a * (1 - sigmoid)), mask=inside)
    tl.store(dz_R2F + at + F, dh * a * sigmoid, mask=inside)


@tuned("A B GATHER_A", [(128, 64, 8, 3), (128, 64, 8, 4), (256, 64, 8, 3), (64, 64, 8, 3)], BLOCK_M=128)
@triton.jit
def rows_outer_kernel(
    a, b, c_EAB, slot_R, end_E, A: tl.constexpr, B: tl.constexpr,
    TOP_K: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """c[e] = sum over the rows r of expert e of a[r]^T b[r], a weight's gradient; 0 for an expert without rows.

    a has width A and b width B; a gathered operand lies in token order instead of row order.
    """
    expert = tl.program_id(2)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.load(end_E + expert - 1, mask=expert > 0, other=0)
    end = tl.load(end_E + expert)
    c = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first, end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        served = row < end
        token = tl.load(slot_R + row, mask=served, other=0) // TOP_K
        row = row.to(tl.int64)
        row_a = token if GATHER_A else row
        row_b = token if GATHER_B else row
        a_tile = tl.load(a + row_a[:, None] * A + m, mask=served[:, None] & (m < A), other=0)
        b_tile = tl.load(b + row_b[:, None] * B + n, mask=served[:, None] & (n < B), other=0)
        c = tl.dot(tl.trans(a_tile), b_tile, c, input_precision=PRECISION)
    at = expert.to(tl.int64) * A * B + m[:, None] * B + n
    tl.store(c_EAB + at, c, mask=(m[:, None] < A) & (n < B))
