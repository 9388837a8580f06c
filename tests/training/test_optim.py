from itertools import pairwise

import pytest
import torch

from moepp.layers.settings import ExpertCounts
from moepp.models.decoder import Decoder
from moepp.models.settings import DecoderConfig
from moepp.training.optim import build_optimizer, learning_rate_scale
from moepp.training.settings import OptimConfig


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
