"""Commands that are printed for a sweep: what can be typed next, in the words that the sweep was called with."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from moepp.program import command
from moepp.shipped import SWEEPS, overlaid

if TYPE_CHECKING:
    from moepp.sweeps.spec import Sweep


def sweep_command(action: str, sweep: "Sweep", scale: str, overrides: Iterable[str]) -> str:
    """`sweep ACTION` for the records of a sweep: of its overrides only the folder of runs says where they are."""
    runs = [word for word in overrides if word.startswith("runs=")]
    return command("sweep", action, _word(sweep), "--scale", scale, *runs)


def _word(sweep: "Sweep") -> str:
    """What `read_sweep` finds it by: its name among sweeps, else its path."""
    if not sweep.file:
        return sweep.name
    file = Path(sweep.file)
    return file.stem if file.parent in overlaid(SWEEPS) else sweep.file
