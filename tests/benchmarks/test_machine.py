import subprocess
from types import SimpleNamespace

import pytest
import torch

from moepp.benchmarks import machine

PRINTED = "580.65.06, 1980, 1980, 2619, 113.42, 700.00, 31\n"


@pytest.fixture
def gpu(monkeypatch):
    properties = SimpleNamespace(uuid="8a56a4bc-e184-a047-2620-be19fdf913d5")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)


def test_clocks_and_power_are_those_of_the_gpu_in_use(gpu, monkeypatch):
    asked = []

    def smi(command, **_):
        asked.extend(command)
        return SimpleNamespace(stdout=PRINTED)

    monkeypatch.setattr(subprocess, "run", smi)
    found = machine.nvidia_smi()
    assert (found["driver"], found["sm_mhz"], found["memory_mhz"], found["watts"]) == (
        "580.65.06", "1980", "2619", "113.42",
    )  # fmt: skip
    assert asked[:2] == ["nvidia-smi", "--id=GPU-8a56a4bc-e184-a047-2620-be19fdf913d5"]


def test_a_machine_without_nvidia_smi_says_nothing_of_its_gpu(gpu, monkeypatch):
    def smi(command, **_):
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(subprocess, "run", smi)
    assert machine.nvidia_smi() == {}
