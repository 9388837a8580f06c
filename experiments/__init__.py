"""One file per table of the paper. The file's name is the experiment's; what it declares is `EXPERIMENT`."""

from importlib import import_module
from pkgutil import iter_modules

from moepp.analysis.experiment import Experiment


def discover() -> dict[str, Experiment]:
    """Every experiment of this folder by name; imports neither torch nor a plotting library."""
    return {module.name: import_module(f"{__name__}.{module.name}").EXPERIMENT for module in iter_modules(__path__)}
