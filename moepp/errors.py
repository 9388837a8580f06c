"""The ways a command ends early with one line instead of a traceback."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moepp.addresses import without_user


class _Said(Exception):
    """A message that people read, and records keep."""

    def __init__(self, message: str = ""):
        super().__init__(without_user(str(message)))


class UsageError(_Said):
    """The request cannot be carried out as written; the message says what to change."""

    exit_code = 2


class RunError(_Said):
    """A run that began correctly cannot go on; the message says what happened and what is kept."""

    exit_code = 1


class Interrupted(RunError):
    """The process was asked to stop; the same command continues from what is saved."""

    exit_code = 130


class PeerLost(RunError):
    """Another process of the run died or does not answer: the reason is there, not in this process."""

    exit_code = 3


class DiskFull(RunError):
    """Nothing more fits on the disk: what comes next would fare no better."""

    exit_code = 74


@contextmanager
def at(place: str) -> Iterator[None]:
    """A UsageError of the block is said with the place, once."""
    try:
        yield
    except UsageError as error:
        said = " ".join(str(error).split())
        raise UsageError(said if place in said else f"{place}: {said}") from None


@contextmanager
def refused_at(place: str | Path) -> Iterator[None]:
    """What a check in the block refuses, a ValueError, becomes a UsageError with the place."""
    try:
        yield
    except ValueError as error:
        raise UsageError(f"{place}: {error}") from None


def reason(error: OSError) -> str:
    """What the system said, in one line; shutil gathers what it said of many files."""
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):
        source, _, why = error.args[0][0]
        return f"{source}: {why}"
    return (error.strerror or str(error) or type(error).__name__).splitlines()[0]
