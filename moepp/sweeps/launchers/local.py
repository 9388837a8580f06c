"""This machine."""

from dataclasses import dataclass
from pathlib import Path

from moepp.sweeps.launchers.call import SweepCall


@dataclass
class LocalLauncher:
    """One worker, this process, that runs as many trials at a time as the machine has devices, or cores where the
    trials use none. Workers of their own for each device would import torch once more each and do the same.
    """

    def run(self, call: SweepCall) -> Path:
        from moepp.sweeps.runner import run_sweep

        return run_sweep(call.load(), call.scale, call.workers, call.overrides, call.seeds, minutes=call.minutes)
