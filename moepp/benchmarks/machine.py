"""What a benchmark runs on."""

import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from moepp.training.allocator import allocator
from moepp.training.provenance import cpu_name

# Columns of nvidia-smi, and what they are called here.
QUERIED = {
    "driver_version": "driver", "clocks.sm": "sm_mhz", "clocks.max.sm": "sm_max_mhz", "clocks.mem": "memory_mhz",
    "power.draw": "watts", "power.limit": "watts_limit", "temperature.gpu": "celsius",
}  # fmt: skip


@cache
def device_facts() -> dict[str, Any]:
    """The device's name; with a GPU driver, CUDA and Triton too."""
    if not torch.cuda.is_available():
        return {"device": cpu_name()}
    facts = {"device": torch.cuda.get_device_name(), "driver": nvidia_smi().get("driver")}
    return facts | {"cuda": torch.version.cuda, "triton": _version("triton")}


def describe_machine() -> str:
    facts = device_facts()
    if "cuda" not in facts:
        cpu = f"{facts['device']}, {torch.get_num_threads()} threads"
        return ", ".join(filter(None, [cpu, f"torch {torch.__version__}", allocator()]))
    versions = f"torch {torch.__version__}, CUDA {facts['cuda']}, Triton {facts['triton']}"
    return f"{facts['device']}, driver {facts['driver']}, {versions}"


def nvidia_smi() -> dict[str, str]:
    """Driver, clocks, power and temperature of the GPU as nvidia-smi prints them; empty where there is none."""
    if not torch.cuda.is_available():
        return {}
    gpu = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    command = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={','.join(QUERIED)}", "--format=csv,noheader,nounits"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(QUERIED.values(), (word.strip() for word in printed.split(",")), strict=False))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
