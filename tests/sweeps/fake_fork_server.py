"""A fork server that runs the code WHILE_LOADING for its loading, and whose trials are the Python files given as their
configs. Here /dev/zero is a GPU, too.
"""

import os
import sys
from pathlib import Path

from moepp import cli
from moepp.sweeps import fork_server, trial


def load() -> None:
    exec(os.environ.get("WHILE_LOADING", ""), globals())


def run_file(config: Path) -> None:
    exec(config.read_text())


fork_server.load_libraries, trial.run_trial = load, run_file
fork_server.TRIAL_COMMAND = (sys.executable,)
fork_server.COMPUTE_NODES += ("/dev/zero",)
sys.exit(cli.main(sys.argv[1:]))
