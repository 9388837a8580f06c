"""lm-eval's own `hf` model gives an exported run the scores that our adapter gives the run."""

import pytest

pytest.importorskip("transformers", "5.24", reason="needs the extra hf")
pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install lm-eval")
pytest.importorskip("accelerate", reason="lm-eval's hf model needs it; peft of the extra hf brings it")

from families import text_run, tiny
from lm_eval.api.instance import Instance

from moepp.evaluation.harness import MoEPlusPlus
from moepp.training.export import export_run

REQUESTS = [  # of one question several answers, whose beginning is read once
    ("the state of our", " union"), ("the state of our", " land is strong"), ("the state of our", " land is hard"),
    ("", "people work"), ("peace in this land every", " day of the year"),
]  # fmt: skip


def loglikelihoods(model):
    asked = [Instance("loglikelihood", {}, request, number) for number, request in enumerate(REQUESTS)]
    return model.loglikelihood(asked)


@pytest.mark.parametrize("family", ["decoder", "hf"])
def test_scores_are_those_of_our_adapter(overrides, tmp_path, monkeypatch, family):
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    words = ["model.vocab_size=300", "model.capacity_factor=null"]
    run = text_run(overrides, tmp_path, *words)
    if family == "hf":
        folder = tmp_path / "mixtral"
        tiny("mixtral", num_hidden_layers=2, vocab_size=300).save_pretrained(folder)
        (folder / "tokenizer.json").write_bytes((run / "tokenizer.json").read_bytes())
        asked = ["model=hf", f"model.path={folder}", "model.retrofit.zero=1", "model.retrofit.constant=1"]
        run = text_run(overrides, tmp_path, *asked, "model.retrofit.gating_residual=true")
    theirs = HFLM(str(export_run(run, out=tmp_path / "model")), trust_remote_code=True, device="cpu", batch_size=4)
    ours_model = MoEPlusPlus(run, device="cpu")
    ours = loglikelihoods(ours_model)
    for (nats, greedy), (their_nats, their_greedy) in zip(ours, loglikelihoods(theirs), strict=True):
        assert their_nats == pytest.approx(nats, abs=1e-3) and their_greedy == greedy
    asked = [Instance("generate_until", {}, ("the state of", {"until": ["."], "max_gen_toks": 4}), 0)]
    assert ours_model.generate_until(asked) == theirs.generate_until(asked)
