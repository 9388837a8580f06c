"""The Triton kernels behind triton_experts.py. Importing this module needs the package `triton`.

Rows are sorted by expert and cut into tiles of BLOCK_M rows, each of one expert. The number of tiles is known on the
device only, so grids have the most tiles there can be, and those past the end return at once. Every sum has a fixed
order and every output one writer: no atomics. Products accumulate in float32. All tensors are contiguous; row offsets
are int64, since rows * width passes 2^31 in real batches. The model's sizes are compile-time constants, T is not.

Shape suffixes as in experts.py; S rows of all slots, M tiles.
"""

import triton
import triton.language as tl


@triton.jit
def swiglu_in_kernel(
    x_TD, w_in, z_S2F, h_SF, slot_S, expert_M, start_M, end_M,
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
    token = tl.load(slot_S + row, mask=served, other=0) // TOP_K
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
        tl.store(z_S2F + row * 2 * F + f, gate, mask=inside)
        tl.store(z_S2F + row * 2 * F + F + f, up, mask=inside)
    tl.store(h_SF + row * F + f, gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit
def rows_matmul_kernel(
    a_SK, b, c_SN, expert_M, start_M, end_M, N: tl.constexpr, K: tl.constexpr, EXPERTS: tl.constexpr,
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
        a_tile = tl.load(a_SK + row * K + k, mask=served[:, None] & (k < K), other=0)
        b_tile = tl.load(columns + k[:, None] * STRIDE_K, mask=(k[:, None] < K) & (n < N), other=0)
        c = tl.dot(a_tile, b_tile, c, input_precision=PRECISION)
    tl.store(c_SN + row * N + n, c, mask=served[:, None] & (n < N))


@triton.jit
def combine_kernel(
    y_SD, row_TK, end_E, gate_TK, x_TD, scale_T, mix_TC, vectors_CD, out_TD, T, D: tl.constexpr,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, C: tl.constexpr,
    GATED: tl.constexpr, SCALED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[t] = scale_t x[t] + mix[t] V + sum over k of gate[t, k] y[row of (t, k)], in one write.

    Rows at or past end_E[-1] were computed by no FFN expert and are not read. Without GATED all gates are 1; without
    SCALED the first term is absent; C = 0 leaves out the second.
    """
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
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
        y = tl.load(y_SD + row[:, None] * D + d, mask=inside & (row[:, None] < rows), other=0).to(tl.float32)
        if GATED:
            y *= tl.load(gate_TK + t * TOP_K + k, mask=t < T, other=0)[:, None]
        out += y
    tl.store(out_TD + at, out, mask=inside)


@triton.jit
def swiglu_out_backward_kernel(
    grad_TD, w_out, z_S2F, gate_TK, slot_S, dz_S2F, gated_h_SF, dgate_SB, expert_M, start_M, end_M,
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
    slot = tl.load(slot_S + row, mask=served, other=0)
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
    a = tl.load(z_S2F + at, mask=inside, other=0).to(tl.float32)
    up = tl.load(z_S2F + at + F, mask=inside, other=0).to(tl.float32)
    sigmoid = tl.sigmoid(a)
    h = a * sigmoid * up
    tl.store(dgate_SB + row * tl.num_programs(0) + tl.program_id(0), tl.sum(h * dh, 1), mask=served)
    gate = tl.load(gate_TK + slot, mask=served, other=0)[:, None]
    dh *= gate
    tl.store(gated_h_SF + row[:, None] * F + f, gate * h, mask=inside)
    tl.store(dz_S2F + at, dh * up * sigmoid * (1 + a * (1 - sigmoid)), mask=inside)
    tl.store(dz_S2F + at + F, dh * a * sigmoid, mask=inside)


@triton.jit
def rows_outer_kernel(
    a, b, c_EAB, slot_S, end_E, A: tl.constexpr, B: tl.constexpr,
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
        token = tl.load(slot_S + row, mask=served, other=0) // TOP_K
        row = row.to(tl.int64)
        row_a = token if GATHER_A else row
        row_b = token if GATHER_B else row
        a_tile = tl.load(a + row_a[:, None] * A + m, mask=served[:, None] & (m < A), other=0)
        b_tile = tl.load(b + row_b[:, None] * B + n, mask=served[:, None] & (n < B), other=0)
        c = tl.dot(tl.trans(a_tile), b_tile, c, input_precision=PRECISION)
    at = expert.to(tl.int64) * A * B + m[:, None] * B + n
    tl.store(c_EAB + at, c, mask=(m[:, None] < A) & (n < B))
