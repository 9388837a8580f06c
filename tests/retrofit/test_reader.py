"""Folders that `export` writes, and plain ones of transformers, are scored as the runs that they are of."""

import json

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="needs the extra hf")
pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install lm-eval")

from families import text_run, tiny
from lm_eval.api.instance import Instance
from safetensors.torch import load_file, save_file

from moepp.errors import UsageError
from moepp.evaluation.checkpoints import load_checkpoint
from moepp.evaluation.commands import evaluate_checkpoint
from moepp.evaluation.harness import MoEPlusPlus
from moepp.evaluation.results import load_task_results
from moepp.retrofit import export, retrofit
from moepp.training.export import export_run

REQUESTS = [("the state of our", " union"), ("the state of our", " land is strong"), ("peace in this land", " every")]


@pytest.fixture
def decoder_run(overrides, tmp_path):
    return text_run(overrides, tmp_path, "model=moepp", "model.vocab_size=300", "model.capacity_factor=null")


def scores(model):
    asked = [Instance("loglikelihood", {}, request, number) for number, request in enumerate(REQUESTS)]
    return [nats for nats, _ in model.loglikelihood(asked)]


def continued(model):
    return model.generate_until([Instance("generate_until", {}, ("the state", {"until": [], "max_gen_toks": 4}), 0)])


def with_tokenizer(folder, run):
    (folder / "tokenizer.json").write_bytes((run / "tokenizer.json").read_bytes())
    return folder


def test_an_exported_run_has_the_runs_scores(decoder_run, tmp_path):
    folder = export_run(decoder_run, out=tmp_path / "model")
    (folder / "modeling_decoder.py").write_text("raise SystemExit('code of a folder was run')")
    ours, theirs = MoEPlusPlus(decoder_run, device="cpu"), MoEPlusPlus(folder, device="cpu")
    assert scores(theirs) == pytest.approx(scores(ours), abs=1e-4) and continued(theirs) == continued(ours)
    assert theirs.checkpoint.context == ours.checkpoint.context == 32


@pytest.mark.parametrize("words", [["model.retrofit.zero=1", "model.retrofit.copy=1"], []], ids=["retrofit", "plain"])
def test_an_exported_run_of_a_family_has_the_runs_scores(decoder_run, overrides, tmp_path, words):
    plain = tmp_path / "mixtral"
    tiny("mixtral", num_hidden_layers=2, vocab_size=300).save_pretrained(plain)
    run = text_run(overrides, tmp_path, "model=hf", f"model.path={with_tokenizer(plain, decoder_run)}", *words)
    theirs = MoEPlusPlus(export_run(run, out=tmp_path / "model"), device="cpu")
    assert scores(theirs) == pytest.approx(scores(MoEPlusPlus(run, device="cpu")), abs=1e-4)


def test_a_layout_of_another_engine_is_scored_too(decoder_run, tmp_path):
    model = retrofit(tiny("mixtral", vocab_size=300), zero=1, copy=1, constant=0, gating_residual=False, init="zeda")
    folders = [with_tokenizer(export(model, tmp_path / f, f), decoder_run) for f in ("hf", "zeda")]
    hf, zeda = (scores(MoEPlusPlus(folder, device="cpu")) for folder in folders)
    assert zeda == pytest.approx(hf, abs=1e-4)


def test_its_scores_are_kept_in_the_folder(decoder_run, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    rows = [{"question": q, "distractor1": "b", "distractor2": "c", "distractor3": "d", "correct_answer": "a",
             "support": ""} for q in "xy"]  # fmt: skip
    (tmp_path / "sciq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = export_run(decoder_run, out=tmp_path / "model")
    assert "means over" in evaluate_checkpoint(folder, "sciq", tmp_path, None, 4096)
    monkeypatch.setattr("moepp.evaluation.harness.load_checkpoint", None)  # would be called to score again
    evaluate_checkpoint(folder, "sciq", tmp_path, None, 4096)
    assert len(load_task_results(folder)["sciq"].examples) == 2


def test_what_cannot_be_scored_is_one_line(decoder_run, tmp_path, monkeypatch):
    folder = export_run(decoder_run, out=tmp_path / "model")
    config, weights = (folder / "config.json").read_text(), load_file(folder / "model.safetensors")

    def refused(message, **changes):
        (folder / "config.json").write_text(json.dumps(json.loads(config) | changes))
        with pytest.raises(UsageError, match=message) as caught:
            load_checkpoint(folder, "cpu")
        assert "\n" not in str(caught.value)

    refused(r"transformers \S+ knows no model_type nobodys", model_type="nobodys")
    refused("model_type=t5 has no causal language model", model_type="t5")
    refused(r"cannot be loaded: ", hidden_size=64)
    del weights["norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refused(r"model do not fit its config\.json: norm\.weight missing")
    (folder / "model.safetensors").write_bytes(b"no tensors")
    refused("cannot be loaded: ")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused("lfs")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    (folder / "model.safetensors").write_bytes(b"")
    refused(r'pip install "moepp\[hf\]"')


def test_half_the_memory_where_it_is_asked_for(decoder_run, tmp_path):
    folder = export_run(decoder_run, out=tmp_path / "model")
    found = load_checkpoint(folder, "cpu", torch.bfloat16)
    assert {p.dtype for p in found.model.parameters()} == {torch.bfloat16}
