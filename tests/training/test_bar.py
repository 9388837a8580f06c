from types import SimpleNamespace

from moepp.training import bar
from moepp.training.bar import StepBar


def trainer(fn, step=0):
    return SimpleNamespace(
        max_steps=4, global_step=step, log_every_n_steps=2, num_val_batches=[3], state=SimpleNamespace(fn=fn),
        callback_metrics={"train/loss": 4.5, "perf/tokens_per_s": 1234.0},
    )  # fmt: skip


def test_steps_are_counted_with_the_newest_loss(capsys):
    shown = StepBar()
    shown.on_train_start(trainer("fit"), None)
    for step in (1, 2, 3, 4):
        shown.on_train_batch_end(trainer("fit", step))
    shown.on_train_end()
    last = capsys.readouterr().err.split("\r")[-1]
    assert last.startswith("step 4/4 |") and "loss=4.500, tokens/s=1,234" in last


def test_a_validation_is_no_silence(capsys, monkeypatch):
    monkeypatch.setattr(bar, "SECONDS", -1.0)
    shown = StepBar()
    shown.on_train_start(trainer("fit"), None)
    shown.on_validation_start(trainer("fit"), None)
    shown.on_validation_batch_end(trainer("fit"), None, None, None, 1)
    assert "validating 2/3, step 0/4" in capsys.readouterr().err
    shown.on_validation_end(trainer("fit"), None)
    shown.on_train_end()
    shown.on_validation_start(trainer("validate"), None)
    for batch in range(3):
        shown.on_validation_batch_end(trainer("validate"), None, None, None, batch)
    shown.on_validation_end(trainer("validate"), None)
    assert "validating 3/3 |" in capsys.readouterr().err
