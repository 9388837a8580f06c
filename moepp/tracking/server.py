"""MLflow's command, whose child processes end with it: its server is one, and an interrupt before MLflow has taken note
of that would leave it behind. They stay in this process's group, so that a signal to the group reaches them.

    python -m moepp.tracking.server server --port 5000
"""

import os
import subprocess
from functools import partial
from typing import Any

from moepp.process import die_with


class TiedPopen(subprocess.Popen):
    """A child that the kernel kills when this process is gone."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, preexec_fn=partial(die_with, os.getpid()), **options)


def main() -> None:
    subprocess.Popen = TiedPopen
    from mlflow.cli import cli

    cli(prog_name="mlflow")


if __name__ == "__main__":
    main()
