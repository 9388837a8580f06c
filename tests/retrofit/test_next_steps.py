"""What is done next with a retrofitted model, or with one that was exported."""

import pickle

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="needs the extra hf")

from families import IDS, tiny, transformers
from safetensors.torch import load_file, save_file
from test_transformers_trainer import decoder, texts

from moepp.errors import UsageError
from moepp.retrofit import calibrate, export, load, observe, retrofit
from moepp.retrofit.modeling import plus_plus, routers


def calibrated(family="mixtral"):
    torch.manual_seed(0)
    return calibrate(retrofit(tiny(family, num_hidden_layers=2)), [IDS], share=0.3)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "float"])
def test_offsets_are_exact_whatever_the_weights_are_cast_to(cast):
    model = calibrated()
    offsets = [router.offset.clone() for router in routers(model)]
    getattr(model, cast)()
    assert all(torch.equal(router.offset, offset) for router, offset in zip(routers(model), offsets, strict=True))
    assert {buffer.dtype for router in routers(model) for buffer in (router.offset, router.calibrated)} == {
        torch.float32
    }


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_a_model_loaded_in_bfloat16_reads_back_equal(family, tmp_path):
    export(calibrated(family), tmp_path / "first")
    model = load(tmp_path / "first", dtype=torch.bfloat16).eval()
    again = load(export(model, tmp_path / "again"), dtype="auto").eval()
    assert again.dtype == torch.bfloat16 and torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_model_is_pickled_whole(exported, plain):
    for model in (calibrated(), plain(exported("mixtral"))):
        again = pickle.loads(pickle.dumps(model))
        assert type(again) is type(model) and torch.equal(again(IDS).logits, model(IDS).logits)


def test_what_a_checkpoint_lacks_is_silent(exported, plain):
    folder = exported("mixtral")
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.endswith(("new_rows", "offset", "vectors"))}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    fresh = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # what is left unset is NaN
    try:
        models = [plain(folder), transformers.AutoModelForCausalLM.from_config(fresh, trust_remote_code=True)]
    finally:
        torch.use_deterministic_algorithms(False)
    for model in models:
        assert {router.offset[0].item() for router in model.modules() if hasattr(router, "new_rows")} == {-1e4}
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_a_folder_is_loaded_with_other_heads(exported, plain):
    folder = exported("mixtral")
    model = plain(folder)
    base = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    judge = transformers.AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    assert type(judge).__name__ == "MixtralPlusPlusForSequenceClassification"
    assert torch.equal(judge.eval().model(IDS).last_hidden_state, base(IDS).last_hidden_state)


def test_layouts_that_go_by_a_classs_name_are_the_familys():
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    cls = transformers.Dots3NoteForConditionalGeneration
    own, ours = (get_checkpoint_conversion_mapping(name) for name in (cls.__name__, plus_plus(cls).__name__))
    assert own and [renaming.target_patterns for renaming in ours] == [renaming.target_patterns for renaming in own]


@pytest.mark.parametrize("make", [lambda: retrofit(tiny("mixtral", num_hidden_layers=2)), decoder])
def test_the_trainer_smoothes_shifted_labels(make, tmp_path):
    model, rows = make(), texts()[:4]
    args = transformers.TrainingArguments(
        tmp_path, per_device_eval_batch_size=4, label_smoothing_factor=0.1, report_to="none", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    loss = transformers.Trainer(model, args, eval_dataset=rows).evaluate()["eval_loss"]
    ids, mask, labels = (torch.stack([row[name] for row in rows]) for name in rows[0])
    logits_BVS = model(ids, attention_mask=mask).logits[:, :-1].transpose(1, 2)
    want = torch.nn.functional.cross_entropy(logits_BVS, labels[:, 1:], label_smoothing=0.1)
    assert loss == pytest.approx(want.item(), rel=1e-5)


def test_adapters_are_named_and_padding_is_seen_through_them():
    peft = pytest.importorskip("peft", reason="needs the extra hf")
    model = calibrated()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UsageError, match="PeftModel has no new experts of its own: pass the model that it wraps"):
        calibrate(adapted, [IDS])
    padded = {"input_ids": torch.nn.functional.pad(IDS, (5, 0))}
    padded["attention_mask"] = (padded["input_ids"] > 0).long()
    found = []
    for seen in (model, adapted):
        with observe(seen) as rows:
            seen(**padded)
        found.append([row["load"] for row in rows.values()])
    assert found[0] == found[1]


def test_a_quantized_model_is_refused():
    model = tiny("mixtral", num_hidden_layers=1)
    model.is_quantized = True
    with pytest.raises(UsageError, match="MixtralForCausalLM is quantized, and new experts are not: load it in"):
        retrofit(model)


def test_an_exported_decoder_takes_tokens_more_and_checkpoints_activations():
    model = decoder().train()
    model(IDS, labels=IDS).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(IDS, labels=IDS).loss.backward()
    assert all(torch.equal(p.grad, plain[name]) for name, p in model.named_parameters())
    model.resize_token_embeddings(70)
    assert model.eval()(IDS).logits.shape == (*IDS.shape, 70)


def test_an_exported_decoder_generates_with_a_cache_of_fixed_size():
    model, padded = decoder().eval(), torch.nn.functional.pad(IDS, (3, 0))
    asked = {"attention_mask": (padded > 0).long(), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    want = model.generate(padded, **asked)
    assert torch.equal(model.generate(padded, **asked, cache_implementation="static"), want)
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0), want[:, 3:])
