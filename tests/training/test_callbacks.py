import gc
from types import SimpleNamespace

import pytest
import torch

from moepp.config import compose
from moepp.models.budget import forward_flops
from moepp.records import RunRecord
from moepp.training import final
from moepp.training.callbacks import CollectTogether, ResumeCheckpoint
from moepp.training.module import LanguageModel
from moepp.training.run import freeze, train
from moepp.training.settings import RunConfig, run_directory
from moepp.training.states import rewind_to_newest

WITHOUT_SIZES = ["trainer.precision=bf16-mixed", "model.backend=grouped"]  # of which the host is told


def test_the_progress_bar_shows_the_loss_without_asking_the_device_in_every_step(overrides, monkeypatch, capfd):
    asked, batches = [], []
    for name in ("item", "tolist", "__float__", "__int__", "__bool__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, real=real: (asked.append(len(batches)), real(self))[1])
    step = LanguageModel.training_step
    monkeypatch.setattr(
        LanguageModel, "training_step", lambda self, batch: (batches.append(batch), step(self, batch))[1]
    )
    config = freeze(compose(RunConfig, [*overrides, "trainer.progress=true", "trainer.log_every=4", *WITHOUT_SIZES]))
    record = train(config, run_directory(config))
    monkeypatch.undo()
    assert set(asked) <= {0, 4, 5, 8, 10, 12}  # where metrics, checkpoints or validations are due
    shown = capfd.readouterr()
    (last,) = (line["train/loss"] for line in record.metrics() if line["step"] == 12 and "train/loss" in line)
    assert f"loss={last:.3f}" in shown.err


def test_two_checkpoints_are_kept_and_the_newest_is_continued(tmp_path):
    record, module = RunRecord(tmp_path), SimpleNamespace(first_bad_step=torch.tensor(-1))
    keeper = ResumeCheckpoint(record, every=1, val_every=100)
    for step in (1, 2, 3):
        trainer = SimpleNamespace(
            global_step=step,
            is_global_zero=True,
            should_stop=False,
            strategy=SimpleNamespace(barrier=lambda: None),
            fit_loop=SimpleNamespace(_should_accumulate=lambda: False),
        )
        trainer.save_checkpoint = lambda path, _, step=step: (
            path.parent.mkdir(exist_ok=True),
            torch.save({"global_step": step}, path),
        )
        keeper.on_train_batch_end(trainer, module)
    _, newest = sorted(record.checkpoints.iterdir())  # one more than is needed, should that be damaged
    assert newest.name == "step-00000003.ckpt"
    record.log(3, {"train/loss": 1.0})
    record.log(4, {"train/loss": 1.0})
    assert rewind_to_newest(record) == newest
    assert [line["step"] for line in record.metrics()] == [3]


def test_experts_are_timed_on_the_device_of_training(overrides, monkeypatch):
    """Lightning moves the module to the CPU when it has trained."""
    happened = []
    times = [{"routing": routing, "median_ms": 1.0} for routing in ("learned", "balanced")]
    cpu, to = LanguageModel.cpu, LanguageModel.to
    monkeypatch.setattr(LanguageModel, "cpu", lambda module: (happened.append("cpu"), cpu(module))[1])
    monkeypatch.setattr(LanguageModel, "to", lambda module, device: (happened.append(device), to(module, device))[1])
    monkeypatch.setattr(final, "expert_forward_times", lambda *_: (happened.append("timed"), times)[1])
    config = freeze(compose(RunConfig, [*overrides, "trainer.expert_timing=true"]))
    train(config, run_directory(config))
    assert happened[-3:] == ["cpu", torch.device("cpu"), "timed"]


def test_counts_for_the_control_are_summed_without_a_barrier(overrides):
    module = LanguageModel.of_run(compose(RunConfig, [*overrides, "model=loss_free"]), 0)
    module._trainer = SimpleNamespace(world_size=1, strategy=None)  # whose `reduce` has one
    layers, experts = len(module.model.moe_layers()), module.model.config.experts.total
    module.step_chosen_LN, module.step_tokens = torch.ones(layers, experts, dtype=torch.int64), experts // 2
    module.optimizer_step(0, 0, SimpleNamespace(step=lambda closure: closure()), lambda: None)
    assert module.step_chosen_LN is None
    assert all(layer.control.bias_N.any() for layer in module.model.moe_layers())


def test_the_garbage_collector_runs_in_the_same_steps_everywhere(monkeypatch):
    collected = []
    monkeypatch.setattr("gc.collect", lambda: collected.append(trainer.global_step))
    monkeypatch.setattr("moepp.training.callbacks.within_step", lambda trainer: trainer.global_step == 6)
    callback, trainer = CollectTogether(every=3), SimpleNamespace(global_step=0)
    callback.on_train_start(trainer, None)
    assert not gc.isenabled()
    for trainer.global_step in range(1, 10):
        callback.on_train_batch_end(trainer, None)
    callback.on_train_end(trainer, None)
    assert gc.isenabled() and collected == [3, 9]


@pytest.mark.parametrize("parts", [1, 2])
def test_speed_counts_no_slots_that_capacity_dropped(overrides, parts):
    more = ["model.capacity_factor=0.8", f"trainer.accumulate={parts}"]
    config = freeze(compose(RunConfig, [*overrides, *more]))
    lines = [line for line in train(config, run_directory(config)).metrics() if "perf/tflops" in line]
    for line in lines:
        chosen, dropped = line["router/ffn_per_token"], line["router/dropped_ffn_share"]
        per_token = 3 * sum(forward_flops(config.model, config.data.seq_len, chosen * (1 - dropped)).values())
        expected = per_token * line["perf/tokens_per_s"] / 1e12  # both are kept to six digits
        assert line["perf/tflops"] == pytest.approx(expected, rel=2e-5) and dropped > 0.01
