"""Every backend against the sorted one in float64. Without a GPU, Triton's kernels run in its interpreter."""

import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from moepp.layers.dispatch import BACKENDS, LocalDispatcher, choose_backend
from moepp.layers.kernels import grouped, triton_experts
from moepp.layers.kernels.base import Affine, BackendError, RoutedTokens, plan_slots
from moepp.layers.kernels.planned import planned_experts
from moepp.layers.moe import MoELayer
from moepp.layers.settings import ExpertCounts, MoEConfig

pytestmark = pytest.mark.usefixtures("interpreter_with_new_numpy")

GPU = torch.cuda.is_available()

EXPERTS, TOKENS, DIM, HIDDEN, CONSTANTS = 4, 26, 24, 40, 2
TOTAL = EXPERTS + 3  # ids from EXPERTS on are zero-computation experts; TOTAL marks a dropped slot


def chosen(top_k):
    generator = torch.Generator().manual_seed(top_k)
    return torch.stack([torch.randperm(TOTAL, generator=generator)[:top_k] for _ in range(TOKENS)])


ASSIGNMENTS = {
    "random": chosen(2),
    "top 1": chosen(1),
    "top 3": chosen(3),
    "dropped rows": chosen(2).masked_fill(torch.arange(2 * TOKENS).view(TOKENS, 2) % 3 == 0, TOTAL),
    "empty experts": torch.tensor([[3, 0]]).repeat(TOKENS, 1),
    "all to one": torch.tensor([[EXPERTS, 2]]).repeat(TOKENS, 1),
    "none to an FFN": torch.tensor([[EXPERTS, EXPERTS + 1]]).repeat(TOKENS, 1),
    "one token": torch.tensor([[3, 1]]),
}


def grouped_as_on_a_gpu(w_in, w_out, tokens):
    """`grouped` with the passes that it takes on a GPU, in Triton's interpreter."""
    from moepp.layers.kernels import triton_rows

    return planned_experts(w_in, w_out, tokens, partial(grouped.GroupedProducts, passes=triton_rows))


KERNELS_BY_NAME = BACKENDS | {"grouped by triton": grouped_as_on_a_gpu}
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-2, torch.bfloat16: 3e-2}  # of each result's norm

HOPPER_SHARED_MEMORY = 227 * 1024  # bytes that a block may have

on_gpu = (pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device"))
NO_TRITON = importlib.util.find_spec("triton") is None
interpreted = pytest.mark.skipif(GPU or NO_TRITON, reason="needs the package triton, and no CUDA device")


def kernels(*marked):
    """Parameters (backend, device, dtype) from (backend, device, marks, dtypes)."""
    return [
        pytest.param(backend, device, dtype, marks=marks, id=f"{backend}-{device}-{str(dtype)[6:]}")
        for backend, device, marks, dtypes in marked
        for dtype in dtypes
    ]


KERNELS = kernels(
    ("grouped", "cpu", (), TOLERANCE),
    ("triton", "cpu", interpreted, [torch.float32]),
    ("grouped by triton", "cpu", interpreted, [torch.float32]),
    *((backend, "cuda", on_gpu, TOLERANCE) for backend in BACKENDS),
)
INTERPRETED_HALF = kernels(
    ("triton", "cpu", interpreted, [torch.float16]), ("grouped by triton", "cpu", interpreted, [torch.bfloat16])
)  # its interpreter has no bfloat16 product
SYNC_FREE = kernels(("grouped", "cuda", on_gpu, [torch.bfloat16]), ("triton", "cuda", on_gpu, TOLERANCE))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles so small that the tests' sizes need several in every direction, none of them full."""
    if GPU or NO_TRITON:
        return
    import triton

    from moepp.layers.kernels import triton_kernels, triton_rows

    tile = {"BLOCK_N": 16, "BLOCK_K": 16}
    monkeypatch.setattr(triton_experts, "TILE_ROWS", 16)
    monkeypatch.setattr(triton_experts, "BACKWARD_TILE", tile)
    monkeypatch.setattr(triton_rows, "COLUMNS", 16)
    for name, more in (("swiglu_in", {}), ("rows_matmul", {}), ("rows_outer", {"BLOCK_M": 16})):
        monkeypatch.setattr(getattr(triton_kernels, f"{name}_kernel"), "configs", [triton.Config(tile | more)])


def make_case(expert_TK, others, dtype, device="cpu", seed=0):
    """Leaves (w_in, w_out, x, gates, scale, mix, vectors), the last ones as `others` says; weights and x in values
    that `dtype` can hold.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens, top_k = expert_TK.shape
    shapes = [(EXPERTS, 2 * HIDDEN, DIM), (EXPERTS, DIM, HIDDEN), (tokens, DIM), (tokens, top_k), (tokens,)]
    shapes += [(tokens, CONSTANTS), (CONSTANTS, DIM)]
    shapes = shapes[: {"none": 4, "scale": 5, "scale and vectors": 7}[others]]
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    values = [value.to(dtype).float() if i < 3 else value for i, value in enumerate(values)]
    types = [dtype, dtype] + [torch.float32] * 5
    return [value.to(device, kind).requires_grad_() for value, kind in zip(values, types, strict=False)]


def evaluate(backend, case, expert_TK, **known):
    """The output and the gradients of all leaves."""
    affine = Affine(*case[4:]) if len(case) > 4 else None
    tokens = RoutedTokens(case[2], expert_TK.to(case[0].device), case[3], affine, **known)
    y_TD = KERNELS_BY_NAME[backend](*case[:2], tokens)
    weights = torch.linspace(-1, 1, y_TD.numel(), device=y_TD.device, dtype=y_TD.dtype).view_as(y_TD)
    return [y_TD.detach(), *torch.autograd.grad((y_TD * weights).sum(), case)]


def reference(case, expert_TK):
    case = [leaf.detach().cpu().double().requires_grad_() for leaf in case]
    return evaluate("sorted", case, expert_TK)


def assert_close(found, expected, dtype):
    for value, wanted in zip(found, expected, strict=True):
        assert value.shape == wanted.shape
        error = (value.cpu().double() - wanted).norm()
        assert error <= TOLERANCE[dtype] * wanted.norm()  # so where 0 is wanted, it is 0


@pytest.mark.parametrize("others", ["none", "scale and vectors"])
@pytest.mark.parametrize("expert_TK", ASSIGNMENTS.values(), ids=ASSIGNMENTS)
@pytest.mark.parametrize(("backend", "device", "dtype"), KERNELS)
def test_values_and_gradients_equal_the_reference(backend, device, dtype, expert_TK, others):
    case = make_case(expert_TK, others, dtype, device)
    found = evaluate(backend, case, expert_TK)
    assert [value.dtype for value in found] == [torch.float32] + [leaf.dtype for leaf in case]
    assert_close(found, reference(case, expert_TK), dtype)


@pytest.mark.parametrize(
    ("backend", "device", "dtype"),
    kernels(
        ("grouped", "cpu", (), [torch.bfloat16]),
        ("grouped by triton", "cpu", interpreted, [torch.bfloat16]),
        *((backend, "cuda", on_gpu, [torch.bfloat16]) for backend in ("grouped", "triton")),
    ),
)
@pytest.mark.parametrize("kept_rows", [None, 20], ids=["one pass", "two passes"])
def test_the_sum_may_come_in_the_inputs_dtype_rounded_once(backend, device, dtype, kept_rows):
    expert_TK = ASSIGNMENTS["random"]
    case = make_case(expert_TK, "scale and vectors", dtype, device)
    wide = evaluate(backend, case, expert_TK, kept_rows=kept_rows)
    narrow = evaluate(backend, case, expert_TK, kept_rows=kept_rows, dtype=dtype)
    if kept_rows is None:
        if backend != "grouped by triton":  # the interpreter cuts where a GPU rounds
            assert torch.equal(narrow[0], wide[0].to(dtype))
        assert [value.dtype for value in narrow[1:]] == [leaf.dtype for leaf in case]
    assert_close(narrow, reference(case, expert_TK), dtype)


def test_the_backward_pass_frees_z_before_it_needs_room_for_more(monkeypatch):
    seen, alive = [], []
    swiglu_in, combine = grouped.GroupedProducts.swiglu_in, grouped.GroupedProducts.combine

    def watched_in(self, *args, **options):
        z_R2F, h_RF = swiglu_in(self, *args, **options)
        seen.append(StorageWeakRef(z_R2F.untyped_storage()))
        return z_R2F, h_RF

    def watched_combine(self, *args, **options):
        alive.append(not seen[0].expired())
        return combine(self, *args, **options)

    monkeypatch.setattr(grouped.GroupedProducts, "swiglu_in", watched_in)
    monkeypatch.setattr(grouped.GroupedProducts, "combine", watched_combine)
    evaluate("grouped", make_case(ASSIGNMENTS["random"], "none", torch.float32), ASSIGNMENTS["random"])
    assert alive == [True, False]  # in the forward pass, and where the backward pass makes the gradient of x


@pytest.mark.parametrize("assignment", ["dropped rows", "none to an FFN"])
@pytest.mark.parametrize(("backend", "device", "dtype"), KERNELS + INTERPRETED_HALF)
def test_uninitialised_memory_reaches_no_result(backend, device, dtype, assignment, monkeypatch):
    expert_TK = ASSIGNMENTS[assignment]
    case = make_case(expert_TK, "scale", dtype, device)
    expected = reference(case, expert_TK)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        assert torch.empty(3, device=device).isnan().all()
        assert_close(evaluate(backend, case, expert_TK), expected, dtype)
    finally:
        torch.use_deterministic_algorithms(False)


def test_without_gradients_no_z_is_written(monkeypatch):
    asked, swiglu_in = [], grouped.GroupedProducts.swiglu_in
    monkeypatch.setattr(
        grouped.GroupedProducts, "swiglu_in", lambda *given, keep_z: asked.append(keep_z) or swiglu_in(*given, keep_z)
    )
    case, expert_TK = make_case(ASSIGNMENTS["random"], "none", torch.float32), ASSIGNMENTS["random"]
    tokens = RoutedTokens(case[2], expert_TK, case[3])
    grouped.dispatch(*case[:2], tokens)
    with torch.no_grad():
        grouped.dispatch(*case[:2], tokens)
    assert asked == [True, False]


@pytest.mark.parametrize(("backend", "device", "dtype"), KERNELS)
def test_inference_keeps_nothing_for_a_backward_pass(backend, device, dtype):
    expert_TK = ASSIGNMENTS["random"]
    case = make_case(expert_TK, "scale", dtype, device)
    expected = reference(case, expert_TK)
    w_in, w_out, x_TD, gate_TK, scale_T = (leaf.detach() for leaf in case)
    ids = expert_TK.to(device)
    y_TD = KERNELS_BY_NAME[backend](w_in, w_out, RoutedTokens(x_TD, ids, gate_TK, Affine(scale_T)))
    assert not y_TD.requires_grad
    assert_close([y_TD], expected[:1], dtype)


class TensorsOfSize(TorchDispatchMode):
    """Keeps every tensor of `numel` elements that an operator returns."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.found = numel, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() == self.numel:
            self.found.append(result)
        return result


@pytest.mark.parametrize(
    ("backend", "device", "dtype"), kernels(("sorted", "cpu", (), TOLERANCE)) + KERNELS[: len(TOLERANCE)] + SYNC_FREE
)
def test_no_expert_makes_a_gradient_as_large_as_all_weights(backend, device, dtype):
    expert_TK = ASSIGNMENTS["random"]
    case = make_case(expert_TK, "none", dtype, device)
    y_TD = KERNELS_BY_NAME[backend](*case[:2], RoutedTokens(case[2], expert_TK.to(device), case[3]))
    with TensorsOfSize(case[0].numel()) as tensors:
        torch.autograd.grad(y_TD.square().sum(), case)
    assert 1 <= len({tensor.untyped_storage().data_ptr() for tensor in tensors.found}) < EXPERTS


def test_a_layer_that_drops_rows_trains_alike_with_every_backend():
    outcomes = []
    for backend in ("sorted", "grouped"):
        config = MoEConfig(
            dim=DIM, hidden=HIDDEN, experts=ExpertCounts(ffn=EXPERTS), capacity_factor=0.6, backend=backend
        )
        layer = MoELayer(config)
        generator = torch.Generator().manual_seed(0)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        y, stats = layer(torch.randn(2, TOKENS, DIM, generator=generator))
        assert stats.dropped > 0
        outcomes.append([y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()), allow_unused=True)])
    for value, wanted in zip(*outcomes, strict=True):
        assert (value is None) == (wanted is None)  # the first layer's gating residual gets no gradient
        if value is not None:
            torch.testing.assert_close(value, wanted, rtol=1e-4, atol=2e-5)


def test_no_size_or_value_is_read_by_the_host():
    expert_TK = ASSIGNMENTS["random"].to("meta")  # meta tensors have no values, so reading one raises
    case = make_case(expert_TK, "scale and vectors", torch.bfloat16, "meta")
    assert [value.shape for value in evaluate("grouped", case, expert_TK)[1:]] == [leaf.shape for leaf in case]
    triton_experts.plan_tiles(plan_slots(RoutedTokens(case[2], expert_TK, case[3]), EXPERTS))


PLANNED = KERNELS[: len(TOLERANCE)] + kernels(
    ("triton", "cpu", interpreted, [torch.float32]),
    ("grouped by triton", "cpu", interpreted, [torch.float32]),
    *((backend, "cuda", on_gpu, [torch.bfloat16]) for backend in ("grouped", "triton")),
)


@pytest.mark.parametrize("assignment", ["random", "dropped rows", "none to an FFN", "top 3"])
@pytest.mark.parametrize(("backend", "device", "dtype"), PLANNED)
def test_no_more_rows_are_made_than_can_be_needed(backend, device, dtype, assignment):
    expert_TK = ASSIGNMENTS[assignment]
    served = int((expert_TK < EXPERTS).sum())
    case = make_case(expert_TK, "scale and vectors", dtype, device)
    with TensorsOfSize(expert_TK.numel() * DIM) as tensors:
        found = evaluate(backend, case, expert_TK, most_rows=served)
    assert_close(found, reference(case, expert_TK), dtype)
    assert not [t for t in tensors.found if t.shape[0] == expert_TK.numel()]


@pytest.mark.parametrize("kept", [0, 1, 20, 1000])
@pytest.mark.parametrize("assignment", ["random", "empty experts", "none to an FFN"])
@pytest.mark.parametrize(("backend", "device", "dtype"), PLANNED)
def test_rows_beyond_those_kept_are_exact_and_leave_nothing_behind(backend, device, dtype, assignment, kept):
    expert_TK = ASSIGNMENTS[assignment]
    case = make_case(expert_TK, "scale and vectors", dtype, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        found = evaluate(backend, case, expert_TK, kept_rows=kept)
    assert_close(found, reference(case, expert_TK), dtype)
    assert [len(z) for z in saved if z.shape[-1] == 2 * HIDDEN] == [min(kept, expert_TK.numel())]


@pytest.mark.parametrize("expert_TK", ASSIGNMENTS.values(), ids=ASSIGNMENTS)
def test_the_plan_sorts_every_slot_once_and_tiles_cover_every_served_row_once(expert_TK):
    plan = plan_slots(RoutedTokens(expert_TK, expert_TK, expert_TK), EXPERTS)
    tiles = triton_experts.plan_tiles(plan)
    ids = expert_TK.reshape(-1)
    expected = sorted(range(len(ids)), key=lambda slot: (min(int(ids[slot]), EXPERTS), slot))
    assert plan.slot_R.tolist() == expected
    assert plan.row_TK.reshape(-1)[plan.slot_R].tolist() == list(range(len(ids)))
    assert plan.end_E.tolist() == [int((ids <= expert).sum()) for expert in range(EXPERTS)]
    owner = {}
    for expert, start, end in zip(*(t.tolist() for t in vars(tiles).values()), strict=True):
        if expert < EXPERTS:
            rows = range(start, min(end, start + triton_experts.TILE_ROWS))
            assert rows and not owner.keys() & rows
            owner |= dict.fromkeys(rows, expert)
    assert [owner[row] for row in range(len(owner))] == sorted(ids[ids < EXPERTS].tolist())


@pytest.mark.parametrize(
    ("device", "major", "dtype", "hidden", "backend"),
    [
        ("cpu", 9, torch.bfloat16, 8, "sorted"),
        ("cuda", 9, torch.bfloat16, 8, "grouped"),
        ("cuda", 10, torch.bfloat16, 8, "grouped"),
        ("cuda", 8, torch.bfloat16, 8, "sorted"),  # grouped_mm would loop and wait for the host
        ("cuda", 9, torch.float32, 8, "sorted"),
        ("cuda", 9, torch.bfloat16, 12, "sorted"),  # grouped_mm would refuse
    ],
)
def test_auto_chooses_grouped_only_where_it_has_a_kernel(device, major, dtype, hidden, backend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    size = dtype.itemsize
    w_out = SimpleNamespace(
        is_cuda=device == "cuda", device=device, dtype=dtype, shape=(4, 16, hidden), element_size=lambda: size
    )
    assert choose_backend(w_out) == backend


def test_widths_and_types_that_grouped_mm_does_not_take_are_refused():
    ids, gates = torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)
    with pytest.raises(BackendError, match=r"dim=6 and hidden=5 to be multiples of 4 in torch\.float32"):
        LocalDispatcher("grouped")(
            torch.ones(2, 10, 6), torch.ones(2, 6, 5), RoutedTokens(torch.ones(2, 6), ids, gates)
        )
    w_in, w_out, x = (torch.ones(s, dtype=torch.float64) for s in [(2, 16, 8), (2, 8, 8), (2, 8)])
    with pytest.raises(BackendError, match="float64; choose backend=sorted"):
        LocalDispatcher("grouped")(w_in, w_out, RoutedTokens(x, ids, gates))


def test_triton_says_what_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(BackendError, match="pip install triton"):
        triton_experts._refuse_unsupported(torch.ones(1))


@interpreted
def test_triton_refuses_the_cpu_unless_interpreted_and_float64(monkeypatch):
    with pytest.raises(BackendError, match="float64"):
        triton_experts._refuse_unsupported(torch.ones(1, dtype=torch.float64))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendError, match="needs a GPU"):
        triton_experts._refuse_unsupported(torch.ones(1))


@pytest.mark.skipif(NO_TRITON, reason="needs the package triton")
def test_an_exact_float32_product_has_one_small_tile_and_all_others_are_measured():
    from moepp.layers.kernels.triton_kernels import suited

    def tiles(dtype, precision):
        return suited(["a", "b", "exact"], {"x": torch.ones(1, dtype=dtype)}, precision)

    assert tiles(torch.float32, "ieee") == ["exact"]
    assert tiles(torch.float32, "tf32") == tiles(torch.bfloat16, "ieee") == ["a", "b"]


@pytest.mark.skipif(NO_TRITON, reason="needs the package triton")
def test_every_triton_kernel_compiles_for_hopper(tmp_path):
    script = Path(__file__).with_name("compile_triton.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
    lines = map(str.split, result.stdout.splitlines())
    compiled = [(name, tile, *map(int, numbers)) for name, tile, *numbers in lines]
    products = {name for name, _, tensor_core_instructions, *_ in compiled if tensor_core_instructions}
    assert products == {f"{name}_kernel" for name in ("swiglu_in", "rows_matmul", "rows_outer", "swiglu_out_backward")}
    assert len({name for name, *_ in compiled}) == 14  # matrix products, passes over rows, the affine experts
    assert all(shared <= HOPPER_SHARED_MEMORY for *_, shared, _ in compiled)
    assert {(name, tile) for name, tile, *_, spilled in compiled if spilled} <= {
        ("swiglu_out_backward_kernel", "128x64x64")  # 40 bytes of 1,020 a thread has in registers
    }
