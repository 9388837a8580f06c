"""Where the scores of a checkpoint are kept, so that no task is scored twice and an interrupted call loses at most one."""

from dataclasses import dataclass
from pathlib import Path

from moepp.evaluation.checkpoints import is_run, weight_files
from moepp.evaluation.results import FOLDER, About, TaskResult, final_metrics, find_task_result, write_task_result
from moepp.records import RunRecord, digest_of
from moepp.training.run import FINAL_WEIGHTS
from moepp.training.tracking import mirror_again


@dataclass(frozen=True)
class Kept:
    """The scores of one checkpoint. Those of a finished run's final weights are part of its record, `run`."""

    folder: Path
    checkpoint: str  # name and digest of the weights
    run: RunRecord | None

    @classmethod
    def of(cls, source: Path) -> "Kept":
        """Raises UsageError or RunError for what is no checkpoint."""
        source = source.expanduser()
        files = weight_files(source)
        checkpoint = f"{files[0].name if is_run(source) else source.resolve().name}:{digest_of(*files)}"
        if not is_run(source):
            return cls(source / FOLDER, checkpoint, None)
        run = RunRecord(files[0].parents[1])
        if files[0].name == FINAL_WEIGHTS and run.status == "done":
            return cls(run.path / FOLDER, checkpoint, run)
        return cls(files[0].parent / FOLDER / files[0].stem, checkpoint, None)

    def find(self, wanted: About) -> TaskResult | None:
        return find_task_result(self.folder, wanted)

    def keep(self, result: TaskResult) -> None:
        """Raises RunError where it cannot be written."""
        if self.run is None:
            write_task_result(self.folder, result)
            return
        with self.run.lock():
            write_task_result(self.folder, result)
            self.run.replace_final(final_metrics(result))
            mirror_again(self.run)
