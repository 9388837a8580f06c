import pytest
import torch

from moepp.cli import main
from moepp.training import machine
from moepp.training.module import LanguageModel
from moepp.training.settings import TrainerConfig


@pytest.mark.skipif(torch.cuda.is_available(), reason="warns of CPUs alone")
@pytest.mark.parametrize(
    ("precision", "multiplies", "warned"), [("bf16-mixed", False, 1), ("bf16-mixed", True, 0), ("32-true", False, 0)]
)
def test_a_precision_that_the_cpu_imitates_is_said_in_a_line(monkeypatch, capsys, precision, multiplies, warned):
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda: multiplies)
    machine.warn_of_slow_products(TrainerConfig(precision=precision))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == warned and all("trainer.precision=bf16-mixed" in line for line in lines)


@pytest.mark.parametrize(("word", "size"), [("model.hidden=16777216", 299), ("data.batch_size=16777216", 2334)])
def test_a_step_that_the_machine_has_no_room_for_is_refused_before_it_begins(
    overrides, capsys, monkeypatch, word, size
):
    monkeypatch.setattr(machine, "memory_bytes", lambda trainer: 2**30)
    monkeypatch.setattr(LanguageModel, "of_run", lambda *_: pytest.fail("made"))
    assert main(["train", *overrides, word]) == 2
    assert f"error: a step takes about {size:,} GiB on this machine, which has 1.0 GiB: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:127]\nerr == 0. DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_run_without_memory_ends_in_one_line(overrides, capsys, monkeypatch, error):
    def training_step(*_):
        raise error

    monkeypatch.setattr(LanguageModel, "training_step", training_step)
    assert main(["train", *overrides]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory: ") and "--dry-run says what a step takes" in line


def test_layers_are_no_more_than_a_config_can_list(overrides, capsys):
    assert main(["train", *overrides, "model.layers=16777216", "--dry-run"]) == 2
    assert "model.layers=16777216 must be at least 1, and at most 65,536" in capsys.readouterr().err
