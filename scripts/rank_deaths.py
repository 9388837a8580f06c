"""Kills or freezes ranks of real training runs, and measures how long it takes until no process of the run is left.

    python scripts/rank_deaths.py [--strategies expert_parallel fsdp] [--devices 2] [--timeout 60] [--accelerator auto]

Every event strikes each rank of a run of its own. A killed rank must end the run within 10 seconds, a frozen one within
the timeout and 30 seconds, both with one line that names it. tests/training/test_launch.py has the deaths that need no
timeout; here is the frozen rank, and what NCCL does where there are GPUs.
"""

import argparse
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from moepp.records import RunRecord  # noqa: E402

SECONDS_TO_START = 300
EVENTS = (signal.SIGKILL, signal.SIGSTOP)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=["expert_parallel"])
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--timeout", type=int, default=60, help="strategy.timeout_s, which bounds the start too")
    parser.add_argument("--accelerator", default="auto")
    options = parser.parse_args()
    failed = 0
    for strategy, event, rank in itertools.product(options.strategies, EVENTS, range(options.devices)):
        with tempfile.TemporaryDirectory() as folder:
            seconds, line, left = strike(Path(folder), strategy, event, rank, options)
        allowed = 10 if event == signal.SIGKILL else options.timeout + 30
        good = seconds <= allowed and not left and f"rank {rank}" in line
        failed += not good
        print(
            f"{'ok' if good else 'BAD'}  {strategy}: {event.name} to rank {rank}: {seconds:.1f} s, {left} left: {line}"
        )
    sys.exit(f"{failed} of the runs did not end as they should" if failed else 0)


def strike(
    folder: Path, strategy: str, event: signal.Signals, rank: int, options: argparse.Namespace
) -> tuple[float, str, int]:
    """Seconds from the event to the end of the command, its last line, and how many of its processes outlived it."""
    command = [
        sys.executable, str(ROOT / "run.py"), "train", "size=smoke", "tracking=jsonl", f"runs={folder}",
        f"strategy={strategy}", f"trainer.devices={options.devices}", f"strategy.timeout_s={options.timeout}",
        f"trainer.accelerator={options.accelerator}", "trainer.steps=1000000", "trainer.val_every=1000000",
        "trainer.log_every=1", "trainer.progress=false",
    ]  # fmt: skip
    starter = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    ranks = wait_for_steps(folder, starter)
    begun = time.monotonic()
    os.kill(ranks[rank], event)
    _, errors = starter.communicate()
    return time.monotonic() - begun, errors.strip().splitlines()[-1], sum(map(runs, ranks))


def wait_for_steps(folder: Path, starter: subprocess.Popen) -> list[int]:
    """The process of every rank, once the run has finished a few steps."""
    deadline = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < deadline and starter.poll() is None:
        time.sleep(0.2)
        for path in folder.glob("train/*/config.yaml"):
            if any(line["step"] >= 5 for line in RunRecord(path.parent).metrics()):
                return sorted(children(starter.pid), key=rank_of)
    starter.kill()
    sys.exit(f"the run did not train: {starter.communicate()[1]}")


def children(parent: int) -> list[int]:
    threads = Path(f"/proc/{parent}/task").glob("*/children")
    return [int(pid) for thread in threads for pid in thread.read_text().split()]


def rank_of(pid: int) -> int:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(int(v.removeprefix(b"RANK=")) for v in variables if v.startswith(b"RANK="))


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    main()
