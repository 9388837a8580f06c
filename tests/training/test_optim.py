from itertools import pairwise

import pytest
import torch

from moepp import register
from moepp.config import compose
from moepp.errors import UsageError
from moepp.layers.settings import ExpertCounts
from moepp.models.decoder import Decoder
from moepp.models.settings import DecoderConfig
from moepp.training.optim import build_optimizer, learning_rate_scale
from moepp.training.settings import OptimConfig, RunConfig


def scales(steps=100, **changes):
    config = OptimConfig(**{"warmup_steps": 10, "final_lr_share": 0.1} | changes)
    return [learning_rate_scale(step, steps, config) for step in range(steps + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_both_schedules_warm_up_linearly_and_end_at_the_final_share(schedule):
    scale = scales(schedule=schedule)
    assert scale[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert scale[10] == pytest.approx(1.0)
    assert scale[100] == pytest.approx(0.1)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(scale[10:]))


def test_cosine_is_halfway_at_half_time():
    assert scales()[55] == pytest.approx(0.55)


def test_wsd_is_constant_until_its_linear_decay():
    scale = scales(schedule="wsd", decay_share=0.2)
    assert scale[10:81] == pytest.approx([1.0] * 71)
    assert scale[90] == pytest.approx(0.55)


@pytest.mark.parametrize("counts", [ExpertCounts(), ExpertCounts(8, 1, 1, 0), ExpertCounts(8, 0, 0, 0)], ids=str)
def test_weight_decay_falls_on_matrices_only(counts):
    model = Decoder(DecoderConfig(dim=16, hidden=8, layers=2, heads=2, vocab_size=32, experts=counts), seed=0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3))
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert decayed | kept == set(names.values()) and not decayed & kept
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert all("norm" in name or name.endswith("vectors") for name in kept)
    vectors = {name for name in names.values() if name.endswith("vectors")}
    assert vectors <= kept and len(vectors) == (2 if counts.constant else 0)


def test_the_fused_optimizer_may_be_clipped_under_bf16_mixed():
    model = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(model, OptimConfig(lr=1.0))
    assert optimizer.defaults["fused"] and not optimizer._step_supports_amp_scaling


@pytest.mark.parametrize("changes", [{"lr": 0.0}, {"decay_share": 0.0}, {"decay_share": 1.5}], ids=str)
def test_impossible_settings_are_refused(changes):
    with pytest.raises(ValueError, match=f"optim.{next(iter(changes))}"):
        OptimConfig(**changes)


def small(**changes):
    return Decoder(DecoderConfig(dim=16, hidden=8, layers=2, heads=2, vocab_size=32, **changes))


def with_gradients(model):
    """The model, with gradients that are the same for the same seed."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model


def test_muon_moves_every_matrix_as_torchs_own_and_the_rest_as_adamw():
    config = OptimConfig(name="muon", lr=1e-3, weight_decay=0.1)
    model, twin = with_gradients(small()), with_gradients(small())
    rest = {"embedding.weight", "head.weight"} | {
        n for n, _ in model.named_parameters() if "norm" in n or "vectors" in n
    }
    plain = build_optimizer(twin, OptimConfig(lr=1e-3, weight_decay=0.1))
    optimizer = build_optimizer(model, config)
    matrices = {name: p for name, p in small().named_parameters() if name not in rest}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    muons = {}
    for _ in range(2):
        optimizer.step()
        plain.step()
        for name, p in matrices.items():
            slices = p.detach().unbind() if p.ndim == 3 else [p.detach()]
            theirs = gradients[name].unbind() if p.ndim == 3 else [gradients[name]]
            for index, (matrix, gradient) in enumerate(zip(slices, theirs, strict=True)):
                if (name, index) not in muons:
                    one = torch.nn.Parameter(matrix)  # the same storage
                    one.grad = gradient
                    muons[name, index] = torch.optim.Muon([one], 1e-3, adjust_lr_fn="match_rms_adamw")
                muons[name, index].step()
    ours = dict(model.named_parameters())
    assert rest < ours.keys() and any(p.ndim == 3 for p in matrices.values())
    assert all(torch.equal(ours[name], p) for name, p in twin.named_parameters() if name in rest)
    assert all(torch.equal(ours[name], p) for name, p in matrices.items())


def test_muons_state_continues_where_it_was_saved():
    config = OptimConfig(name="muon", options={"ns_steps": 3})
    whole, cut = with_gradients(small()), with_gradients(small())
    first, second = build_optimizer(whole, config), build_optimizer(cut, config)
    first.step()
    second.step()
    state = second.state_dict()
    assert {len(values) for values in state["state"].values()} == {2, 3}
    third = build_optimizer(cut, config)
    third.load_state_dict(state)
    first.step()
    third.step()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))
    assert third.param_groups[0]["muon"]["ns_steps"] == 3


@pytest.mark.parametrize("name", ["adamw", "muon", *register.OPTIMIZERS])
def test_every_optimizer_moves_every_parameter(name):
    model = with_gradients(small())
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.1))
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_options_reach_the_optimizer():
    optimizer = build_optimizer(small(), OptimConfig(name="SGD", options={"momentum": 0.9, "nesterov": True}))
    assert isinstance(optimizer, torch.optim.SGD)
    assert [(g["momentum"], g["nesterov"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.9, True, 0.1),
        (0.9, True, 0.0),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adam"}, r"^optim\.name=adam: no such optimizer; .* did you mean adamw\?$"),
        ({"name": "SGD", "options": {"momentun": 0.9}}, r"^optim\.options\.momentun: .* did you mean momentum\?$"),
        ({"options": {"betas": [0.9, 0.9]}}, r"^optim\.options\.betas: optimizer adamw takes no options$"),
        ({"name": "muon", "options": {"ns_steps": 2.5}}, r"^optim\.options\.ns_steps=2\.5 is no int$"),
    ],
    ids=str,
)
def test_unknown_optimizers_and_options_are_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**changes)


def test_muon_is_refused_where_matrices_are_divided():
    with pytest.raises(UsageError, match=r"^optim\.name=muon needs whole matrices, and strategy=fsdp"):
        compose(RunConfig, ["optim.name=muon", "strategy=fsdp"])
