"""A user's script, for the type checker alone: what the public face says of itself."""

from typing import assert_type

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

import moepp
from moepp.layers import ExpertCounts, MoEStats
from moepp.models.protocol import CausalLM
from moepp.records import RunRecord

layer = moepp.MoELayer(moepp.MoEConfig(dim=64, hidden=128, experts=ExpertCounts(ffn=4)))
y, stats = layer.forward(torch.randn(2, 8, 64))
assert_type(y, Tensor)
assert_type(stats, MoEStats)

decoder = moepp.Decoder(moepp.DecoderConfig(dim=64, heads=4), seed=1)
model: CausalLM = decoder
module = moepp.LanguageModel(decoder, steps=100)
lightning_module: pl.LightningModule = module

config = moepp.compose(moepp.RunConfig, ["size=smoke"])
assert_type(config, moepp.RunConfig)
data = moepp.TokenDataModule(config.data, config.seed)
record = moepp.train(config)
assert_type(record, RunRecord)
run = moepp.load_run(record.path)
assert_type(run.config, moepp.RunConfig)
sweep = moepp.load_sweep("runs/mine")


@moepp.register.router("mine")
class Mine(nn.Module):
    def __init__(self, config: moepp.MoEConfig, first: bool):
        super().__init__()
        self.weight = nn.Linear(config.dim, config.experts.total)
