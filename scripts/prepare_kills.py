"""Kills `run.py prepare` of a large corpus in each of its phases: `python scripts/prepare_kills.py [--megabytes 1000]`.

The corpus is JSON lines of paragraphs in another order in each round, as many rounds as it takes. Killed while it
reads, while it trains the tokenizer and while it tokenises, the command must end when it is called a fourth time. Says
for each call how long it took, what memory its processes held at most (each page counted once), and the CPU seconds.
"""

import argparse
import glob
import json
import os
import random
import resource
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

RUN = Path(__file__).resolve().parent.parent / "run.py"
PARAGRAPHS = 8  # to a document
LOOK = 0.25  # seconds between looks at what is there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default=f"{sysconfig.get_path('stdlib')}/*.py", help="files to take paragraphs from")
    parser.add_argument("--megabytes", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus, cache = Path(folder) / "corpus.jsonl", Path(folder) / "cache"
        megabytes = write(corpus, options.path, options.megabytes)
        print(f"{megabytes:.0f} MB of text, {len(os.sched_getaffinity(0))} cores")

        def is_there(pattern: str) -> bool:
            return bool(glob.glob(f"{cache}/.*/{pattern}"))

        phases = {
            "killed while it reads": lambda: is_there("documents/00000.arrow"),
            "killed while it trains the tokenizer": lambda: is_there("documents/read.json"),
            "killed while it tokenises": lambda: is_there("*.train.json"),
            "to the end": lambda: False,
        }
        for name, due in phases.items():
            command = [sys.executable, str(RUN), "prepare", "data=text", f"data.path={corpus}", f"data.cache={cache}"]
            print(f"{name:<38} {call(command, due)}", flush=True)
        [header] = cache.glob("*/header.json")
        print(f"{json.loads(header.read_text())['train']['tokens']:,} tokens of training text")


def write(path: Path, pattern: str, megabytes: int) -> float:
    """Documents until there are so many megabytes of text; returns how many there are."""
    texts = [Path(file).read_text(errors="replace") for file in sorted(glob.glob(pattern))]
    written, found = 0, documents([line for text in texts for line in text.split("\n\n") if line.strip()])
    with open(path, "w") as file:
        while written < megabytes * 10**6:
            text = next(found)
            written += len(text.encode())
            file.write(json.dumps({"text": text}) + "\n")
    return written / 1e6


def documents(paragraphs: list[str]) -> Iterator[str]:
    order = random.Random(0)
    while True:
        order.shuffle(paragraphs)
        for first in range(0, len(paragraphs), PARAGRAPHS):
            yield "\n\n".join(paragraphs[first : first + PARAGRAPHS])


def call(command: list[str], due: Callable[[], bool]) -> str:
    """Until the command ends, or is killed once that is `due`."""
    before, began, most = cpu_seconds(), time.time(), 0.0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        most = max(most, sum(map(megabytes_of, tree(process.pid))))
        if due():
            process.send_signal(signal.SIGKILL)
        time.sleep(LOOK)
    spent = cpu_seconds() - before
    return f"rc {process.returncode:3}  {time.time() - began:5.0f} s  {most:5.0f} MB  {spent:5.0f} s of CPU"


def cpu_seconds() -> float:
    """Of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def tree(pid: int) -> list[int]:
    children = [pid]
    for file in glob.glob(f"/proc/{pid}/task/*/children"):
        try:
            children += [found for child in Path(file).read_text().split() for found in tree(int(child))]
        except OSError:  # it has ended
            continue
    return children


def megabytes_of(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1000


if __name__ == "__main__":
    main()
