import pytest
import torch

from moepp.config import CONF, compose
from moepp.models.decoder import Decoder
from moepp.training.run import freeze, train
from moepp.training.settings import RunConfig, run_directory
from moepp.training.weights import load_model

METHODS = sorted({path.stem for path in (CONF / "model").glob("*.yaml")} - {"hf"})  # which needs a folder
CONTROLLED = ["longcat", "loss_free", "remoe"]


def run(overrides, *more):
    config = freeze(compose(RunConfig, [*overrides, *more]))
    return train(config, run_directory(config))


def control_state(record):
    state = load_model(record.path)[0].state_dict()
    return {name: value for name, value in state.items() if ".control." in name}


def losses(record):
    keys = ("train/loss", "val/loss", "router/entropy", "final/val_loss", "final/ffn_per_token")
    return [{"step": line["step"], **{k: line[k] for k in keys if k in line}} for line in record.metrics()]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_is_measured(overrides, method):
    record = run(overrides, f"model={method}", "trainer.steps=4", "trainer.expert_timing=true")
    final = record.final()
    assert record.status == "done" and final["val_loss"] < 7 and final["expert_forward_ms"] > 0
    config = compose(RunConfig, [*overrides, f"model={method}"]).model
    if method == "dense":
        assert final["ffn_per_token"] == 0 and "ffn_share" not in final
    else:
        assert sum(final[f"{kind}_share"] for kind in ("ffn", "constant", "copy", "zero")) == pytest.approx(1)
    if method != "dense" and config.selection == "top_k":
        assert final["ffn_per_token"] == pytest.approx(config.top_k * final["ffn_share"])


@pytest.mark.parametrize("method", CONTROLLED)
def test_a_controlled_run_that_is_killed_continues_to_the_same_losses_and_state(overrides, method, monkeypatch):
    overrides = [*overrides, f"model={method}", "trainer.accumulate=2"]
    whole = run(overrides, "name=whole")
    from moepp.training import callbacks

    class Killed(BaseException):
        pass

    class Kill(callbacks.ResumeCheckpoint):
        def on_train_batch_end(self, trainer, *arguments):
            super().on_train_batch_end(trainer, *arguments)
            if trainer.global_step == 6:  # two steps after the checkpoint
                raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("moepp.training.trainer.ResumeCheckpoint", Kill)
        run(overrides, "name=cut")
    cut = run(overrides, "name=cut")
    assert losses(cut) == losses(whole)
    ours, theirs = control_state(cut), control_state(whole)
    assert ours and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    start = Decoder(compose(RunConfig, overrides).model).state_dict()
    assert not all(torch.equal(ours[name], start[name]) for name in ours)


def test_logged_are_the_losses_and_routing_of_all_micro_batches_of_a_step(overrides):
    """Without a capacity, which is of each micro-batch."""
    runs = [run(overrides, "model.capacity_factor=null", f"trainer.accumulate={parts}") for parts in (1, 4)]
    whole, parts = ([line for line in record.metrics() if "train/loss" in line] for record in runs)
    assert len(whole) == len(parts) == 6
    names = [name for name in whole[0] if name.startswith(("train/", "router/"))]
    assert {"train/balance_loss", "router/entropy", "router/load_max_over_mean"} <= set(names)
    for line, others in zip(whole, parts, strict=True):
        assert {name: others[name] for name in names} == pytest.approx({name: line[name] for name in names}, rel=1e-4)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_control_steps_once_per_optimizer_step_on_the_tokens_of_its_micro_batches(
    overrides, accumulate, checkpointing, monkeypatch
):
    steps = []
    real = Decoder.step_control

    def remember(self, chosen_LN, tokens):
        steps.append((int(chosen_LN.sum()), tokens))
        real(self, chosen_LN, tokens)

    monkeypatch.setattr(Decoder, "step_control", remember)
    more = [f"trainer.accumulate={accumulate}", f"model.activation_checkpointing={checkpointing}"]
    run(overrides, "model=longcat", *more, "trainer.steps=6", "trainer.val_every=2")
    tokens, layers, top_k = 8 * 32, 2, 2
    assert steps == [(layers * tokens * top_k, tokens)] * 6  # recomputation and validation add nothing


def test_the_loss_without_moe_layers_is_the_cross_entropy(overrides):
    record = run(overrides, "model=dense", "trainer.steps=2")
    assert [line["train/balance_loss"] for line in record.metrics() if "train/balance_loss" in line] == [0.0]
