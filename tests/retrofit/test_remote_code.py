"""Exported folders in plain transformers."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="needs the extra hf")

from families import IDS, tiny

from moepp.retrofit import calibrate, export, retrofit

# In a process that has no moepp.
SCRIPT = """
import sys, torch
sys.modules["moepp"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
torch.save(model(torch.load(sys.argv[1] + "/ids.pt")).logits.detach(), sys.argv[1] + "/logits.pt")
"""


def test_an_exported_folder_runs_without_moepp(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = calibrate(retrofit(tiny("mixtral")), [IDS], share=0.4)
    folder = export(model, tmp_path / "model")
    torch.save(IDS, folder / "ids.pt")
    done = subprocess.run([sys.executable, "-c", SCRIPT, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(folder / "logits.pt"), model(IDS).logits.detach(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe", "gemma4", "decoder"])
def test_a_model_that_was_exported_can_be_saved_again(family, dtype, exported, plain, tmp_path):
    folders = [exported(family, dtype), tmp_path / "again", tmp_path / "and_again"]
    models = [plain(folders[0], dtype=dtype)]
    for folder in folders[1:]:
        models[-1].save_pretrained(folder)
        models.append(plain(folder))
    code = {next(folder.glob("modeling_*.py")).read_text() for folder in folders}
    assert len(code) == 1 and all(model.dtype == dtype for model in models)
    assert all(torch.equal(model(IDS).logits, models[0](IDS).logits) for model in models)


def test_an_exported_model_computes_its_experts_as_its_family_can(exported, plain):
    model = plain(exported("mixtral"))
    for implementation in ("eager", "batched_mm"):
        model.set_experts_implementation(implementation)
        assert model.config._experts_implementation == implementation
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
