"""What a run was made with: code, versions, hardware, data."""

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moepp.layers.kernels.cpu import features
from moepp.plugins import sources
from moepp.program import name
from moepp.records import RunRecord, UnreadableRecord, write_json
from moepp.shipped import PACKAGE
from moepp.training.allocator import allocator

PACKAGES = ("moepp", "torch", "lightning", "torchmetrics", "omegaconf", "mlflow", "datasets", "tokenizers", "numpy")

CIRCUMSTANCES = (
    "host",
    "git",
    "versions",
    "plugins",
    "hardware",
    "data",
)  # what makes two attempts at a run comparable
ATTEMPT = ("started", *CIRCUMSTANCES)


def collect(data_header: Mapping[str, Any]) -> dict[str, Any]:
    """The content of provenance.json; `data_header` is the header of the prepared tokens."""
    plugins = sources()
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([name(), *map(_shorten, sys.argv[1:])]),
        "host": socket.gethostname(),
        "git": git(PACKAGE.parent),
        "versions": {"python": platform.python_version(), **_versions()},
        **({"plugins": plugins} if plugins else {}),
        "hardware": _hardware(),
        "data": dict(data_header),
    }


def continued(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """`now`, the provenance of an attempt that goes on with the steps of another, which had `before`. Under `earlier`
    stand the attempts that were made with anything else, oldest first.
    """
    attempts = [*before.get("earlier", []), {key: before[key] for key in ATTEMPT if key in before}]
    known = [_circumstances(now)]
    earlier = []
    for attempt in attempts if before else []:
        if _circumstances(attempt) not in known:
            known.append(_circumstances(attempt))
            earlier.append(attempt)
    return {**now, "earlier": earlier} if earlier else dict(now)


def record_attempt(record: RunRecord, data_header: Mapping[str, Any], resumed: bool) -> None:
    """Writes provenance.json: of this attempt, and of those whose steps it continues. What cannot be read is no reason
    not to train.
    """
    try:
        before = record.read("provenance.json") if resumed else {}
    except UnreadableRecord as error:
        print(f"warning: {error}; what the run was begun with is no longer known", file=sys.stderr)
        before = {}
    write_json(record.path / "provenance.json", continued(before, collect(data_header)))


def _circumstances(provenance: Mapping[str, Any]) -> dict[str, Any]:
    return {key: provenance.get(key) for key in CIRCUMSTANCES}


def git(root: Path) -> dict[str, Any]:
    """`sha` and `dirty` (changes to tracked files, but for results/) of the checkout that holds moepp; empty for an
    installed package.
    """
    # A virtual environment may lie inside a stranger's repository: only a repository that tracks this code counts.
    if _git(root, "ls-files", "--error-unmatch", "moepp/__init__.py") is None:
        return {}
    changes = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ":(exclude)results")
    return {"sha": _git(root, "rev-parse", "HEAD"), "dirty": bool(changes)}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    except OSError:  # git is not installed
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _hardware() -> dict[str, Any]:
    torch = sys.modules.get("torch")  # looked up, not imported: a light command stays light
    gpus = []
    if torch is not None and torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads() if torch is not None else None,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": gpus,
        **({"allocator": known} if (known := allocator()) else {}),
    }


def cpu_name() -> str:
    """Its model and what it multiplies itself, which decides how sums are rounded: hosts of virtual machines show one
    model for all.
    """
    return f"{_cpu_model()} ({', '.join(known)})" if (known := features()) else _cpu_model()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _shorten(argument: str) -> str:
    """Paths as the reader of a shared record needs them: relative to the working directory, else to the home."""
    return argument.replace(f"{Path.cwd()}{os.sep}", "").replace(str(Path.home()), "~")
