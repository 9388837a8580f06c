"""The whole decoder as a program of torch.export, with batch and sequence left open."""

import io

import pytest
import torch

from moepp import MoELayer, RunConfig, compose
from moepp.models.decoder import Decoder


def model_of(method):
    config = compose(RunConfig, ["size=smoke", f"model={method}"]).model
    return Decoder(config).bfloat16().eval(), torch.randint(0, config.vocab_size, (5, 20))


@pytest.mark.parametrize("method", ["moepp", "rmoe"])
def test_an_exported_decoder_computes_the_same_for_other_batches_and_lengths(method):
    model, ids_BS = model_of(method)
    open_BS = {0: torch.export.Dim("B", min=2, max=64), 1: torch.export.Dim("S", min=2, max=64)}
    program = torch.export.export(model, (ids_BS[:2, :16].contiguous(),), dynamic_shapes={"ids_BS": open_BS})
    found, expected = program.module()(ids_BS), model(ids_BS)
    assert torch.equal(found.logits, expected.logits)
    assert [layer.chosen_N.tolist() for layer in found.stats] == [layer.chosen_N.tolist() for layer in expected.stats]


def test_an_exported_layer_is_saved_and_loaded():
    layer = MoELayer(model_of("moepp")[0].config).bfloat16().eval()
    x_TD = torch.randn(12, layer.config.dim, dtype=torch.bfloat16)
    file = io.BytesIO()
    torch.export.save(torch.export.export(layer, (x_TD,)), file)
    file.seek(0)
    y_TD, stats = torch.export.load(file).module()(x_TD)
    assert torch.equal(y_TD, layer(x_TD)[0]) and torch.equal(stats.logits_TN, layer(x_TD)[1].logits_TN)
