"""The weights a run begins with, where these are another run's. Needs no torch: a sweep names them before it trains."""

from pathlib import Path

from moepp.errors import RunError, UsageError
from moepp.models.foreign import weights_of
from moepp.program import program
from moepp.records import RunRecord, digest_of
from moepp.training.settings import RunConfig

FINAL_WEIGHTS = "final.ckpt"  # weights only: a finished run needs no optimizer state


def checkpoint_file(source: Path) -> Path:
    """The file with a finished run's final weights, or `source` itself where that is a checkpoint file. Raises RunError
    where it is not there.
    """
    file = source if source.suffix == ".ckpt" else RunRecord(source).checkpoints / FINAL_WEIGHTS
    if not file.is_file():
        raise RunError(f"there is no checkpoint {file}" + (_why_not(RunRecord(source)) if file != source else ""))
    return file


def _why_not(record: RunRecord) -> str:
    if record.status != "done":
        return "; the run is not finished"
    return f"; this record came without its weights, and `{program()} rerun {record.path}` trains it again"


def initial_file(init_from: str) -> Path:
    """Raises UsageError where there is none."""
    try:
        return checkpoint_file(Path(init_from).expanduser())
    except RunError as error:
        raise UsageError(f"init_from={init_from}: {error}") from None


def initial_weights(config: RunConfig) -> dict[str, str]:
    """What makes the weights part of a run's identity: nothing for new ones, which the seed determines."""
    found = {"digest": digest_of(initial_file(config.init_from))} if config.init_from else {}
    return found | ({"original": digest_of(*weights_of(config.model.path))} if config.model.path else {})
