import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from moepp.layers.settings import ExpertCounts
from moepp.models import cross_entropy
from moepp.models.decoder import Decoder
from moepp.models.settings import DecoderConfig

BATCHES = 3  # each routes otherwise, so a graph that depends on the sizes would be compiled again


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(backend, device="cpu", **changes):
    experts = ExpertCounts(ffn=4, zero=1, copy=1, constant=2)
    sizes = {"dim": 32, "hidden": 24, "layers": 2, "heads": 4, "vocab_size": 61, "init_std": 0.2}
    return Decoder(DecoderConfig(experts=experts, backend=backend, **sizes | changes), seed=0).to(device)


def losses_and_gradients(model, loss):
    device = model.embedding.weight.device
    for batch in range(BATCHES):
        ids = torch.randint(0, 61, (2, 13), generator=torch.Generator().manual_seed(batch)).to(device)
        value = loss(ids)
        yield value, *torch.autograd.grad(value, list(model.parameters()))


def loss_of(model, narrow):
    def loss(ids):
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=narrow):
            output = model(ids[:, :-1], targets_BS=ids[:, 1:])
        return output.cross_entropy + model.balance_loss(output)

    return loss


@pytest.mark.parametrize(
    ("backend", "dtype", "whole"),
    [
        ("grouped", torch.bfloat16, True),  # grouped_mm's shape inference refuses float32
        ("sorted", torch.float32, False),  # leaves the graph for its host-side sizes
    ],
)
@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_compiled_decoder_has_the_same_loss_and_gradients_without_recompiling(
    backend, dtype, whole, chunked, checkpointing, monkeypatch
):
    if chunked:
        monkeypatch.setattr(cross_entropy, "WHOLE", 10 * 61)
    model = make(backend, activation_checkpointing=checkpointing)
    loss = loss_of(model, dtype == torch.bfloat16)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=whole)
    graphs = []
    for expected, found in zip(losses_and_gradients(model, loss), losses_and_gradients(model, compiled), strict=True):
        graphs.append(counter.frame_count)
        for value, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-6)
    assert graphs == [1 if whole else graphs[0]] * BATCHES


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_on_a_gpu_the_compiled_decoder_is_one_graph_and_close_to_the_plain_one(chunked, checkpointing, monkeypatch):
    if chunked:
        monkeypatch.setattr(cross_entropy, "WHOLE", 10 * 61)
    # Every token chooses all experts: a choice that rounding decides would be another model.
    model = make("grouped", "cuda", activation_checkpointing=checkpointing, capacity_factor=None, top_k=8)
    loss = loss_of(model, narrow=True)
    compiled = torch.compile(loss, fullgraph=True, dynamic=False)
    for expected, found in zip(losses_and_gradients(model, loss), losses_and_gradients(model, compiled), strict=True):
        torch.testing.assert_close(found[0], expected[0], rtol=2e-2, atol=2e-2)
        for value, reference in zip(found[1:], expected[1:], strict=True):  # bfloat16 rounds elsewhere when fused
            assert (value - reference).norm() <= 0.1 * reference.norm() + 1e-4
    assert not torch._dynamo.utils.counters["graph_break"]
