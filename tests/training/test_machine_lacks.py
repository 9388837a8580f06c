import pytest
import torch

from moepp.training import machine
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
