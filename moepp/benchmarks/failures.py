"""What an implementation that cannot run leaves behind: the reason, in one line, in its cell of the table."""

import textwrap
from collections.abc import Callable
from typing import TypeVar

import torch

from moepp.benchmarks.tables import Row
from moepp.errors import RunError

Result = TypeVar("Result")


class DeviceLost(RunError):
    """A kernel left the GPU in a state in which this process can run nothing more; `rows` say which."""

    def __init__(self, reason: str, rows: list[Row]):
        super().__init__(f"{reason}; the same command goes on without it")
        self.rows = rows


def attempt(call: Callable[[], Result], passing: tuple[type[Exception], ...] = ()) -> tuple[Result | None, str | None]:
    """The call's result, or None and the reason. The caller gets `passing`, and an AcceleratorError, after which no
    other can run.
    """
    try:
        return call(), None
    except (torch.AcceleratorError, *passing):
        raise
    except Exception as error:  # whatever it is, the others shall be measured
        return None, describe_failure(error)


def describe_failure(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    first = next(iter(str(error).strip().splitlines()), "")
    return textwrap.shorten(f"{type(error).__name__}: {first}", 120, placeholder=" ...")
