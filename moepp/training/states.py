"""The states of training that a run leaves in its record, to resume from: `checkpoints/step-<step>.ckpt`."""

import os
import shutil
import socket
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl

from moepp.errors import RunError
from moepp.records import RunRecord, fsync
from moepp.training.weights import DamagedCheckpoint, read_whole_checkpoint

PARTIAL = "saving.ckpt"  # what a checkpoint is called while it is written
SECONDS_TO_ARRIVE = 60.0  # for a file that another node has written


def state_name(step: int) -> str:
    return f"step-{step:08d}.ckpt"


def step_of(state: Path) -> int:
    return int(state.stem.removeprefix("step-"))


def states(folder: Path, but: Collection[int] = ()) -> list[Path]:
    """Those in `folder`, oldest first, but for those of some steps."""
    return [state for state in sorted(folder.glob("step-*.ckpt")) if not but or step_of(state) not in but]


def save_whole(trainer: pl.Trainer, record: RunRecord, name: str, weights_only: bool = False) -> None:
    """Saves `checkpoints/<name>`. It bears its name only once all of it is on the disk, after the metrics of its steps:
    what is found there is never half of it. All ranks call it.
    """
    begin_saving(trainer, record, weights_only)
    finish_saving(trainer, record, name, weights_only)


def begin_saving(trainer: pl.Trainer, record: RunRecord, weights_only: bool = False) -> None:
    """As far as training has to wait: until all is written, or, where every device writes its part, copied."""
    with _none_left_where_disks_fail(trainer, record):
        trainer.save_checkpoint(record.checkpoints / PARTIAL, weights_only)
        if trainer.is_global_zero:
            record.keep_metrics()


def is_written(trainer: pl.Trainer) -> bool:
    """Whether all ranks have written what was begun, as rank 0 knows."""
    saving = getattr(trainer.strategy, "saving", None)
    return saving is None or saving.done()


def finish_saving(trainer: pl.Trainer, record: RunRecord, name: str, weights_only: bool = False) -> None:
    """Gives what was begun its name. Weights alone, which are to be used elsewhere, become one file."""
    partial, path = record.checkpoints / PARTIAL, record.checkpoints / name
    with _none_left_where_disks_fail(trainer, record):
        if getattr(trainer.strategy, "saving", None) is not None:
            trainer.strategy.finish_saving()
        if trainer.is_global_zero:
            if weights_only and partial.is_dir():
                _join(partial)
            for written in [*(partial.iterdir() if partial.is_dir() else ()), partial]:
                fsync(written)
            remove_state(path)
            os.replace(partial, path)
            fsync(path.parent)
    if weights_only:
        trainer.strategy.barrier()  # the others wait for the one file


def _join(partial: Path) -> None:
    from moepp.models import checkpoint_parts

    whole = partial.with_suffix(".whole")
    checkpoint_parts.join(partial, whole)
    remove_state(partial)
    os.replace(whole, partial)


@contextmanager
def _none_left_where_disks_fail(trainer: pl.Trainer, record: RunRecord) -> Iterator[None]:
    try:
        yield
    except OSError:
        if trainer.is_global_zero:
            remove_state(record.checkpoints / PARTIAL)
        raise


def remove_state(state: Path) -> None:
    """A file, or a folder of parts, where there is one."""
    if state.is_dir():
        shutil.rmtree(state)
    else:
        state.unlink(missing_ok=True)


def rewind_to_newest(record: RunRecord) -> Path | None:
    """The newest state that can be read; the record's metrics are rewound to its step. Damaged ones are set aside: the
    run goes on from an older one, or anew.
    """
    for state in reversed(states(record.checkpoints)):
        try:
            step = read_whole_checkpoint(state)["global_step"]
        except DamagedCheckpoint as error:
            aside = state.with_name(f"damaged-{state.name}")
            state.replace(aside)
            print(f"warning: {error}; it is now {aside.name}, and the run goes on without it", file=sys.stderr)
            continue
        record.rewind(step)
        return state
    record.rewind(0)
    return None


def arrived(state: Path) -> Path:
    """Waits until another node's file system shows what rank 0 has seen."""
    deadline = time.monotonic() + SECONDS_TO_ARRIVE
    while not state.exists():
        if time.monotonic() > deadline:
            raise RunError(f"{state} is not on {socket.gethostname()}; all nodes must share the folder of runs")
        time.sleep(0.2)
    return state
