import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from moepp.models import cross_entropy
from moepp.models.cross_entropy import is_largest, linear_cross_entropy, target_scores
from moepp.models.decoder import Decoder
from moepp.models.settings import DecoderConfig

TOKENS, DIM, VOCABULARY = 23, 16, 61
CHUNK = 5 * VOCABULARY  # 5 tokens: the last chunk is smaller

GPU = torch.cuda.is_available()
NO_TRITON = importlib.util.find_spec("triton") is None
interpreted = pytest.mark.skipif(GPU or NO_TRITON, reason="needs the package triton, and no CUDA device")
on_gpu = (pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device"))


class LargestTensor(TorchDispatchMode):
    """The most elements that any operation put out."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if torch.is_tensor(tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.fixture(params=[CHUNK, 1], ids=["chunks", "tokens"])
def chunked(request, monkeypatch):
    monkeypatch.setattr(cross_entropy, "WHOLE", request.param)


def inputs(dtype=torch.float32, tokens=TOKENS):
    generator = torch.Generator().manual_seed(0)
    x_TD, weight_VD = (torch.randn(n, DIM, generator=generator, dtype=dtype) for n in (tokens, VOCABULARY))
    target_T = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
    return x_TD.requires_grad_(), weight_VD.requires_grad_(), target_T


def plain(x_TD, weight_VD, target_T):
    logits = F.linear(x_TD, weight_VD)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target_T)


def loss_and_gradients(function, dtype=torch.float32, upstream=1.0, autocast=False):
    x_TD, weight_VD, target_T = inputs(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = function(x_TD, weight_VD, target_T)
    return loss, *torch.autograd.grad(loss * upstream, (x_TD, weight_VD))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("upstream", [1.0, -0.37])
def test_chunks_give_the_loss_and_the_gradients_of_the_whole(chunked, dtype, tolerance, upstream):
    wanted = loss_and_gradients(plain, dtype, upstream)
    for found, reference in zip(loss_and_gradients(linear_cross_entropy, dtype, upstream), wanted, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, reference, rtol=tolerance, atol=tolerance)


def test_under_autocast_products_are_bfloat16_and_the_heads_gradient_is_summed_in_float32(chunked):
    exact = loss_and_gradients(plain, torch.float64)
    whole = loss_and_gradients(plain, autocast=True)
    for found, reference, wanted in zip(
        loss_and_gradients(linear_cross_entropy, autocast=True), whole, exact, strict=True
    ):
        assert found.dtype == torch.float32
        scale = wanted.abs().max()
        assert (found - wanted).abs().max() <= 1.5 * (reference - wanted).abs().max() + 2**-9 * scale
    assert not torch.equal(loss_and_gradients(linear_cross_entropy)[0], whole[0])  # those were not bfloat16


def test_few_logits_are_computed_as_ever_bit_for_bit():
    found = loss_and_gradients(linear_cross_entropy)
    assert all(torch.equal(a, b) for a, b in zip(found, loss_and_gradients(plain), strict=True))


def test_logits_never_exist_as_a_whole(monkeypatch):
    monkeypatch.setattr(cross_entropy, "WHOLE", CHUNK)
    tokens = 200
    for function in (linear_cross_entropy, target_scores):
        with LargestTensor() as seen:
            result = function(*inputs(tokens=tokens))
            if function is linear_cross_entropy:
                result.backward()
        assert seen.elements == tokens * DIM > CHUNK
    with LargestTensor() as seen:
        plain(*inputs(tokens=tokens))
    assert seen.elements == tokens * VOCABULARY


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_the_gradient_that_is_wanted_is_kept(chunked, frozen):
    given, kept = list(inputs()), []
    given[frozen].requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda kept: kept):
        linear_cross_entropy(*given)
    assert kept == [given[1 - frozen].shape]


def test_without_gradients_nothing_is_kept(chunked):
    x_TD, weight_VD, target_T = inputs()
    loss = linear_cross_entropy(x_TD.detach(), weight_VD.detach(), target_T)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(x_TD, weight_VD, target_T).detach())


def test_a_second_derivative_is_refused(chunked):
    x_TD, weight_VD, target_T = inputs()
    upstream = torch.ones((), requires_grad=True)
    loss = linear_cross_entropy(x_TD, weight_VD, target_T) * upstream
    (dx_TD,) = torch.autograd.grad(loss, x_TD, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative only"):
        dx_TD.sum().backward()


def test_every_target_is_scored_by_chunks_as_by_the_whole(chunked, monkeypatch):
    x_TD, weight_VD, target_T = inputs()
    logp_TV = F.linear(x_TD, weight_VD).log_softmax(-1)
    target_T[::2] = logp_TV.argmax(-1)[::2]
    right_T = logp_TV.argmax(-1) == target_T
    found = target_scores(x_TD, weight_VD, target_T)
    monkeypatch.setattr(cross_entropy, "WHOLE", 2**20)
    assert right_T.any() and not right_T.all()
    for nats_T, is_right_T in (found, target_scores(x_TD, weight_VD, target_T)):
        torch.testing.assert_close(nats_T, -logp_TV.detach()[torch.arange(TOKENS), target_T])
        assert torch.equal(is_right_T, right_T)


@pytest.mark.parametrize("whole", [CHUNK, 2**20], ids=["chunks", "one chunk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=on_gpu)]
)  # fmt: skip
def test_one_kernel_gives_the_loss_and_writes_its_gradient_over_the_logits(device, dtype, whole, monkeypatch):
    from moepp.models import triton_cross_entropy

    monkeypatch.setattr(triton_cross_entropy, "BLOCK", 16)  # the vocabulary takes four, and fills three
    monkeypatch.setattr(cross_entropy, "WHOLE", whole)
    monkeypatch.setattr(cross_entropy, "takes_triton", lambda tensor: True)
    monkeypatch.setattr(cross_entropy, "loss_and_gradient", None)
    x_TD, weight_VD, target_T = (tensor.to(device) for tensor in inputs())
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (4 * x_TD, weight_VD)]
    target_T[:2] = torch.tensor([0, VOCABULARY - 1])
    loss = linear_cross_entropy(*leaves, target_T)
    found = loss, *torch.autograd.grad(-0.37 * loss, leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    reference = plain(*exact, target_T)
    wanted = reference, *torch.autograd.grad(-0.37 * reference, exact)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert loss.dtype == torch.float32 and reference > 5
    for value, right in zip(found, wanted, strict=True):
        assert (value.double() - right).norm() <= tolerance * right.norm()


@pytest.mark.skipif(NO_TRITON, reason="needs the package triton")
def test_a_target_that_is_no_id_has_no_loss_and_reads_no_other_row():
    from moepp.models.triton_cross_entropy import loss_and_gradient_

    device = "cuda" if GPU else "cpu"
    target_C = torch.tensor([-100, 3, VOCABULARY], device=device)
    nats_C, gradient_CV = loss_and_gradient_(torch.zeros(3, VOCABULARY, device=device), target_C)
    assert nats_C.isnan().tolist() == [True, False, True]
    torch.testing.assert_close(gradient_CV[0], torch.full_like(gradient_CV[0], 1 / VOCABULARY))


def test_no_tokens_have_a_loss_that_is_no_number(monkeypatch):
    monkeypatch.setattr(cross_entropy, "takes_triton", lambda tensor: True)
    monkeypatch.setattr(cross_entropy, "loss_and_gradient_in_place", cross_entropy.loss_and_gradient)
    x_TD, weight_VD, target_T = inputs(tokens=0)
    loss = linear_cross_entropy(x_TD, weight_VD, target_T)
    assert loss.isnan()
    loss.backward()
    assert x_TD.grad.shape == (0, DIM)


def test_the_gradient_of_many_tokens_is_no_zero_in_float16(monkeypatch):
    """Each is a share of 1 / tokens, below what float16 can hold."""
    monkeypatch.setattr(cross_entropy, "WHOLE", 1000 * VOCABULARY)
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(50_000, DIM, generator=generator).half().requires_grad_()
    weight_VD = torch.randn(VOCABULARY, DIM, generator=generator).half().requires_grad_()
    target_T = torch.randint(0, VOCABULARY, (50_000,), generator=generator)
    (found,) = torch.autograd.grad(linear_cross_entropy(x_TD, weight_VD, target_T), weight_VD)
    exact = weight_VD.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(F.cross_entropy(F.linear(x_TD.detach().double(), exact), target_T), exact)
    assert (found.double() - wanted).norm() <= 5e-3 * wanted.norm()


@pytest.mark.skipif(NO_TRITON, reason="needs the package triton")
def test_a_row_without_a_number_has_no_loss(monkeypatch):
    from moepp.models.triton_cross_entropy import loss_and_gradient_

    device = "cuda" if GPU else "cpu"
    logits_CV = torch.zeros(3, VOCABULARY, device=device)
    logits_CV[0, 7], logits_CV[2, 7] = torch.nan, torch.inf
    nats_C, gradient_CV = loss_and_gradient_(logits_CV, torch.zeros(3, dtype=torch.int64, device=device))
    assert nats_C.isnan().tolist() == [True, False, True]
    assert gradient_CV[[0, 2]].isnan().any(1).all() and gradient_CV[1].isfinite().all()


@pytest.mark.parametrize("tied", [False, True])
def test_the_decoders_loss_by_chunks_has_the_gradients_of_the_whole(chunked, tied, monkeypatch):
    config = DecoderConfig(dim=16, hidden=8, layers=1, heads=2, vocab_size=VOCABULARY, tie_embeddings=tied)
    ids_BS = torch.randint(0, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(0))

    def outcome():
        model = Decoder(config, seed=0)
        loss = model(ids_BS[:, :-1], targets_BS=ids_BS[:, 1:]).cross_entropy
        return loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    found = outcome()
    monkeypatch.setattr(cross_entropy, "WHOLE", 2**20)
    for value, reference in zip(found, outcome(), strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_chunks_take_less_memory_than_float32_logits_and_have_the_same_gradients(monkeypatch):
    tokens, dim, vocabulary = 8192, 256, 32768
    monkeypatch.setattr(cross_entropy, "WHOLE", 2**24)  # 512 tokens
    generator = torch.Generator("cuda").manual_seed(0)
    x_TD = torch.randn(tokens, dim, device="cuda", generator=generator).requires_grad_()
    weight_VD = (0.05 * torch.randn(vocabulary, dim, device="cuda", generator=generator)).requires_grad_()
    target_T = torch.randint(0, vocabulary, (tokens,), device="cuda", generator=generator)
    outcomes = []
    for function in (linear_cross_entropy, plain):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            loss = function(x_TD, weight_VD, target_T)
        gradients = torch.autograd.grad(loss, (x_TD, weight_VD))
        outcomes.append((torch.cuda.max_memory_allocated() - before, loss.detach(), *gradients))
        del loss, gradients
    (peak, *found), (whole, *wanted) = outcomes
    assert peak < 4 * tokens * vocabulary < whole
    for value, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, reference, rtol=2e-2, atol=2e-2 * float(reference.abs().max()))


def test_of_equal_logits_the_first_is_the_largest():
    logits_CV = torch.tensor([[0.0, 2.0, 2.0], [2.0, 0.0, 2.0], [1.0, 3.0, 2.0], [-1.0, -2.0, -1.0]])
    for target in range(3):
        target_C = torch.full((4,), target)
        assert torch.equal(is_largest(logits_CV, target_C), logits_CV.argmax(-1) == target_C)
