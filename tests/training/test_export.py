"""Finished runs as folders of plain transformers."""

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="needs the extra hf")

import transformers
from registered import forgotten

from moepp import load_run
from moepp.config import compose
from moepp.errors import UsageError
from moepp.training.export import export_run
from moepp.training.run import train
from moepp.training.settings import RunConfig

IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def trained(overrides):
    def run(*more):
        short = ["trainer.steps=2", "trainer.val_every=2", "optim.warmup_steps=1"]
        return train(compose(RunConfig, [*overrides, *short, *more]))

    return run


@pytest.fixture
def plain(tmp_path, monkeypatch):
    """Loads a folder as anyone does who has transformers alone."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return lambda folder: transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.mark.parametrize(
    "words",
    [
        ["model=moepp"],
        ["model=vanilla", "model.tie_embeddings=true", "model.kv_heads=1"],
        ["model=deepseek_v3", "model.moe_every=2"],
        ["model=longcat", "model.logits_norm=1.0"],
        ["model=moepp", "model.router=two_layer", "model.zero_computation_bias=0.5", "model.multiply_by_top_k=true"],
    ],
    ids=["moepp", "tied", "deepseek_v3", "longcat", "two_layer"],
)
def test_an_exported_run_has_the_runs_logits(trained, plain, words):
    record = trained(*words)
    folder = export_run(record.path)
    model, own = plain(folder), load_run(record.path).model
    torch.testing.assert_close(model(IDS).logits, own(IDS).logits.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        model.generate(IDS[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False), own.generate(IDS[:1], 4)
    )


TILTED = """
import torch
from torch import nn
from moepp import register

@register.control("tilted")
class Tilted(nn.Module):
    def __init__(self, config, counts):
        super().__init__()
        self.register_buffer("bias_N", torch.linspace(0, 1, counts.total))
        self.register_buffer("steps", torch.zeros(()))

    def reset_parameters(self):
        torch.linspace(0, 1, len(self.bias_N), out=self.bias_N)

    def step(self, chosen_N, tokens):
        self.steps += 1
"""


def test_the_bias_of_a_registered_control_is_exported_and_counts(trained, plain, tmp_path):
    (tmp_path / "tilted.py").write_text(TILTED)
    with forgotten():
        record = trained(f"plugins={tmp_path / 'tilted.py'}", "model.balance.control=tilted")
        model, own = plain(export_run(record.path)), load_run(record.path).model
    torch.testing.assert_close(model(IDS).logits, own(IDS).logits.detach(), rtol=0, atol=1e-5)


def test_padding_on_the_left_changes_nothing(trained, plain):
    model = plain(export_run(trained("model=moepp").path))
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), IDS], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.int64), torch.ones_like(IDS)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(got, model(IDS).logits, rtol=0, atol=1e-5)


def test_the_card_says_what_the_run_was(trained, plain):
    record = trained("model=moepp")
    text = (export_run(record.path) / "README.md").read_text()
    assert f"{record.path.parent.name}/{record.path.name}" in text and "a counting chain" in text
    assert f"| val_loss | {record.final()['val_loss']:.6g} |" in text


def test_an_export_is_written_over_itself_alone(trained, tmp_path):
    run = trained("model=vanilla").path
    assert export_run(run, out=tmp_path / "new") == export_run(run, out=tmp_path / "new")
    (tmp_path / "README.md").write_text("mine")
    before = sorted(run.iterdir())
    for folder in (tmp_path, run):
        with pytest.raises(UsageError, match=r" holds other files; name a folder that is new"):
            export_run(run, out=folder)
    assert (tmp_path / "README.md").read_text() == "mine" and sorted(run.iterdir()) == before


def test_what_the_code_lacks_is_refused(trained):
    with pytest.raises(UsageError, match=r"format=hf has no model\.selection=top_p"):
        export_run(trained("model=top_p").path)
    with pytest.raises(UsageError, match=r"format=zeda holds no model\.name=decoder"):
        export_run(trained("model=vanilla").path, "zeda")
