import dataclasses
import math

import pytest

from moepp.config import compose
from moepp.errors import UsageError
from moepp.training.run import freeze, train
from moepp.training.settings import RunConfig, run_directory

STILL = ["trainer.steps=1", "optim.lr=1.0e-12", "optim.weight_decay=0"]  # ends where it begins


@pytest.fixture
def source(overrides):
    config = freeze(compose(RunConfig, overrides))
    return train(config, run_directory(config))


def test_a_run_begins_with_the_weights_of_another(overrides, source):
    new, begun = (
        freeze(compose(RunConfig, [*overrides, *STILL, "seed=5", *extra]))
        for extra in ([], [f"init_from={source.path}"])
    )
    assert begun.init_weights["digest"] and new.init_weights == {}
    assert run_directory(new) != run_directory(begun)
    loss = train(begun, run_directory(begun)).final()["val_loss"]
    assert loss == pytest.approx(source.final()["val_loss"], abs=1e-5)
    assert abs(train(new, run_directory(new)).final()["val_loss"] - loss) > 0.01


def test_the_weights_are_the_identity_not_their_place(overrides, source):
    moved = source.path.rename(source.path.with_name("moved"))
    file = moved / "checkpoints" / "final.ckpt"
    first, second = (freeze(compose(RunConfig, [*overrides, f"init_from={place}"])) for place in (moved, file))
    assert run_directory(first) == run_directory(second)
    file.write_bytes(file.read_bytes() + b"x")
    assert run_directory(freeze(compose(RunConfig, [*overrides, f"init_from={file}"]))) != run_directory(first)
    with pytest.raises(UsageError, match="has changed since this run was frozen"):
        train(first, run_directory(first))


def test_weights_that_do_not_fit_are_refused_in_one_line(overrides, source):
    config = freeze(compose(RunConfig, [*overrides, f"init_from={source.path}", "model.layers=3"]))
    with pytest.raises(UsageError, match=r"does not fit: .* is none there, \(.*\) here"):
        train(config, run_directory(config))
    with pytest.raises(UsageError, match=r"init_from=nowhere: there is no checkpoint nowhere/checkpoints/final\.ckpt"):
        freeze(compose(RunConfig, [*overrides, "init_from=nowhere"]))


def test_an_interrupted_run_continues_from_its_own_weights(overrides, source, monkeypatch):
    """What it began with is read once, and may be gone by then."""
    config = freeze(compose(RunConfig, [*overrides, f"init_from={source.path}"]))
    directory = run_directory(config)
    with monkeypatch.context() as patched:
        patched.setattr("moepp.training.run.finish", lambda *_: None)
        train(config, directory)
    assert sorted(directory.glob("checkpoints/step-*.ckpt"))
    source.checkpoints.joinpath("final.ckpt").unlink()
    assert math.isfinite(train(dataclasses.replace(config), directory).final()["val_loss"])
