"""A nursery that loads nothing, after a while, and whose trials are the Python files given as their configs."""

import os
import sys
import time
from pathlib import Path

from moepp.sweeps import nursery


def load_nothing() -> None:
    time.sleep(float(os.environ.get("SECONDS_TO_LOAD", 0)))
    if os.environ.get("BROKEN"):
        raise ImportError("libtorch.so is missing")


def run_file(arguments: list[str]) -> int:
    exec(Path(arguments[1]).read_text())
    return 0


nursery.load_libraries, nursery.cli.main = load_nothing, run_file
sys.exit(nursery.main())
