"""What this program is called."""

import sys
from pathlib import Path


def program() -> str:
    """As it was typed, for hints that can be typed again: the installed `moepp`, or run.py of a checkout."""
    return "moepp" if Path(sys.argv[0]).name == "moepp" else "python run.py"
