"""Where the scores of a checkpoint are kept: no task is scored twice, and an interrupted call loses one at most."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from moepp.errors import RunError
from moepp.evaluation.checkpoints import answering_files, default_device, is_run, released_dtype
from moepp.evaluation.results import FOLDER, About, TaskResult, final_metrics, find_task_result, write_task_result
from moepp.records import RunRecord, digest_of
from moepp.tracking.mirror import mirror_again
from moepp.training.initial import FINAL_WEIGHTS


@dataclass(frozen=True)
class ScoreStore:
    """The scores of one checkpoint. Those of a finished run's final weights are part of its record, `run`."""

    folder: Path
    name: str
    files: tuple[Path, ...]  # that decide the answers
    run: RunRecord | None
    dtype: str = ""  # of a folder that computes in another than its files'

    @classmethod
    def of(cls, source: Path) -> "ScoreStore":
        """Raises UsageError or RunError for what is no checkpoint."""
        source = source.expanduser()
        files = tuple(answering_files(source))
        if not is_run(source):
            dtype = released_dtype(default_device())
            said = "" if dtype is None else str(dtype).removeprefix("torch.")
            return cls(source / FOLDER, source.resolve().name, files, None, said)
        file, run = files[0], RunRecord(files[0].parents[1])
        if file.name == FINAL_WEIGHTS and run.status == "done":
            return cls(run.path / FOLDER, file.name, files, run)
        return cls(file.parent / FOLDER / file.stem, file.name, files, None)

    @cached_property
    def checkpoint(self) -> str:
        """Name, digest of all that decides the answers, and type; reading a large checkpoint for it takes a while."""
        return ":".join(filter(None, (self.name, digest_of(*self.files), self.dtype)))

    def find(self, wanted: About) -> TaskResult | None:
        return find_task_result(self.folder, wanted)

    def refuse_no_place(self) -> None:
        """Raises RunError where scores could not be kept, before they cost anything."""
        place = self.folder if self.run is None else self.run.path
        nearest = next(path for path in (place, *place.parents) if path.exists())
        if not os.access(nearest, os.W_OK):
            raise RunError(f"cannot write {place}, where its scores are kept; score a copy of it")

    def keep(self, result: TaskResult) -> None:
        """Raises RunError where it cannot be written."""
        if self.run is None:
            write_task_result(self.folder, result)
            return
        with self.run.lock():
            write_task_result(self.folder, result)
            self.run.replace_final(final_metrics(result))
            mirror_again(self.run)
