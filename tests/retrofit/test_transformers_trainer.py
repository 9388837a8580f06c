"""Models in the Trainer of transformers, whose steps are the same in however many micro-batches they are done."""

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="needs the extra hf")
pytest.importorskip("accelerate", reason="transformers' Trainer needs it; peft of the extra hf brings it")

from families import IDS, tiny, transformers

from moepp.retrofit import calibrate, retrofit
from moepp.retrofit.modeling_decoder import MoEPlusPlusConfig, MoEPlusPlusForCausalLM


def decoder():
    """An exported one: a dense layer, and two of all kinds of experts."""
    experts = {"ffn": 4, "constant": 1, "copy": 1, "zero": 1}
    config = MoEPlusPlusConfig(64, 32, 48, layers=[{"dense": 48}, experts, experts])
    model = MoEPlusPlusForCausalLM(config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def retrofitted(family):
    torch.manual_seed(0)
    return calibrate(retrofit(tiny(family)), [IDS], share=0.3)


MODELS = {
    "decoder": decoder,
    "mixtral": lambda: tiny("mixtral"),
    "olmoe": lambda: tiny("olmoe"),
    "retrofitted mixtral": lambda: retrofitted("mixtral"),
    "retrofitted olmoe": lambda: retrofitted("olmoe"),
}


def texts():
    """Of different lengths, whose padding has no label."""
    ids = torch.randint(3, 64, (16, 12), generator=torch.Generator().manual_seed(0))
    kept = torch.arange(12) < (torch.arange(16) % 8 + 4)[:, None]
    columns = {"input_ids": ids, "attention_mask": kept.long(), "labels": ids.where(kept, -100)}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def two_steps(model, folder, accumulation=1, saves="no"):
    """On eight texts each."""
    args = transformers.TrainingArguments(
        folder, max_steps=2, per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
        logging_steps=1, learning_rate=1e-2, optim="sgd", lr_scheduler_type="constant", max_grad_norm=1e9,
        save_strategy=saves, report_to="none", use_cpu=True, disable_tqdm=True, logging_nan_inf_filter=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model, args, train_dataset=texts())
    trainer.train()
    return trainer


def steps(model, folder, accumulation):
    """Loss and norm of the gradient of each."""
    trainer = two_steps(model, folder, accumulation)
    return [line[name] for line in trainer.state.log_history if "grad_norm" in line for name in ("loss", "grad_norm")]


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_the_same_in_any_number_of_micro_batches(name, tmp_path):
    whole, *parts = (steps(MODELS[name](), tmp_path, accumulation) for accumulation in (1, 2, 4))
    assert len(whole) == 4
    assert parts == [pytest.approx(whole, rel=2e-3)] * 2


@pytest.mark.parametrize("family", ["mixtral", "decoder"])
def test_a_checkpoint_of_an_exported_model_loads_as_the_folder_did(family, exported, plain, tmp_path):
    model = two_steps(plain(exported(family)), tmp_path / "trainer", saves="steps").model.eval()
    again = plain(tmp_path / "trainer" / "checkpoint-2")
    assert type(again).__name__ == type(model).__name__ and torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_loss_is_a_mean_over_the_ids_that_have_a_label():
    model, labels = decoder(), IDS.masked_fill(IDS % 3 == 0, -100)
    out = model(IDS, labels=labels)
    nats = [-out.logits[b, s - 1].log_softmax(-1)[IDS[b, s]] for b, s in (labels >= 0).nonzero().tolist() if s]
    torch.testing.assert_close(out.loss, torch.stack(nats).mean())
    torch.testing.assert_close(model(IDS, labels=labels, num_items_in_batch=50).loss, torch.stack(nats).sum() / 50)
