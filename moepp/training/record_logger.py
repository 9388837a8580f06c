"""Lightning's logger interface over a run record."""

import struct
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from moepp.records import RunRecord

MEASURED = ("perf/", "system/")
DIGITS = 6  # of what clocks and counters say; more of them are noise, which does not compress
OF_A_FLOAT32 = 9  # tell every float32 from its neighbours; the others of a float64's seventeen say nothing


class RecordLogger(Logger):
    """Appends what Lightning logs to the record: one call, one line, at once.

    Nothing is held back, so a checkpoint never stands beside a record that lacks the steps before it.
    """

    def __init__(self, record: RunRecord):
        super().__init__()
        self.record = record

    @property
    def name(self) -> str:
        return self.record.path.parent.name

    @property
    def version(self) -> str:
        return self.record.path.name

    @property
    def save_dir(self) -> str:
        return str(self.record.path)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """`step` counts optimizer steps; Lightning's own `epoch` key says nothing where runs are measured in steps."""
        kept = {key: _kept(key, float(value)) for key, value in sorted(metrics.items()) if key != "epoch"}
        if kept:
            self.record.log(step, kept)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml already holds them."""


def _kept(key: str, value: float) -> float:
    """`value` without the digits that say nothing. Whole numbers count something, and stay."""
    if value.is_integer():
        return value
    if key.startswith(MEASURED):
        return float(f"{value:.{DIGITS}g}")
    return float(f"{value:.{OF_A_FLOAT32}g}") if _is_float32(value) else value


def _is_float32(value: float) -> bool:
    try:
        return struct.unpack("f", struct.pack("f", value))[0] == value
    except OverflowError:
        return False
