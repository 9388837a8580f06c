"""The weights a run begins with, where these are another run's. Needs no torch: a sweep names them before it trains."""

from pathlib import Path

from moepp.errors import RunError, UsageError
from moepp.records import RunRecord, digest_of

FINAL_WEIGHTS = "final.ckpt"  # weights only: a finished run needs no optimizer state


def checkpoint_file(source: Path) -> Path:
    """The file with a finished run's final weights, or `source` itself where that is a checkpoint file. Raises RunError
    where it is not there.
    """
    file = source if source.suffix == ".ckpt" else RunRecord(source).checkpoints / FINAL_WEIGHTS
    if not file.is_file():
        raise RunError(f"there is no checkpoint {file}" + ("; the run is not finished" if file != source else ""))
    return file


def initial_file(init_from: str) -> Path:
    """Raises UsageError where there is none."""
    try:
        return checkpoint_file(Path(init_from).expanduser())
    except RunError as error:
        raise UsageError(f"init_from={init_from}: {error}") from None


def initial_weights(init_from: str) -> dict[str, str]:
    """What makes the weights part of a run's identity: nothing for new ones, which the seed determines."""
    return {"digest": digest_of(initial_file(init_from))} if init_from else {}
