import mmap
import time

import pytest
import torch

from moepp.training.system_metrics import SystemMeter

GIB = 2**30


def spin(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_busy_process_uses_a_core_and_a_sleeping_one_none():
    meter = SystemMeter(torch.device("cpu"))
    wall = time.perf_counter()
    spin(0.1)
    expected = 100 * 0.1 / (time.perf_counter() - wall)  # other processes may hold the cores
    assert meter.read()["system/cpu_percent"] == pytest.approx(expected, rel=0.2)
    time.sleep(0.1)
    assert meter.read()["system/cpu_percent"] < 30


def test_memory_is_what_the_process_holds_now():
    meter = SystemMeter(torch.device("cpu"))
    before = meter.read()["system/memory_gib"]
    with mmap.mmap(-1, GIB // 8) as held:  # allocators may keep what was freed before, and give that
        for _ in range(128):
            held.write(bytes(GIB // 1024))
        during = meter.read()["system/memory_gib"]
    assert 0.1 < during - before < 0.2
    assert meter.read()["system/memory_gib"] < before + 0.05


def test_a_gpu_is_read_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * GIB, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 73)
    found = SystemMeter(torch.device("cuda", 0)).read()
    assert (found["system/gpu_memory_gib"], found["system/gpu_percent"]) == (2.0, 73)


def test_without_nvml_there_is_no_utilization_and_no_error(monkeypatch):
    def absent(device):
        raise ModuleNotFoundError("nvidia-ml-py")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * GIB, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "utilization", absent)
    found = SystemMeter(torch.device("cuda", 0)).read()
    assert "system/gpu_percent" not in found and found["system/gpu_memory_gib"] == 2.0
