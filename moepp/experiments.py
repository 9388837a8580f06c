"""The shipped files of experiments/ and those of ./experiments, as one package: `moepp.experiments.table5`."""

import re
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from moepp.errors import UsageError
from moepp.shipped import EXPERIMENTS, first_file, overlaid

__path__ = [str(folder) for folder in overlaid(EXPERIMENTS)]  # a file of the same name in the first one wins
DECLARES = re.compile(r"^EXPERIMENT\b", re.MULTILINE)


def discover() -> dict[str, Any]:
    """Every experiment by the name of its file; imports neither torch nor a plotting library.

    Raises UsageError, with the file, where one cannot be imported.
    """
    names = sorted(module.name for module in iter_modules(__path__))
    return {name: _load(name) for name in names if _declares(name)}


def _declares(name: str) -> bool:
    """Whether the file holds an experiment. Other programs of a user's folder are not run merely to list ours."""
    path = first_file(map(Path, __path__), f"{name}.py")
    return path is not None and DECLARES.search(path.read_text("utf-8")) is not None


def _load(name: str) -> Any:
    try:
        module = import_module(f"{__name__}.{name}")
    except Exception as error:  # a user's file may fail in any way
        where = first_file(map(Path, __path__), f"{name}.py")
        raise UsageError(f"{where}: {type(error).__name__}: {error}") from error
    return module.EXPERIMENT
