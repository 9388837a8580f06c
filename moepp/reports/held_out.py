"""How much a difference between arms depends on the text that was held out.

Shape suffixes: W windows of the last validation.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from moepp.records import VAL_WINDOWS
from moepp.reports.results import SweepResults
from moepp.statistics.clusters import cluster_error
from moepp.statistics.seeds import NO_ERROR, SharedError
from moepp.sweeps.spec import Contrast


def text_error(results: SweepResults, contrast: Contrast, seeds: Sequence[int]) -> SharedError:
    """The standard error of a contrast, mean over its arms and these seeds, over the documents of the held-out text.
    `NO_ERROR` where a run did not leave the losses of its windows, or runs were validated on different ones.
    """
    sides = [
        [_windows(results.runs[arm][s].path) for arm in side for s in seeds] for side in (contrast.arms, contrast.minus)
    ]
    runs = [windows for side in sides for windows in side]
    if any(windows is None for windows in runs):
        return NO_ERROR
    first = runs[0]
    if any(not np.array_equal(windows[:, :2], first[:, :2]) for windows in runs):
        return NO_ERROR
    on_W, off_W = (np.mean([windows[:, 2] for windows in side], axis=0) for side in sides)
    return cluster_error(on_W - off_W, first[:, 1])


@cache
def _windows(run: Path) -> np.ndarray | None:
    """Number, document and loss of every window, [W, 3]."""
    path = run / VAL_WINDOWS
    return np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2) if path.is_file() else None
