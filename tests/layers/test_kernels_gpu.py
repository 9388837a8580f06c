"""What only a GPU can show: no host synchronisation, repeatable bits, CUDA graphs."""

import contextlib

import pytest
import torch
from test_kernels import SYNC_FREE, TOTAL, evaluate, make_case, on_gpu

from moepp.layers.moe import MoELayer
from moepp.layers.settings import MoEConfig

LIMITS = {
    "capacity": {"capacity_factor": 1.1},
    "all rows": {"capacity_factor": None},
    "some rows": {"capacity_factor": None, "ffn_rows": 1.0},  # balanced routing needs 1.2: the rest is computed apart
}
WHOLE = pytest.mark.parametrize("limit", LIMITS)
PLANNED = pytest.mark.parametrize("backend", [pytest.param(name, marks=on_gpu) for name in ("grouped", "triton")])


def batch(seed, tokens=4096):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, TOTAL, generator=generator).topk(2).indices


@contextlib.contextmanager
def no_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(step):
    """A CUDA graph of `step`, and what it returns."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


@pytest.mark.parametrize(("backend", "device", "dtype"), SYNC_FREE)
def test_never_waits_for_the_host(backend, device, dtype):
    expert_TK = batch(0).to(device)
    case = make_case(expert_TK, "scale and vectors", dtype, device)
    evaluate(backend, case, expert_TK)  # compiles and tunes kernels, creates library handles
    with no_synchronisation():
        evaluate(backend, case, expert_TK)


@pytest.mark.parametrize(("backend", "device", "dtype"), SYNC_FREE)
def test_two_runs_give_the_same_bits(backend, device, dtype):
    case = make_case(batch(0), "scale and vectors", dtype, device)
    for first, second in zip(*(evaluate(backend, case, batch(0)) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(("backend", "device", "dtype"), SYNC_FREE)
def test_a_replayed_cuda_graph_follows_new_routing(backend, device, dtype):
    expert_TK = batch(0).to(device)
    case = make_case(expert_TK, "scale and vectors", dtype, device)
    graph, replayed = captured(lambda: evaluate(backend, case, expert_TK))
    expert_TK.copy_(batch(1))
    graph.replay()
    for value, wanted in zip(replayed, evaluate(backend, case, expert_TK), strict=True):
        assert torch.equal(value, wanted)


def layer_step(backend, limit, tokens=2048):
    """A function that does forward and backward of a whole layer, and the batch that it reads."""
    layer = MoELayer(MoEConfig(dim=64, hidden=96, backend=backend, **LIMITS[limit]), first=False).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    x_BSD = torch.randn(1, tokens, 64, device="cuda", generator=generator)
    previous_TN = torch.randn(tokens, 12, device="cuda", generator=generator).requires_grad_()
    leaves = [*layer.parameters(), previous_TN]

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            y_BSD, stats = layer(x_BSD, previous_TN)
        loss = y_BSD.square().mean() + stats.balance_loss + stats.carried.square().mean()
        return y_BSD.detach(), stats.chosen_N, *torch.autograd.grad(loss, leaves)

    return step, x_BSD


@WHOLE
@PLANNED
def test_the_whole_layer_never_waits_for_the_host(backend, limit):
    step, _ = layer_step(backend, limit)
    step()
    with no_synchronisation():
        step()


@WHOLE
@PLANNED
def test_the_whole_layer_is_replayed_as_a_cuda_graph(backend, limit):
    step, x_BSD = layer_step(backend, limit)
    graph, replayed = captured(step)
    x_BSD.copy_(torch.randn(x_BSD.shape, generator=torch.Generator().manual_seed(1)))
    graph.replay()
    for value, wanted in zip(replayed, step(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-4)
    assert len(replayed[1].unique()) > 1  # the batch is not routed evenly, nor all to one


@WHOLE
@PLANNED
def test_the_whole_layer_equals_the_sorted_kernel(backend, limit):
    ours, wanted = layer_step(backend, limit)[0](), layer_step("sorted", limit)[0]()
    for value, reference in zip(ours, wanted, strict=True):
        assert (value.double() - reference.double()).norm() <= 2e-2 * reference.double().norm()
