"""The estimate of memory against what autograd keeps, and on a GPU against the allocator."""

import math

import pytest
import torch

from moepp.config import compose
from moepp.models import cross_entropy
from moepp.models.decoder import Decoder
from moepp.training import estimate
from moepp.training.device_state import STATE_BYTES
from moepp.training.estimate import StepMemory
from moepp.training.loss import training_losses
from moepp.training.optim import build_optimizer
from moepp.training.settings import OptimConfig, RunConfig

SIZE = [
    "size=smoke", "trainer.precision=bf16-mixed", "model.backend=grouped", "model.dim=128", "model.heads=4",
    "model.hidden=352", "model.vocab_size=512",
]  # fmt: skip
BATCH, LENGTH = 4, 128
ARMS = {
    "moepp": [],
    "dropless": ["model.capacity_factor=null"],
    "fewer_rows": ["model.capacity_factor=null", "model.ffn_rows=1.2"],
    "vanilla": ["model=vanilla"],
    "dense": ["model=dense", "model.kv_heads=2"],
    "shared": ["model=shared_moepp"],
    "every_other": ["model.moe_every=2"],
}


def config(*more):
    return compose(RunConfig, [*SIZE, *more])


def kept_bytes(model, tokens):
    """What autograd keeps for the backward pass beside the parameters themselves, every storage once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        losses = training_losses(model, tokens)
    assert losses[0].requires_grad
    return sum(size for pointer, (size, _) in kept.items() if pointer not in parameters)


def scaled_inputs(model, tokens):
    """Bytes of a CPU's RMSNorms, which are put together from other operations and keep a second float32 input each; a
    GPU's fused one does not.
    """
    norms = 1 if model.config.activation_checkpointing else 2 * model.config.layers + 1  # others are recomputed
    return 4 * norms * model.config.dim * tokens


@pytest.mark.parametrize("checkpointing", ["false", "true"], ids=["kept", "recomputed"])
@pytest.mark.parametrize("arm", ARMS)
def test_the_estimate_counts_what_autograd_keeps(arm, checkpointing, monkeypatch):
    monkeypatch.setattr(cross_entropy, "WHOLE", 10_000)  # so that it keeps the gradients, as on a GPU
    settings = config(*ARMS[arm], f"model.activation_checkpointing={checkpointing}").model
    model, tokens = Decoder(settings, seed=0), BATCH * LENGTH
    ids = torch.randint(0, settings.vocab_size, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    found = kept_bytes(model, ids) - scaled_inputs(model, tokens)
    estimated = sum(StepMemory(settings, tokens, "bf16-mixed").kept().values())
    assert estimated == pytest.approx(found, rel=0.04)


def test_every_part_follows_what_it_is_of():
    def parts(*more, tokens=4096):
        return StepMemory(config(*more).model, tokens, "bf16-mixed").kept()

    base, few = parts(), parts("model.capacity_factor=0.55")
    assert few["of FFN rows"] < base["of FFN rows"] and few["of routers"] == base["of routers"]
    assert parts("model=vanilla")["of FFN rows"] > base["of FFN rows"]
    twice = parts(tokens=8192)
    assert twice["of attention and norms"] == 2 * base["of attention and norms"]
    assert twice["of weights in bfloat16"] == base["of weights in bfloat16"]
    assert StepMemory(config().model, 4096, "32-true").kept()["of weights in bfloat16"] == 0


@pytest.mark.parametrize(("tokens", "logits"), [(65536, 2**27), (1024, 2**26)], ids=["chunks", "one chunk"])
def test_the_loss_takes_a_chunk_of_logits_and_the_gradients(tokens, logits):
    model = config("model.dim=768", "model.heads=12", "model.vocab_size=65536").model
    dim, vocabulary = 768, 65536
    peak = StepMemory(model, tokens, "bf16-mixed").head_peak()
    assert peak == 2 * logits + 8 * dim * vocabulary + 14 * dim * tokens
    if tokens == vocabulary:
        assert peak / (tokens * vocabulary) < 0.35  # bytes per token and entry; 14 with whole float32 logits


def test_the_line_names_the_parts_of_its_sum():
    lines = estimate.estimate(config("trainer.accumulate=2", "model.activation_checkpointing=true"))
    (line,) = [line for line in lines if line.startswith("memory per device")]
    assert "4 sequences at a time" in line
    for part in ("of weights, gradients and AdamW", "of block inputs", "peak"):
        assert part in line
    total, *parts = [float(word) for word in line.replace(",", " ").split() if word.replace(".", "").isdigit()]
    assert total == pytest.approx(sum(parts[1:]), rel=0.1)  # the first is the number of sequences


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("checkpointing", ["false", "true"], ids=["kept", "recomputed"])
@pytest.mark.parametrize("vocabulary", [4096, 32768], ids=["whole", "chunked"])
@pytest.mark.parametrize("arm", ["moepp", "vanilla"])
def test_the_estimate_is_the_allocators_peak(arm, vocabulary, checkpointing):
    sizes = ["model.dim=512", "model.heads=8", "model.hidden=1376", "model.layers=4", f"model.vocab_size={vocabulary}"]
    settings = config(*ARMS[arm], *sizes, f"model.activation_checkpointing={checkpointing}").model
    batch, length = 16, 1024
    model = Decoder(settings, seed=0).cuda()
    optimizer = build_optimizer(model, OptimConfig())
    ids = torch.randint(0, vocabulary, (batch, length + 1), device="cuda")
    for micro_batch in range(3):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            cross_entropy_, balance, _ = training_losses(model, ids)
        (cross_entropy_ + balance).backward()
        if micro_batch == 0:
            optimizer.step()  # its states and the gradients are there from now on
    memory = StepMemory(settings, batch * length, "bf16-mixed").peak()
    peak = torch.cuda.max_memory_allocated()
    state = STATE_BYTES * sum(math.prod(p.shape) for p in model.parameters())
    assert sum(memory.values()) + state == pytest.approx(peak, rel=0.15)
    assert sum(memory.values()) == pytest.approx(peak - state, rel=0.25)
