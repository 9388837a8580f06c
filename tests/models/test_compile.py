import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from moepp.layers.settings import ExpertCounts
from moepp.models.decoder import Decoder
from moepp.models.settings import DecoderConfig

BATCHES = 3  # each routes otherwise, so a graph that depends on the sizes would be compiled again


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(backend):
    experts = ExpertCounts(ffn=4, zero=1, copy=1, constant=2)
    sizes = {"dim": 32, "hidden": 24, "layers": 2, "heads": 4, "vocab_size": 61, "init_std": 0.2}
    return Decoder(DecoderConfig(experts=experts, backend=backend, **sizes), seed=0)


def losses_and_gradients(model, loss):
    for batch in range(BATCHES):
        ids = torch.randint(0, 61, (2, 13), generator=torch.Generator().manual_seed(batch))
        value = loss(ids)
        yield value, *torch.autograd.grad(value, list(model.parameters()))


@pytest.mark.parametrize(
    ("backend", "dtype", "whole"),
    [
        ("grouped", torch.bfloat16, True),  # grouped_mm's shape inference refuses float32
        ("sorted", torch.float32, False),  # leaves the graph for its host-side sizes
    ],
)
def test_compiled_decoder_has_the_same_loss_and_gradients_without_recompiling(backend, dtype, whole):
    model = make(backend)

    def loss(ids):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = model(ids[:, :-1])
        return F.cross_entropy(output.logits.float().flatten(0, 1), ids[:, 1:].flatten()) + model.balance_loss(output)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=whole)
    graphs = []
    for expected, found in zip(losses_and_gradients(model, loss), losses_and_gradients(model, compiled), strict=True):
        graphs.append(counter.frame_count)
        for value, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-6)
    assert graphs == [1 if whole else graphs[0]] * BATCHES
