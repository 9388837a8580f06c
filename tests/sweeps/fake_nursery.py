"""A nursery that loads nothing, after a while, and whose trials are the Python files given as their configs."""

import os
import sys
import time
from pathlib import Path

from moepp import cli
from moepp.sweeps import nursery, trial


def load_nothing() -> None:
    time.sleep(float(os.environ.get("SECONDS_TO_LOAD", 0)))
    if os.environ.get("BROKEN"):
        raise ImportError("libtorch.so is missing")


def run_file(config: Path) -> None:
    exec(config.read_text())


nursery.load_libraries, trial.run_trial = load_nothing, run_file
sys.exit(cli.main(sys.argv[1:]))
