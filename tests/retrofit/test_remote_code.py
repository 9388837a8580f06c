"""An exported folder in a process that has transformers and not moepp."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="needs the extra hf")

from families import IDS, tiny

from moepp.retrofit import calibrate, export, retrofit

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
