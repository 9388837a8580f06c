"""One file per table or figure of the paper, and per question of our own. The file's name is the experiment's; what it
declares is `EXPERIMENT` (arms against a baseline) or `STUDY` (anything else that is measured).
"""

from importlib import import_module
from pkgutil import iter_modules

from moepp.reports.experiment import Experiment
from moepp.reports.study import Study


def discover() -> dict[str, Experiment | Study]:
    """Every experiment of this folder by name; imports neither torch nor a plotting library."""
    modules = {module.name: import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)}
    return {name: getattr(module, "EXPERIMENT", None) or module.STUDY for name, module in modules.items()}
