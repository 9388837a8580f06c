"""MoE++ inside the installed torchtitan against this package's own model: losses, gradients, weights there and back.
scripts/pretrain_parity.sh makes the environment.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

pytest.importorskip("torchtitan")

from torch.distributed.device_mesh import init_device_mesh
from torchtitan.distributed.utils import set_spmd_backend
from torchtitan.models.common.attention import ScaledDotProductAttention

from moepp.errors import UsageError
from moepp.layers.settings import BalanceConfig, ExpertCounts
from moepp.models.decoder import Decoder
from moepp.models.settings import DecoderConfig
from moepp.pretrain.state import from_torchtitan, to_torchtitan
from moepp.pretrain.torchtitan import model_config

FORMS = {
    "moepp": {},
    "tight": {"capacity_factor": 0.6},
    "sequence": {"capacity_factor": 0.8, "capacity_over": "sequence", "balance": BalanceConfig(over="sequence")},
    "paper": {"gate": "softmax", "balance": BalanceConfig(form="paper", z_loss=1e-3), "capacity_factor": None},
    "vanilla": {"experts": ExpertCounts(4, 0, 0, 0), "gating_residual": False, "capacity_factor": None},
    "dense_first": {"dense_first": 1, "kv_heads": 2, "layers": 3},
}


def decoder_config(**changes) -> DecoderConfig:
    small = {"dim": 32, "hidden": 48, "layers": 2, "heads": 4, "vocab_size": 64, "experts": ExpertCounts(4, 1, 1, 2)}
    return DecoderConfig(**small | {"init_std": 0.1} | changes)


def titan(config: DecoderConfig, ours: Decoder):
    model = model_config(config, seq_len=16, inner_attention=ScaledDotProductAttention.Config()).build()
    model.load_state_dict(to_torchtitan(ours.state_dict(), config), strict=True)
    return model.train()


def batch() -> torch.Tensor:
    return torch.randint(64, (3, 17), generator=torch.Generator().manual_seed(0))


def losses_and_gradients(config: DecoderConfig, ours: Decoder, theirs):
    """Of both, the gradients by our names."""
    ids = batch()
    output = ours(ids[:, :-1], targets_BS=ids[:, 1:])
    wanted_loss, wanted_balance = output.cross_entropy, ours.balance_loss(output)
    (wanted_loss + wanted_balance).backward()
    logits = theirs(ids[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()
    balance = sum(block.moe.balance_loss for block in theirs.layers.values() if block.moe_enabled)
    found = from_torchtitan({n: p.grad for n, p in theirs.named_parameters()}, ours.state_dict(), config)
    return (loss, balance), (wanted_loss, wanted_balance), found, {n: p.grad for n, p in ours.named_parameters()}


@pytest.fixture
def float32_experts(monkeypatch):
    """torchtitan multiplies experts in bfloat16 whatever comes; here in what comes."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor)


@pytest.mark.parametrize("form", FORMS)
def test_losses_and_gradients_are_those_of_our_model(form, float32_experts):
    config = decoder_config(**FORMS[form])
    ours = Decoder(config, seed=0).train()
    found, wanted, gradients, reference = losses_and_gradients(config, ours, titan(config, ours))
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted), rtol=0, atol=1e-6)
    for name, gradient in reference.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_in_bfloat16_as_installed():
    config = decoder_config()
    ours = Decoder(config, seed=0).train()
    found, wanted, gradients, reference = losses_and_gradients(config, ours, titan(config, ours))
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted), rtol=0, atol=5e-3)
    for name, gradient in reference.items():
        assert (gradients[name] - gradient).norm() < 0.05 * gradient.norm() + 1e-4, name


def test_training_is_that_of_our_model(float32_experts):
    config = decoder_config()
    ours = Decoder(config, seed=0).train()
    theirs = titan(config, ours)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9) for model in (ours, theirs)]
    for _ in range(5):
        found, wanted, *_ = losses_and_gradients(config, ours, theirs)
        for optimizer in optimizers:
            optimizer.step(), optimizer.zero_grad()
        torch.testing.assert_close(torch.stack(found), torch.stack(wanted), rtol=0, atol=5e-6)


def test_weights_come_back_as_they_went():
    config = decoder_config(dense_first=1, tie_embeddings=True)
    ours = Decoder(config, seed=0).state_dict()
    back = from_torchtitan(to_torchtitan(ours, config), ours, config)
    assert list(back) == list(ours) and all(torch.equal(back[name], ours[name]) for name in ours)


def test_what_has_no_counterpart_is_refused():
    with pytest.raises(UsageError, match=r"balance\.control=loss_free acts after a step"):
        model_config(decoder_config(balance=BalanceConfig(control="loss_free")), seq_len=16)


def run_expert_parallel(rank: int, world: int, store: str, config: DecoderConfig, results) -> None:
    """One rank's gradients: its own sequences, and its share of the experts."""
    set_spmd_backend("default")
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    ours = Decoder(config, seed=0)
    model = model_config(config, 16, parts=world, inner_attention=ScaledDotProductAttention.Config()).build().train()
    model.load_state_dict(to_torchtitan(ours.state_dict(), config))
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    for block in model.layers.values():
        routed = block.moe.routed_experts
        routed.token_dispatcher.wire_meshes(ep_mesh=mesh)
        for parameter in routed.inner_experts.parameters():
            parameter.data = parameter.data.chunk(world)[rank].clone()
    ids = torch.cat([batch(), batch().flip(0)[:1]]).chunk(world)[rank]
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()) / world
    loss.backward()
    results[rank] = {name: parameter.grad for name, parameter in model.named_parameters()}
    dist.destroy_process_group()


@pytest.mark.parametrize("capacity_factor", [None, 0.6])
def test_two_expert_parallel_ranks_have_the_gradients_of_one_device(tmp_path, capacity_factor, float32_experts):
    config = decoder_config(capacity_factor=capacity_factor)
    context = torch.multiprocessing.get_context("fork")
    results = context.Manager().dict()
    arguments = (2, str(tmp_path / "store"), config, results)
    torch.multiprocessing.start_processes(run_expert_parallel, arguments, 2, start_method="fork")
    found = {
        name: torch.cat([results[0][name], results[1][name]])
        if "inner_experts" in name
        else results[0][name] + results[1][name]
        for name in results[0]
    }
    ours, ids = Decoder(config, seed=0).train(), torch.cat([batch(), batch().flip(0)[:1]])
    output = ours(ids[:, :-1], targets_BS=ids[:, 1:])
    (output.cross_entropy + ours.balance_loss(output)).backward()
    gradients = from_torchtitan(found, ours.state_dict(), config)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=2e-6)
