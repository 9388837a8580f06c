"""MoE++ inside the installed Megatron-Core's MoE layer against this package's own: outputs, losses, gradients.
scripts/pretrain_parity.sh makes the environment.
"""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

pytest.importorskip("megatron.core")

from megatron.core import parallel_state
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig

from moepp.layers.moe import MoELayer
from moepp.layers.settings import BalanceConfig, ExpertCounts
from moepp.models.settings import DecoderConfig
from moepp.pretrain.megatron import MoEPlusPlus, from_megatron, to_megatron

FORMS = {
    "moepp": {},
    "tight": {"capacity_factor": 0.6},
    "sequence": {"capacity_factor": 0.8, "capacity_over": "sequence", "balance": BalanceConfig(over="sequence")},
    "paper": {"gate": "softmax", "balance": BalanceConfig(form="paper", z_loss=1e-3), "capacity_factor": None},
    "vanilla": {"experts": ExpertCounts(4, 0, 0, 0), "gating_residual": False, "capacity_factor": None},
}


@pytest.fixture(autouse=True)
def no_streams(monkeypatch):
    """The all-to-all dispatcher copies counts to the host on a stream of its own, which a CPU has not."""
    stream = mock.MagicMock()
    monkeypatch.setattr(MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("megatron") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def pair(decoder: DecoderConfig, dispatcher: str) -> tuple[list[MoELayer], list[MoEPlusPlus]]:
    """Two layers of each kind with the same weights."""
    config = TransformerConfig(
        num_layers=2, hidden_size=decoder.dim, num_attention_heads=4, num_moe_experts=decoder.experts.ffn,
        moe_ffn_hidden_size=decoder.hidden, ffn_hidden_size=decoder.hidden, moe_router_topk=decoder.top_k,
        moe_token_dispatcher_type=dispatcher, moe_expert_capacity_factor=1.0, gated_linear_unit=True,
        activation_func=F.silu, add_bias_linear=False, use_cpu_initialization=True, bias_activation_fusion=False,
        moe_router_load_balancing_type="none",
    )  # fmt: skip
    submodules = get_moe_module_spec(use_te=False, num_experts=decoder.experts.ffn, moe_grouped_gemm=False).submodules
    ours, theirs = [], []
    for first in (True, False):
        layer = MoELayer(decoder, first).train()
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        other = MoEPlusPlus(config, submodules, decoder, previous=theirs[-1] if theirs else None).train()
        other.load_state_dict(to_megatron(layer.state_dict()), strict=False)
        ours, theirs = [*ours, layer], [*theirs, other]
    return ours, theirs


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
@pytest.mark.parametrize("form", FORMS)
def test_outputs_losses_and_gradients_are_those_of_our_layers(form, dispatcher):
    torch.manual_seed(0)
    small = {"dim": 32, "hidden": 48, "layers": 2, "heads": 4, "vocab_size": 64, "experts": ExpertCounts(4, 1, 1, 2)}
    ours, theirs = pair(DecoderConfig(**small | FORMS[form]), dispatcher)
    x_BSD, weights_BSD = torch.randn(2, 3, 16, 32)
    wanted, carried, balance = x_BSD, None, 0
    for layer in ours:
        y_BSD, stats = layer(wanted, carried)
        wanted, carried = wanted + y_BSD, stats.carried
        shares = 1 if layer.config.balance.form == "paper" else 2
        balance = balance + layer.config.balance.beta * stats.balance_loss / shares
        balance = balance if stats.router_loss is None else balance + stats.router_loss / 2
    ((wanted * weights_BSD).sum() + balance).backward()
    found_SBD = x_BSD.transpose(0, 1)
    for layer in theirs:
        found_SBD = found_SBD + layer(found_SBD)[0]
    (found_SBD.transpose(0, 1) * weights_BSD).sum().backward()
    torch.testing.assert_close(found_SBD.transpose(0, 1), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sum(layer.balance_loss for layer in theirs), balance.detach())
    for layer, other in zip(ours, theirs, strict=True):
        gradients = from_megatron({name: p.grad for name, p in other.named_parameters()})
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-4)
