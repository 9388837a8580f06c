"""Runs and sweeps as Python objects, from their records alone: on any machine, and without torch until a model is
asked for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moepp.config import load
from moepp.errors import RunError, UsageError
from moepp.records import TOKENIZER, RunRecord, read_json
from moepp.training.settings import RunConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from moepp.models.protocol import CausalLM


@dataclass(frozen=True)
class LoadedRun:
    """A run as its record tells it; every part is read when it is asked for.

    Each raises UsageError in one line where the record lacks it or holds it damaged.
    """

    path: Path  # of the record
    source: Path  # the record, or one of its checkpoint files

    @property
    def status(self) -> str:
        """As of the record: `done`, `damaged`, `pruned`, `failed`, `started` or `waiting`."""
        return self._record.status

    @cached_property
    def config(self) -> RunConfig:
        return load(RunConfig, self.path / "config.yaml")

    @cached_property
    def model(self) -> "CausalLM":
        """With the final weights, or those of `source`, on the CPU and in evaluation mode."""
        from moepp.training.weights import load_model

        with _one_kind_of_error():
            return load_model(self.source)[0]

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        from moepp.data.tokenizer import load_tokenizer

        if not (self.path / TOKENIZER).is_file():
            raise UsageError(f"{self.path} has no {TOKENIZER}: its tokens were prepared elsewhere, without one")
        return load_tokenizer(self.path / TOKENIZER)

    @property
    def end_of_text(self) -> int:
        """The id that ends every document."""
        try:
            return self.provenance["data"]["end_of_text"]
        except KeyError:
            raise UsageError(f"{self.path / 'provenance.json'} does not say data.end_of_text; restore it") from None

    @property
    def metrics(self) -> list[dict[str, float]]:
        """A mapping for each logged step: `step`, `time` in milliseconds since 1970, and metrics by name."""
        with _one_kind_of_error():
            return self._whole().metrics()

    @property
    def final(self) -> dict[str, float]:
        """The `final/*` metrics without their prefix; empty while the run is unfinished."""
        with _one_kind_of_error():
            return self._whole().final()

    @property
    def provenance(self) -> dict[str, Any]:
        """Commit, versions, hardware and data of the attempt that ended the run."""
        with _one_kind_of_error():
            return self._record.read("provenance.json")

    @property
    def _record(self) -> RunRecord:
        return RunRecord(self.path)

    def _whole(self) -> RunRecord:
        if self.status == "damaged":
            raise UsageError(self._record.damage)
        return self._record


@dataclass(frozen=True)
class LoadedSweep:
    """The runs that the newest call of a sweep asked for, by arm and seed, and what its file says of it."""

    path: Path
    question: str
    baseline: str
    arms: dict[str, dict[int, LoadedRun]]


def load_run(path: Path | str) -> LoadedRun:
    """The run in a folder of records, or one with the weights of another of its checkpoint files (`*.ckpt`).

    Raises UsageError for what is no run.
    """
    source = Path(path).expanduser().absolute()
    folder = source.resolve().parent.parent if source.suffix == ".ckpt" else source
    if not (folder / "config.yaml").is_file():
        raise UsageError(f"{path} is no run: there is no {folder / 'config.yaml'}")
    return LoadedRun(folder, source)


def load_sweep(path: Path | str) -> LoadedSweep:
    """The sweep in a folder, `runs/<sweep>-<scale>/`. Raises UsageError for what is no sweep."""
    folder = Path(path).expanduser().absolute()
    with _one_kind_of_error():
        plan = read_json(folder / "sweep.json")
    if plan is None:
        raise UsageError(f"{path} is no sweep: there is no {folder / 'sweep.json'}")
    arms: dict[str, dict[int, LoadedRun]] = {}
    for trial in plan["trials"]:
        if not trial.get("left_out"):
            run = folder / trial["path"]
            arms.setdefault(trial["arm"], {})[trial["seed"]] = LoadedRun(run, run)
    return LoadedSweep(folder, plan["question"], plan["baseline"], arms)


@contextmanager
def _one_kind_of_error() -> Iterator[None]:
    """Who loads a run trains none: what a record or a checkpoint lacks is an error of the request."""
    try:
        yield
    except RunError as error:
        raise UsageError(str(error)) from error
