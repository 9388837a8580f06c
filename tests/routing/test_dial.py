import pytest
import torch

from moepp.errors import UsageError
from moepp.layers.settings import ExpertCounts
from moepp.models.decoder import Decoder
from moepp.models.settings import DecoderConfig
from moepp.routing.dial import biased, curve, loss_and_compute
from moepp.statistics.style import save_figure

SIZES = {"dim": 16, "hidden": 12, "layers": 2, "heads": 2, "vocab_size": 32, "init_std": 0.2}
BATCHES = list(torch.randint(0, 32, (2, 4, 9), generator=torch.Generator().manual_seed(0)))


def measured(model, bias):
    with biased(model, bias):
        return loss_and_compute(model, BATCHES)


def test_more_bias_means_less_compute_from_all_experts_to_none():
    model = Decoder(DecoderConfig(**SIZES))
    rows = [(bias, *measured(model, bias)) for bias in (-100.0, -1.0, 0.0, 1.0, 100.0)]
    used = [row[1] for row in rows]
    assert used[0] == 2 and used[-1] == 0 and used == sorted(used, reverse=True) and len(set(used)) == 5
    with torch.no_grad():
        losses = [float(model(ids[:, :-1], targets_BS=ids[:, 1:]).cross_entropy) for ids in BATCHES]
    assert rows[2][2] == pytest.approx(sum(losses) / 2, rel=1e-6)  # no bias is left behind


def test_a_bias_adds_to_the_models_own():
    model = Decoder(DecoderConfig(**SIZES, zero_computation_bias=-100.0))
    assert measured(model, 0.0)[0] == 2 and measured(model, 200.0)[0] == 0


def test_a_model_without_zero_computation_experts_has_no_dial():
    model = Decoder(DecoderConfig(**SIZES, experts=ExpertCounts(8, 0, 0, 0)))
    with pytest.raises(UsageError, match="needs zero-computation experts"):
        measured(model, 0.0)


def test_the_curve_is_drawn_as_its_table_says(tmp_path):
    files = save_figure(curve([(-1.0, 1.5, 4.0), (1.0, 0.5, 4.5)], "dial", "bias", "the bias"), tmp_path)
    assert all(file.stat().st_size > 1000 for file in files) and "+1" in files[0].read_text()
