"""`gpu_window.py run`: prepares the GPU's machine, then runs stage after stage and saves what each has found."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moepp.errors import Interrupted, UsageError
from moepp.records import read_json, write_json
from window.parcel import publish, unpack
from window.stages import Stage, run_stage

ROOT = Path(__file__).resolve().parents[2]
END_SHARE = 0.03  # of the time, kept for ending the last stage and saving what it has found
LEAST_SECONDS = 5.0  # that a stage gets, whatever its share; with less it is not begun
NEEDED = {
    "torch": "PyTorch",
    "lightning": "lightning",
    "tokenizers": "tokenizers",
    "yaml": "PyYAML",
    "click": "click",
    "pip": "pip",
}
EMPTY_EXPERTS = "tests/layers/test_empty_experts_gpu.py"  # known to hang on some builds of torch
QUICK_TESTS = ("tests/layers/test_bounds.py",)  # stand for the GPU's in a rehearsal
LOOK = """
import json, platform, sys, torch
gpu = torch.cuda.get_device_name() if sys.argv[1] == "cuda" and torch.cuda.is_available() else ""
versions = {"python": platform.python_version(), "torch": torch.__version__, "CUDA": torch.version.cuda or ""}
print(json.dumps({"device": sys.argv[1], "gpu": gpu, **versions}))
"""


def run(minutes: float, out: Path, device: str, pack: Path, names: Sequence[str] | None = None) -> int:
    """Runs the stages (`names`: these alone) that are not done; returns 0 where all of them are by then, else 1.

    Everything is made in a folder beside `out`, for what lies in `out` itself is all that comes back. A second call
    finds that folder or, on another machine, window.tar.gz in `out`. Raises UsageError in one line for what is missing.
    """
    deadline = time.monotonic() + 60 * minutes * (1 - END_SHARE)
    _require(pack)
    out, pack = out.resolve(), pack.resolve()
    work = out.with_name(f"{out.name}_work")
    chosen = _chosen(stages(pack, work, device), names)
    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)
    if not (work / "state.json").exists() and (out / "window.tar.gz").exists():
        unpack(out / "window.tar.gz", work)
    state = _begin(work, pack, device)
    window = Window(work, out, state, _environment(work, pack, device))
    signal.signal(signal.SIGTERM, _interrupt)
    return window.run(chosen, deadline)


class Window:
    """A folder of stages, what is known of each, and where it is published."""

    def __init__(self, work: Path, out: Path, state: dict[str, Any], environment: dict[str, str]):
        self.work, self.out, self.state, self.environment = work, out, state, environment

    def run(self, chosen: Sequence[Stage], deadline: float) -> int:
        known = self.state["stages"]
        waiting = [stage for stage in chosen if known.get(stage.name, {}).get("outcome") != "ok"]
        for stage in list(waiting):
            left = deadline - time.monotonic()
            seconds = max(LEAST_SECONDS, left * stage.share / sum(other.share for other in waiting))
            waiting.remove(stage)
            if left < LEAST_SECONDS:
                self._save(stage, {"outcome": "skipped: no time"})
                continue
            print(f"{stage.name}: at most {seconds:.0f} s", flush=True)
            self._save(stage, {"outcome": "running"})
            try:
                found = self._attempts(stage, seconds)
            except KeyboardInterrupt:
                self._save(stage, {"outcome": "unfinished", "why": "the window was asked to stop"})
                raise Interrupted("asked to stop; the same command continues") from None
            self._save(stage, found)
            print(f"{stage.name}: {found['outcome']} after {found['seconds']} s {found['why']}", flush=True)
        return 0 if all(known[stage.name]["outcome"] == "ok" for stage in chosen) else 1

    def _attempts(self, stage: Stage, seconds: float) -> dict[str, Any]:
        """Those that a stage is given while time is left: a benchmark goes on without what has just lost the GPU."""
        deadline, log = time.monotonic() + seconds, self.work / f"{stage.name}.txt"
        for _ in range(stage.attempts):
            found = run_stage(stage, deadline - time.monotonic(), log, self.environment, self._publish)
            if found["outcome"] != "failed" or deadline - time.monotonic() < LEAST_SECONDS:
                break
        return found

    def _save(self, stage: Stage, found: dict[str, Any]) -> None:
        self.state["stages"][stage.name] = found
        write_json(self.work / "state.json", self.state)
        self._publish()

    def _publish(self) -> None:
        publish(self.work, self.out, self.state)


def stages(pack: Path, work: Path, device: str) -> list[Stage]:
    """In order: what later ones need, then from what is surest and shortest to what takes all the time there is."""
    scale, cores = {"cuda": "gpu", "cpu": "smoke"}[device], len(os.sched_getaffinity(0))
    python = (sys.executable, "-u", "-m")
    timed = ("--scale", scale, "--minutes", "{minutes}")
    marked = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("tests/**/test_*.py")) if _for_gpu(path)]
    files = [name for name in marked if name != EMPTY_EXPERTS] if device == "cuda" else QUICK_TESTS
    return [
        Stage("tokens", 0.08, (*python, "window.tokens", str(pack), "tokens"), work),
        Stage("card", 0.08, (*python, "moepp.cli", "bench", "card", "--out", "card"), work, 2),
        Stage("layer", 0.22, (*python, "moepp.cli", "bench", "layer", *timed, "--out", "layer"), work, 4),
        Stage("training", 0.20, (*python, "moepp.cli", "bench", "training", *timed, "--out", "training"), work, 4),
        Stage("empty_experts", 0.08, (*_pytest(device, work / "empty_experts.txt"), EMPTY_EXPERTS), ROOT),
        Stage("tests", 0.16, (*_pytest(device, work / "tests.txt"), "-n", str(cores), *files), ROOT),
        Stage("runs", 0.18, (*python, "window.runs", *timed), work),
    ]


def _pytest(device: str, log: Path) -> tuple[str, ...]:
    """Verbose, for a log that is cut off must still say what has passed."""
    words = (sys.executable, "-u", "-m", "pytest", "-o", "addopts=--strict-markers", "-v", "--tb=short")
    words += ("-p", "window.testing", "--passed", str(log), "-p", "no:cacheprovider")
    return (*words, "--continue-on-collection-errors", *(["-m", "gpu"] * (device == "cuda")))


def _for_gpu(path: Path) -> bool:
    """Collecting the others would take long, and fail where they import what is not here."""
    return re.search(r"\bmark\.gpu\b|\bon_gpu\b", path.read_text()) is not None


def _chosen(known: Sequence[Stage], names: Sequence[str] | None) -> list[Stage]:
    if unknown := set(names or ()) - {stage.name for stage in known}:
        raise UsageError(f"no stage '{min(unknown)}'; choose from {', '.join(stage.name for stage in known)}")
    wanted = {*names, *(["tokens"] if "runs" in names else [])} if names else {stage.name for stage in known}
    return [stage for stage in known if stage.name in wanted]


def _require(pack: Path) -> None:
    if sys.version_info < (3, 11):  # noqa: UP036, for nothing has been installed that would have checked it
        raise UsageError(f"Python 3.11 or newer is needed, not {sys.version.split()[0]}")
    if missing := [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]:
        raise UsageError(f"{', '.join(missing)} must be installed for {sys.executable}")
    if not (pack / "manifest.json").exists():
        raise UsageError(f"{pack} holds no pack; make it with `gpu_window.py pack` where there is a network")


def _begin(work: Path, pack: Path, device: str) -> dict[str, Any]:
    """What is known of earlier calls, if they were on such a machine."""
    state = read_json(work / "state.json") or {"stages": {}}
    machine = _look(device)
    before = state.get("machine", machine)
    if (before["device"], before["gpu"]) != (machine["device"], machine["gpu"]):
        raise UsageError(f"{work} holds results of {before['gpu'] or before['device']}; choose another --out")
    state["machine"] = {**machine, "commit": read_json(pack / "manifest.json").get("commit", "")}
    return state


def _look(device: str) -> dict[str, str]:
    """The card and the versions, asked for in another process: this one never touches the GPU."""
    asked = subprocess.run([sys.executable, "-c", LOOK, device], capture_output=True, text=True, timeout=120)
    if asked.returncode:
        raise UsageError(f"PyTorch does not work here: {(asked.stderr.strip() or '?').splitlines()[-1]}")
    machine = json.loads(asked.stdout)
    if device == "cuda" and not machine["gpu"]:
        raise UsageError(f"torch {machine['torch']} sees no GPU; --device cpu rehearses without one")
    return {**machine, "driver": _driver() if machine["gpu"] else "", "date": datetime.now(UTC).date().isoformat()}


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[0].strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _environment(work: Path, pack: Path, device: str) -> dict[str, str]:
    """Of every stage: the packed wheels, installed into a folder of the window's own, and this checkout."""
    site = work / "site"
    wheels = [str(wheel) for wheel in sorted(pack.glob("*.whl"))]
    quiet = ["--quiet", "--disable-pip-version-check", "--root-user-action=ignore"]
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        *quiet,
        "--no-index",
        "--no-deps",
        "--upgrade",
        "--target",
        str(site),
    ]
    done = subprocess.run([*pip, *wheels], capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise UsageError(f"pip cannot install {pack}: {(done.stderr.strip() or '?').splitlines()[-1]}")
    paths = [str(site), str(ROOT), str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Threads that wait for each other on busy cores take ten times as long as one, and a rehearsal times nothing.
    rehearsed = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if device == "cpu" else {}
    return {**os.environ, **rehearsed, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
