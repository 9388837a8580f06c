"""What this program is called."""

import shlex
import shutil
import sys
from pathlib import Path


def name() -> str:
    """For records, which are read elsewhere: the installed `moepp`, or run.py of a checkout."""
    return "moepp" if Path(sys.argv[0]).name == "moepp" else "python run.py"


def program() -> str:
    """As it was typed, for hints that can be typed again: with the path of an interpreter that is not on PATH."""
    typed = sys.argv[0]
    if Path(typed).name == "run.py":
        return f"{sys.orig_argv[0]} {typed}"
    return typed if name() == "moepp" and shutil.which("moepp") != typed else name()


def command(*words: object) -> str:
    """For hints: what can be typed as it stands."""
    return f"{program()} {shlex.join(map(str, words))}"


def missing(package: str | None) -> str:
    """What to do where a package that moepp needs is not installed."""
    return (
        f"error: {sys.executable} has no package {package}; in a checkout: make .venv/installed, then"
        " .venv/bin/python run.py (docs/install.md)"
    )
