"""What the cases of cluster_cases.py are made with: commands of this project, sweeps whose trials rest in every step,
and what it means that all of them are whole.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from moepp.records import RunRecord  # noqa: E402

PATIENCE = 900.0  # seconds that anything may take on a busy machine
SECONDS_OF_REST = 0.3  # in a step
STEPS = 40
BASE = (
    "size=smoke", "tracking=jsonl", "trainer.log_every=1", "trainer.val_every=20", "trainer.checkpoint_every=5",
    "trainer.expert_timing=false", "trainer.threads=1", "trainer.accelerator=cpu", "trainer.stop_s=15",
    "trainer.progress=false", "plugins=rest.py",
)  # fmt: skip
REST = """
import time
from lightning.pytorch.callbacks import Callback
from moepp import register

@register.callback("rest")
class Rest(Callback):
    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds

    def on_train_batch_start(self, *_):
        time.sleep(self.seconds)
"""
CASES: list[tuple[str, str, str, Callable[["Bench"], str]]] = []


class Unexpected(Exception):
    """What was seen in place of what is expected."""


def case(group: str, done: str, expected: str) -> Callable:
    def add(function: Callable[["Bench"], str]) -> Callable:
        CASES.append((group, done, expected, function))
        return function

    return add


def check(condition: object, seen: str) -> None:
    if not condition:
        raise Unexpected(" ".join(seen.split())[-300:])


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        check(time.monotonic() < deadline, f"not within {PATIENCE:.0f} s: {what}")
        time.sleep(0.2)


def run(*words: str) -> str:
    """What a command prints; raises Unexpected where it fails."""
    done = subprocess.run([*map(str, words)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    check(done.returncode == 0, f"{' '.join(map(str, words))}: {done.stdout}")
    return done.stdout


def processes(*words: str) -> list[int]:
    """Those whose command lines hold all of these words."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (folder / "cmdline").read_text().replace("\0", " ")
            if all(word in command for word in words):
                found.append(int(folder.name))
    return sorted(found)


class Command:
    """A command of this project, its output kept beside the sweep."""

    def __init__(self, folder: Path, words: Sequence[str], environment: dict[str, str] | None = None):
        self.log = folder / f"command-{len(list(folder.glob('command-*')))}.txt"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                words, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=os.environ | (environment or {})
            )

    @property
    def output(self) -> str:
        return self.log.read_text().replace("\r", "\n")

    def end(self, code: int = 0) -> str:
        """Its last line."""
        until(lambda: self.process.poll() is not None, f"the end of the command, which says {self.output[-200:]}")
        check(self.process.returncode == code, f"exit code {self.process.returncode}: {self.output}")
        return self.output.strip().splitlines()[-1]


class Bench:
    """One case's sweep: a file of its own, and the folder in which its commands run."""

    def __init__(self, folder: Path, arms: int = 2):
        self.folder, self.arms = folder, arms
        self.commands: list[Command] = []
        folder.mkdir(parents=True)
        (folder / "rest.py").write_text(REST)

    @property
    def records(self) -> list[RunRecord]:
        return [RunRecord(path.parent) for path in sorted(self.folder.glob("runs/*/*/config.yaml"))]

    def start(self, *words: str) -> Command:
        self.commands.append(Command(self.folder, words, {"OMP_NUM_THREADS": "1"}))
        return self.commands[-1]

    def sweep(self, *words: str, rest: float = SECONDS_OF_REST, action: str = "run") -> Command:
        arms = ", ".join(f"lr{arm}: [optim.lr={0.001 * (arm + 1):g}]" for arm in range(self.arms))
        (self.folder / "sweep.yaml").write_text(
            f"name: trial\nquestion: Is every trial whole?\nbase: [{', '.join(self.settings(rest))}]\n"
            f"scales: {{smoke: {{set: []}}}}\nbaseline: lr0\narms: {{{arms}}}\nseeds: [0]\n"
        )
        program = [sys.executable, __file__, "sweep", action, "sweep.yaml", "--scale", "smoke"]
        return self.start(*program, *words)

    def train(self, *words: str, by: Sequence[str] = (sys.executable,)) -> Command:
        return self.start(*by, str(ROOT / "run.py"), "train", *self.settings(), *words)

    def settings(self, rest: float = SECONDS_OF_REST) -> list[str]:
        slowly = f"trainer.callbacks.rest.seconds={rest}"
        return [*BASE, f"trainer.steps={STEPS}", slowly, f"data.cache={self.cache}"]

    @property
    def cache(self) -> Path:
        return self.folder.parent.parent / "cache"

    def steps(self) -> int:
        return max((len(record.metrics()) for record in self.records), default=0)

    def until_trained(self, steps: int = 8) -> None:
        until(lambda: self.steps() >= steps, f"{steps} steps of a trial")

    def whole(self) -> str:
        """Raises Unexpected unless every trial is."""
        for record in self.records:
            logged = [line["step"] for line in record.metrics() if "train/loss" in line]
            check(record.status == "done", f"{record.path.name} is {record.status}: {record.read('failed.json')}")
            check(logged == list(range(1, STEPS + 1)), f"{record.path.name} has steps {logged}")
        check(self.records, "no trial")
        return f"{len(self.records)} of {len(self.records)} whole"

    def close(self) -> None:
        for command in self.commands:
            if command.process.poll() is None:
                command.process.kill()
                command.process.wait()


def sweep_without_report() -> int:
    """`run.py sweep`, but for the report, which times the arms."""
    from moepp.cli import main
    from moepp.reports import reproduce

    reproduce.report_sweep = lambda *_: None
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(sweep_without_report())
