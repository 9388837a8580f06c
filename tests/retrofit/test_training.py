"""Runs of models of transformers, from a folder to a finished record and back."""

import importlib.util
import json
import shutil

import pytest
import torch

pytest.importorskip("transformers", "5.24", reason="needs the extra hf")

from families import IDS, tiny

from moepp import load_run
from moepp.config import compose, load
from moepp.errors import UsageError
from moepp.evaluation.checkpoints import load_checkpoint
from moepp.models.build import build_model
from moepp.models.foreign import architecture_of
from moepp.retrofit import load as load_model
from moepp.retrofit import strip
from moepp.retrofit.model import TransformersModel, pretrained, without_adapters
from moepp.training import callbacks, foreign
from moepp.training.estimate import estimate
from moepp.training.export import export_run
from moepp.training.run import freeze, train
from moepp.training.settings import RunConfig, run_directory


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    tiny(request.param, num_hidden_layers=2).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixtral")
    tiny("mixtral", num_hidden_layers=2).save_pretrained(path)
    return path


def asked(overrides, folder, *more):
    return compose(
        RunConfig,
        [
            *overrides, "model=hf", f"model.path={folder}", "model.retrofit.zero=1", "model.retrofit.constant=1",
            "model.retrofit.gating_residual=true", "model.retrofit.wake_steps=3", "data.seq_len=16",
            "data.batch_size=8", "data.val_sequences=4", "trainer.steps=4", "trainer.checkpoint_every=1",
            "trainer.log_every=1", "trainer.val_every=4", "optim.warmup_steps=1", *more,
        ],
    )  # fmt: skip


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def cut_at(step, monkeypatch, config):
    """The run, killed after that step and called again."""

    class Killed(BaseException):
        pass

    class Kill(callbacks.ResumeCheckpoint):
        def on_train_batch_end(self, trainer, *arguments):
            super().on_train_batch_end(trainer, *arguments)
            if trainer.global_step == step:
                raise Killed

    config = freeze(config)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("moepp.training.trainer.ResumeCheckpoint", Kill)
        train(config, run_directory(config))
    return train(config, run_directory(config))


def test_a_run_trains_resumes_bitwise_and_strips_back(overrides, folder, tmp_path, monkeypatch):
    more = ["model.retrofit.train=new", "trainer.accumulate=2", "model.retrofit.recalibrate_every=2"]
    whole = load_run(train(asked(overrides, folder, *more, "name=whole")).path)
    cut = load_run(cut_at(2, monkeypatch, asked(overrides, folder, *more, "name=cut")).path)
    a, b = state(whole.model), state(cut.model)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert [line["step"] for line in cut.metrics if "val/loss" in line] == [0, 4]  # untrained first
    assert 0.1 < whole.final["zero_share"] + whole.final["constant_share"] < 0.4
    assert [line["train/loss"] for line in whole.metrics if "train/loss" in line] == [
        line["train/loss"] for line in cut.metrics if "train/loss" in line
    ]

    stripped, original = strip(whole.model.hf), pretrained(str(folder), architecture_of(str(folder)))
    assert type(stripped) is type(original)
    changed = {name for name, value in state(original).items() if not torch.equal(value, state(stripped)[name])}
    assert changed == {name for name in state(original) if ".gate." in name}  # the routers learn too


def test_a_record_is_enough_to_generate_and_to_evaluate(overrides, mixtral, tmp_path):
    away = tmp_path / "moved"
    shutil.copytree(mixtral, away)
    record = train(asked(overrides, away))
    shutil.rmtree(away)
    model = load_run(record.path).model
    budget = json.loads((record.path / "budget.json").read_text())
    assert budget["total_params"] == sum(p.numel() for p in model.hf.parameters())
    assert (
        budget["active_params"] == budget["total_params"] - 6 * 2 * 3 * 32 * 48
    )  # of two layers' 8 experts 2 are used
    greedy = model.hf.generate(IDS[:1], max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(IDS[:1], 3)[:, : greedy.shape[1]], greedy)
    checkpoint = load_checkpoint(record.path, device="cpu")
    torch.testing.assert_close(checkpoint.logits(IDS), model.hf(IDS).logits.detach(), rtol=0, atol=1e-6)


def test_an_exported_run_reads_back_equal(overrides, mixtral, tmp_path):
    more = ["trainer.steps=1", "trainer.val_every=1", "model.retrofit.loss=reverse_kl", "optim.lr=1e-9"]
    more += ["model.retrofit.wake_steps=0"]
    record = train(asked(overrides, mixtral, *more))
    first, last = [line for line in record.metrics() if "val/divergence" in line]
    assert first["val/divergence"] == pytest.approx(last["val/divergence"], rel=1e-4)  # of the same text, forward
    assert first["router/ffn_share"] == pytest.approx(0.75, abs=0.08)
    again = load_model(export_run(record.path, out=tmp_path / "model"))
    torch.testing.assert_close(again.eval()(IDS).logits, load_run(record.path).model(IDS).logits, rtol=0, atol=1e-5)
    assert "zero" in (tmp_path / "model/README.md").read_text()


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl"])
def test_distillation_measures_the_divergence_from_the_original(overrides, mixtral, loss):
    config = asked(overrides, mixtral, f"model.retrofit.loss={loss}", "model.retrofit.train=new").model
    model = TransformersModel(config, seed=0)
    told = model(IDS[:, :-1], targets_BS=IDS[:, 1:])
    assert told.divergence.item() == pytest.approx(0, abs=1e-6)  # silent
    model.wake(1.0)
    found = model(IDS[:, :-1], targets_BS=IDS[:, 1:])
    said, wanted = (m(IDS[:, :-1]).logits.log_softmax(-1) for m in (model.hf, model.original[0]))
    p, q = (wanted, said) if loss == "forward_kl" else (said, wanted)
    assert found.divergence.item() == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    found.divergence.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.original[0].parameters())
    assert not any("original" in name for name in model.state_dict())


def test_a_divergence_is_measured_forward_whatever_is_learnt(overrides, mixtral):
    found = []
    for loss in ("forward_kl", "reverse_kl"):
        model = TransformersModel(asked(overrides, mixtral, f"model.retrofit.loss={loss}").model, seed=0)
        model.wake(1.0)
        with torch.no_grad():
            found.append(model(IDS[:, :-1], targets_BS=IDS[:, 1:]).divergence.item())
    assert found[0] == found[1] > 0


def test_a_divergence_is_learnt_on_the_models_own_text(overrides, mixtral):
    words = ["model.retrofit.loss=reverse_kl", "model.retrofit.own_after=2", "model.retrofit.train=new"]
    model = TransformersModel(asked(overrides, mixtral, *words).model, seed=0).train()
    model.wake(1.0)
    heard = []
    model.original[0].register_forward_pre_hook(
        lambda _, args, given: heard.append(given["input_ids"]), with_kwargs=True
    )
    for _ in range(2):
        model(IDS[:, :-1], targets_BS=IDS[:, 1:]).divergence.backward()
    assert torch.equal(heard[0], heard[1])  # a resumed run learns the same
    assert torch.equal(heard[0][:, :2], IDS[:, :2]) and not torch.equal(heard[0][:, 2:], IDS[:, 2:-1])
    with torch.no_grad():
        chances = model.eval().hf(input_ids=heard[0]).logits.softmax(-1)
    own = chances[:, 1:-1].gather(-1, heard[0][:, 2:, None]).mean()
    text = chances[:, 1:-1].gather(-1, IDS[:, 2:-1, None]).mean()
    assert own > 2 * text


def test_a_first_phase_makes_the_model_that_the_run_begins_with(overrides, tmp_path, monkeypatch):
    dense = tmp_path / "llama"
    tiny("llama", num_hidden_layers=2).save_pretrained(dense)
    monkeypatch.setattr(foreign, "run_alone", lambda folder: train(load(RunConfig, folder / "config.yaml"), folder))
    words = ["model.retrofit.upcycle=4", "model.retrofit.first_steps=2", "trainer.steps=1", "trainer.val_every=1"]
    config = freeze(asked(overrides, dense, *words))
    assert config.model.architecture["model_type"] == "mixtral" and config.model.experts.ffn == 4
    first = load_run(tmp_path / "runs/first_phase" / config.model.path.split("/")[-2])
    assert first.config.trainer.steps == 2 and not first.config.model.retrofit.adds
    begun = TransformersModel(config.model, seed=0)
    assert torch.equal(strip(begun.hf)(IDS).logits, first.model(IDS).logits)
    monkeypatch.setattr(foreign, "run_alone", None)  # done once for a seed, whatever comes after it
    freeze(asked(overrides, dense, *words, "model.retrofit.copy=1", "model.retrofit.share=0.5"))


def test_a_dense_model_is_upcycled_by_the_seed(overrides, tmp_path):
    tiny("llama", num_hidden_layers=2).save_pretrained(tmp_path / "llama")
    config = asked(overrides, tmp_path / "llama", "model.retrofit.upcycle=4").model
    states = [TransformersModel(config, seed).state_dict() for seed in (0, 0, 1)]
    gate = "hf.model.layers.0.mlp.gate.weight"
    assert torch.equal(states[0][gate], states[1][gate]) and not torch.equal(states[0][gate], states[2][gate])
    assert TransformersModel(config, None).config.experts.ffn == 4


@pytest.mark.parametrize("train", ["new", "experts", "all", "lora"])
def test_what_is_trained_is_what_was_asked_for(overrides, mixtral, train):
    if train == "lora" and importlib.util.find_spec("peft") is None:
        pytest.skip("needs peft")
    model = TransformersModel(asked(overrides, mixtral, f"model.retrofit.train={train}").model, seed=0)
    learnt = {name for name, p in model.hf.named_parameters() if p.requires_grad}
    assert {"model.layers.0.mlp.gate.new_rows", "model.layers.1.mlp.experts.vectors"} <= learnt
    assert ("model.layers.0.mlp.experts.down_proj" in learnt) == (train in ("experts", "all"))
    assert ("model.embed_tokens.weight" in learnt) == (train == "all")
    adapters = {name for name in learnt if "lora_" in name}
    assert len(adapters) == (2 * 4 * 2 if train == "lora" else 0)
    if adapters:
        for name, parameter in model.hf.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        want = model(IDS).logits
        merged = without_adapters(model.hf.eval())
        torch.testing.assert_close(merged(IDS).logits, want, rtol=0, atol=1e-4)
        assert merged.state_dict().keys() == TransformersModel(asked(overrides, mixtral).model).hf.state_dict().keys()


@pytest.mark.parametrize("form", ["paper", "grouped"])
def test_micro_batches_are_balanced_as_one_batch(overrides, mixtral, form):
    more = ["model.balance.expected_ffn=1.5"] if form == "grouped" else []
    more += [f"model.balance.form={form}", "model.balance.beta=0.5", "optim.name=SGD", "optim.lr=0.1"]
    more += ["optim.grad_clip=0", "trainer.steps=1", "trainer.val_every=1", "model.retrofit.wake_steps=0"]
    found = []
    for parts in (1, 2):
        record = train(asked(overrides, mixtral, *more, f"trainer.accumulate={parts}"))
        found.append(load_run(record.path).model.hf.model.layers[0].mlp.gate.weight.detach())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


def test_activation_checkpointing_gives_the_same_gradients(overrides, mixtral):
    found = []
    for key in ("false", "true"):
        config = asked(overrides, mixtral, f"model.activation_checkpointing={key}").model
        model = TransformersModel(config, seed=0).train()
        model.wake(1.0)
        output = model(IDS[:, :-1], targets_BS=IDS[:, 1:])
        (output.cross_entropy + model.balance_loss(output)).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_dry_run_says_what_is_loaded_and_what_is_trained(overrides, mixtral):
    config = asked(overrides, mixtral, "model.retrofit.train=new", "model.retrofit.loss=forward_kl")
    lines = dict(line.split("  ", 1) for line in estimate(config))
    model = TransformersModel(config.model, seed=None)
    total, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad >= only) for only in (False, True))
    assert (
        lines["parameters"].strip() == f"{total:,}"
        and f"with {trained:,} parameters trained" in lines["memory per device"]
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.path=nowhere"], "model.path=nowhere: must be a folder with a config.json, or a hub id"),
        (["model.path="], "name=hf needs path"),
        (["model.retrofit.share=2"], "model.retrofit.share=2"),
        (["model.retrofit.own_after=2"], "set loss=forward_kl or reverse_kl"),
        (["model.retrofit.first_steps=2"], "set upcycle above 0"),
        (["model.retrofit.recalibrate_every=2", "model.retrofit.init=zeda"], "is of init=silent"),
        (["strategy=expert_parallel", "trainer.devices=2"], "choose strategy=ddp or fsdp"),
        (["trainer.compile=true"], "set trainer.compile=false"),
        (["model.balance.control=loss_free"], "balance.control=loss_free"),
        (["data.corpus=sotu", "data.path="], "holds no tokenizer.json: set data.tokenizer"),
    ],
)
def test_what_cannot_be_is_refused(overrides, mixtral, words, said):
    with pytest.raises(UsageError, match=said.replace(".", r"\.")):
        freeze(asked(overrides, mixtral, *words))


def test_only_models_of_transformers_are_retrofitted(overrides):
    with pytest.raises(UsageError, match="set model=hf"):
        compose(RunConfig, [*overrides, "model.retrofit.zero=1"])


def test_a_balance_loss_that_the_models_experts_do_not_allow_is_refused_in_one_line(overrides, mixtral):
    more = ["model.retrofit.zero=0", "model.retrofit.constant=0", "model.retrofit.wake_steps=0"]
    config = asked(overrides, mixtral, *more, "model.balance.form=grouped", "model.balance.expected_ffn=1.5")
    with pytest.raises(UsageError, match=f"^model.path={mixtral} .*: balance.form=grouped needs zero-computation"):
        build_model(config.model)
