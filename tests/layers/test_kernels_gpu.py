"""What only a GPU can show: no host synchronisation, repeatable bits, CUDA graphs, and the backends' speed."""

import pytest
import torch
from test_kernels import SYNC_FREE, TOTAL, evaluate, make_case

from moepp.layers.dispatch import BACKENDS


def batch(seed, tokens=4096):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, TOTAL, generator=generator).topk(2).indices


@pytest.mark.parametrize(("backend", "device", "dtype"), SYNC_FREE)
def test_never_waits_for_the_host(backend, device, dtype):
    expert_TK = batch(0).to(device)
    case = make_case(expert_TK, "scale and vectors", dtype, device)
    evaluate(backend, case, expert_TK)  # compiles kernels and creates library handles
    torch.cuda.set_sync_debug_mode("error")
    try:
        evaluate(backend, case, expert_TK)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("backend", "device", "dtype"), SYNC_FREE)
def test_two_runs_give_the_same_bits(backend, device, dtype):
    case = make_case(batch(0), "scale and vectors", dtype, device)
    for first, second in zip(*(evaluate(backend, case, batch(0)) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(("backend", "device", "dtype"), SYNC_FREE)
def test_a_replayed_cuda_graph_follows_new_routing(backend, device, dtype):
    expert_TK = batch(0).to(device)
    case = make_case(expert_TK, "scale and vectors", dtype, device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        evaluate(backend, case, expert_TK)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = evaluate(backend, case, expert_TK)
    expert_TK.copy_(batch(1))
    graph.replay()
    for value, wanted in zip(replayed, evaluate(backend, case, expert_TK), strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_print_the_speed_of_every_backend(capsys):
    experts, dim, hidden, tokens, top_k = 8, 768, 2048, 16384, 2
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(experts, 2 * hidden, dim), (experts, dim, hidden), (tokens, dim)]
    case = [torch.randn(s, device="cuda", generator=generator).bfloat16().requires_grad_() for s in shapes]
    ids = torch.rand(tokens, experts + 4, device="cuda", generator=generator).topk(top_k).indices
    gates = torch.rand(tokens, top_k, device="cuda", generator=generator).requires_grad_()
    grad = torch.randn(tokens, dim, device="cuda", generator=generator)
    gigaflops = 18 * dim * hidden * int((ids < experts).sum()) / 1e9  # forward, and twice that backward
    for backend, dispatch in BACKENDS.items():
        times = []
        for _ in range(20):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            torch.autograd.grad(dispatch(*case, ids, gates, None), [*case, gates], grad)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        median = sorted(times[5:])[len(times[5:]) // 2]
        with capsys.disabled():
            print(f"\n{backend}: {median:.2f} ms forward and backward, {gigaflops / median:.0f} TFLOP/s of products")
