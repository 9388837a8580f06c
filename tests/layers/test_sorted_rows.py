"""What a pass of the sorted backend keeps, allocates and calls. Its values are those of test_dispatch.py."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moepp.benchmarks.memory import peak_bytes
from moepp.layers.dispatch import LocalDispatcher
from moepp.layers.kernels import cpu, sorted_rows
from moepp.layers.kernels.base import Affine, RoutedTokens

EXPERTS, TOKENS, DIM, HIDDEN = 8, 64, 16, 32


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


def make_case(dtype=torch.float32, frozen=()):
    """Weights, tokens and the leaves among them; every second slot goes to no FFN expert."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "w_in": (EXPERTS, 2 * HIDDEN, DIM),
        "w_out": (EXPERTS, DIM, HIDDEN),
        "x": (TOKENS, DIM),
        "scale": (TOKENS,),
    }
    leaves = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    leaves |= {name: leaves[name].to(dtype) for name in ("w_in", "w_out", "x")}
    leaves["gate"] = torch.rand(TOKENS, 2, generator=generator)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name not in frozen)
    first_T = torch.arange(TOKENS) % EXPERTS
    expert_TK = torch.stack([first_T, torch.full_like(first_T, EXPERTS)], 1)
    return leaves, RoutedTokens(leaves["x"], expert_TK, leaves["gate"], Affine(leaves["scale"]))


def forward(leaves, tokens):
    return LocalDispatcher("sorted")(leaves["w_in"], leaves["w_out"], tokens)


def test_small_experts_share_the_passes_between_their_products():
    leaves, tokens = make_case()
    with Calls() as calls:
        forward(leaves, tokens).sum().backward()
    assert calls.names.count("mm") == 6 * EXPERTS
    assert calls.names.count("silu") == 2 and calls.names.count("silu_backward") == 1
    assert len(calls.names) <= 6 * EXPERTS + 110


def test_a_pass_without_gradients_holds_one_block_at_a_time(monkeypatch):
    monkeypatch.setattr(sorted_rows, "BLOCK_NUMBERS", 1)
    leaves, tokens = make_case()
    with_gradients = peak_bytes(lambda: forward(leaves, tokens), torch.device("cpu"))
    with torch.no_grad():
        without = peak_bytes(lambda: forward(leaves, tokens), torch.device("cpu"))
    z = 4 * TOKENS * 2 * HIDDEN
    assert with_gradients - without > z / 2


def test_all_blocks_work_in_the_same_memory(monkeypatch):
    monkeypatch.setattr(sorted_rows, "BLOCK_NUMBERS", 1)
    monkeypatch.setattr(sorted_rows, "with_scratch", watched := Watched(sorted_rows.with_scratch))
    trained(make_case())
    assert [len(addresses) for addresses in watched.addresses] == [3, 4]


class Watched:
    """The same function, and the addresses of the memory that each of its calls hands out."""

    def __init__(self, function):
        self.function, self.addresses = function, []

    def __call__(self, *args):
        self.addresses.append(seen := set())
        for block, scratch in self.function(*args):
            seen.update(memory.data_ptr() for memory in scratch)
            yield block, scratch


def test_large_experts_are_taken_one_by_one(monkeypatch):
    whole = [leaf.grad for leaf in trained(make_case())]
    monkeypatch.setattr(sorted_rows, "BLOCK_NUMBERS", 1)
    with Calls() as calls:
        single = [leaf.grad for leaf in trained(make_case())]
    assert calls.names.count("silu") == 2 * EXPERTS
    assert all(torch.equal(a, b) for a, b in zip(whole, single, strict=True))


def trained(case):
    leaves, tokens = case
    y_TD = forward(leaves, tokens)
    (y_TD * torch.linspace(-1, 1, y_TD.numel()).view_as(y_TD)).sum().backward()
    return leaves.values()


def test_a_gradient_is_written_once_into_its_place():
    """No gradient of a single expert, none stacked, none added to another: what `.grad` holds is what was written."""
    leaves, tokens = make_case()
    y_TD = forward(leaves, tokens)
    with Calls() as calls:
        y_TD.sum().backward()
    assert not {"clone", "stack", "select_backward", "slice_backward", "index_put"} & set(calls.names)
    assert all(leaves[name].grad.untyped_storage().nbytes() == leaves[name].nbytes for name in ("w_in", "w_out"))


def test_kept_is_z_of_the_rows_that_ffn_experts_have():
    leaves, tokens = make_case()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        forward(leaves, tokens)
    known = {leaf.untyped_storage().data_ptr() for leaf in leaves.values()}
    numbers = sum(tensor.numel() for tensor in kept if tensor.untyped_storage().data_ptr() not in known)
    assert numbers <= TOKENS * 2 * HIDDEN + 6 * TOKENS  # and ids and gates


def test_without_gradients_nothing_is_kept():
    leaves, tokens = make_case()
    saved = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        forward(leaves, tokens)
    assert not saved


@pytest.mark.parametrize(("frozen", "products"), [(("w_in", "w_out"), 4), (("w_in",), 5), ((), 6)])
def test_frozen_weights_cost_no_product(frozen, products):
    leaves, tokens = make_case(frozen=frozen)
    with Calls() as calls:
        forward(leaves, tokens).sum().backward()
    assert calls.names.count("mm") == products * EXPERTS
    assert all((leaves[name].grad is None) == (name in frozen) for name in leaves)


def test_a_second_backward_pass_gives_the_same_gradients():
    leaves, tokens = make_case()
    loss = forward(leaves, tokens).square().sum()
    first = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    again = torch.autograd.grad(loss, list(leaves.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_multiplied_in_what_the_cpu_multiplies(monkeypatch, native):
    flags = frozenset({"avx512f", "avx512_bf16"} if native else {"avx2"})
    monkeypatch.setattr(cpu, "_flags", lambda: flags)
    leaves, tokens = make_case(torch.bfloat16)
    dtypes = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket is torch.ops.aten.mm:
                dtypes.add(args[0].dtype)
            return func(*args, **kwargs or {})

    with Products():
        forward(leaves, tokens).sum().backward()
    assert dtypes == {torch.bfloat16 if native else torch.float32}
    exact = trained(make_case(torch.float64))
    for leaf, wanted in zip(trained(make_case(torch.bfloat16)), exact, strict=True):
        assert (leaf.grad.double() - wanted.grad).norm() <= 3e-2 * wanted.grad.norm()


@pytest.mark.parametrize(
    ("line", "multiplies"),
    [
        ("flags\t\t: fpu avx2 avx512f", False),
        ("flags\t\t: fpu avx2 avx512f avx512_bf16", True),
        ("flags\t\t: avx2 amx_tile amx_bf16", True),
        ("Features\t: fp asimd", False),
        ("Features\t: fp asimd sve bf16", True),
        ("", True),
    ],
)
def test_the_cpu_says_whether_it_multiplies_bfloat16(monkeypatch, tmp_path, line, multiplies):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    monkeypatch.setattr(cpu, "Path", lambda path: tmp_path / "cpuinfo")
    cpu._flags.cache_clear()
    try:
        assert cpu.multiplies_bfloat16() is multiplies
    finally:
        cpu._flags.cache_clear()
