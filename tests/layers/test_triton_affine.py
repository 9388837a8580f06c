"""What Triton's kernels do for the zero-computation experts, and the grids of all passes over rows."""

import pytest
import torch
from test_kernels import ASSIGNMENTS, DIM, EXPERTS, GPU, HIDDEN, NO_TRITON, assert_close, interpreted, on_gpu

from moepp.layers import experts, moe
from moepp.layers.kernels.base import SlotPlan
from moepp.layers.moe import MoELayer
from moepp.layers.router import Routing
from moepp.layers.settings import ExpertCounts, MoEConfig

pytestmark = pytest.mark.usefixtures("interpreter_with_new_numpy", "small_blocks")


@pytest.fixture
def small_blocks(monkeypatch):
    """So that the width takes two, and does not fill the second."""
    if NO_TRITON:
        return
    from moepp.layers.kernels import triton_affine, triton_rows

    for module in (triton_affine, triton_rows):
        monkeypatch.setattr(module, "COLUMNS", 16)


SETS = [ExpertCounts(EXPERTS, zero=1, copy=1, constant=1), ExpertCounts(EXPERTS, zero=1, copy=0, constant=2)]


def affine_sums(device, dtype, counts, expert_TK, dtype_of_x=None):
    """c and M of the layer's affine experts, and the gradients of gates, x and the constant experts' mixing weights."""
    layer = MoELayer(MoEConfig(dim=DIM, hidden=HIDDEN, experts=counts)).to(device, dtype)
    generator = torch.Generator().manual_seed(0)
    x_TD, gate_TK, w_mix = (
        torch.randn(shape, generator=generator)
        for shape in ((len(expert_TK), DIM), expert_TK.shape, (2 * counts.constant, DIM))
    )
    gate_TK[0] = 0  # its slots have a gradient nevertheless
    x_TD = x_TD.bfloat16().to(device, dtype_of_x or dtype).requires_grad_()
    gate_TK = gate_TK.to(device, dtype).requires_grad_()
    layer.zero_computation.w_mix = torch.nn.Parameter(w_mix.to(device, dtype) / 5)
    affine = layer.affine_map(x_TD, Routing(expert_TK.to(device), gate_TK, gate_TK.detach()))
    parts = [affine.scale_T, affine.mix_TC]
    loss = sum(
        (part * torch.linspace(-1, i, part.numel()).view_as(part).to(part)).sum() for i, part in enumerate(parts)
    )
    return parts + list(torch.autograd.grad(loss, [gate_TK, x_TD, layer.zero_computation.w_mix]))


@pytest.mark.parametrize("counts", SETS, ids=["a copy", "no copy"])
@pytest.mark.parametrize("assignment", ["random", "top 1", "top 3", "dropped rows", "one token"])
@pytest.mark.parametrize("dtype_of_x", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=on_gpu)]
)  # fmt: skip
def test_one_kernel_sums_what_the_affine_experts_add(device, dtype_of_x, assignment, counts, monkeypatch):
    wanted = affine_sums("cpu", torch.float64, counts, ASSIGNMENTS[assignment])
    monkeypatch.setattr(moe, "one_affine", None)
    monkeypatch.setattr(experts, "takes_triton", lambda gate_TK: True)
    found = affine_sums(device, torch.float32, counts, ASSIGNMENTS[assignment], dtype_of_x)
    for value, right in zip(found, wanted, strict=True):
        assert_close([value], [right], value.dtype)
    assert found[3].dtype == dtype_of_x and {value.dtype for value in (*found[:3], found[4])} == {torch.float32}


def test_rows_are_weighed_over_several_chunks(monkeypatch):
    if NO_TRITON:
        pytest.skip("needs the package triton")
    from moepp.layers.kernels import torch_rows, triton_rows

    monkeypatch.setattr(triton_rows, "CHUNK", 32)
    device, generator = "cuda" if GPU else "cpu", torch.Generator().manual_seed(0)
    weight_TC, v_TD = (torch.randn(shape, generator=generator).to(device) for shape in ((75, 3), (75, DIM)))
    weight_TC[::3] = 0
    v_TD[::3] = torch.nan  # of a token that nobody asks for
    wanted = torch_rows.weighted_rows(weight_TC.double(), v_TD.nan_to_num().double())
    assert_close([triton_rows.weighted_rows(weight_TC, v_TD)], [wanted.cpu()], torch.float32)


def test_no_grid_ends_at_a_million_rows(monkeypatch):
    """CUDA takes at most 65,535 blocks along any axis but the first."""
    if NO_TRITON:
        pytest.skip("needs the package triton")
    from moepp.layers.kernels import triton_kernels, triton_rows

    grids = {}

    class Launch:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            grids[self.name] = grid
            return lambda *args, **constants: None

    for name in [name for name in vars(triton_kernels) if name.endswith("_kernel")]:
        monkeypatch.setattr(triton_kernels, name, Launch(name))
    with torch.device("meta"):
        rows, dim = 2**21, 768
        x_TD, expert_TK, scale_T = torch.empty(rows, dim), torch.empty(rows, 1, dtype=torch.int64), torch.empty(rows)
        plan = SlotPlan(expert_TK[:, 0], expert_TK, expert_TK < 8, torch.empty(8, dtype=torch.int32))
        triton_rows.gather(plan, x_TD)
        triton_rows.swiglu_backward(plan, triton_rows.swiglu(plan, x_TD), x_TD, scale_T[:, None])
        triton_rows.combine(plan, x_TD, None, x_TD, scale_T, None, None, torch.float32)
        triton_rows.affine_backward(x_TD, x_TD, None)
        triton_rows.mixed_rows(scale_T[:, None], x_TD[:1], x_TD)
        triton_rows.weighted_rows(scale_T[:, None], x_TD)
    assert len(grids) == 7 and all(blocks < 2**16 for grid in grids.values() for blocks in grid[1:])
