"""`gpu_window.py keep`: brings what came back into results/, and says what to write into docs/results.md."""

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import chdir, suppress
from pathlib import Path
from typing import Any

from moepp.errors import UsageError
from moepp.records import read_json, write_json, write_text
from moepp.reports.arms import of_records
from moepp.reports.experiment import Context
from moepp.reports.provenance import provenance
from moepp.reports.report import write_report
from moepp.reports.rerun import rerun_command
from window.parcel import unpack
from window.runs import SWEEP
from window.summary import runs_table, table, tests

BENCHMARKS = ("card", "layer", "training")
TESTS = ("empty_experts", "tests")
SMALL = 2**20  # bytes: nothing larger belongs into a repository
SHAPE = ("tokens", "experts", "tau", "dtype", "direction")  # columns of the layer's table


def keep(folder: Path, results: Path, name: str | None, device: str) -> Iterator[str]:
    """Fills results/<benchmark>/<name>/ from the window in `folder`; yields what to write into docs/results.md.

    Raises UsageError where `folder` holds no window, or one that did not run on `device`.
    """
    if not (folder / "window.tar.gz").exists():
        raise UsageError(f"{folder} holds no window.tar.gz; give the --out of `gpu_window.py run`")
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        unpack(folder / "window.tar.gz", work)
        state = read_json(work / "state.json")
        machine = state["machine"]
        if machine["device"] != device:
            raise UsageError(f"{folder} was made with --device {machine['device']}; say so to keep it nevertheless")
        name = name or card(machine["gpu"])
        kept = [*_keep_benchmarks(work, results, name), *_keep_tests(work, state, results, name)]
        yield from (f"kept: {path}" for path in [*kept, *_keep_runs(work, state, results, name)])
        yield from ("", "For docs/results.md:", "", *_layer_table(work, machine), "")
        yield from faster_backends(work / "layer" / "table.csv")


def card(gpu: str) -> str:
    """A folder's name for a card: h100 of "NVIDIA H100 80GB HBM3"."""
    model = re.search(r"\b[A-Z]{1,3}\d{2,4}[A-Z]?\b", gpu)
    return (model[0] if model else re.sub(r"\W+", "-", gpu) or "cpu").lower()


def _keep_benchmarks(work: Path, results: Path, name: str) -> Iterator[Path]:
    for stage in BENCHMARKS:
        if not (work / stage).is_dir():
            continue
        for file in (
            file for file in sorted((work / stage).iterdir()) if file.is_file() and file.stat().st_size < SMALL
        ):
            target = results / f"bench_{stage}" / name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        yield results / f"bench_{stage}" / name


def _keep_tests(work: Path, state: Mapping[str, Any], results: Path, name: str) -> Iterator[Path]:
    lines = ["# Tests on the GPU", "", _machine(state["machine"])]
    for stage in TESTS:
        if (log := work / f"{stage}.txt").exists():
            outcome = state["stages"].get(stage, {}).get("outcome", "?")
            lines += ["", f"## {stage} ({outcome})", "", *tests(log.read_text(errors="replace"))]
    target = results / "gpu_tests" / name
    write_text(target / "report.md", "\n".join(lines) + "\n")
    write_json(target / "provenance.json", state)
    yield target


def _keep_runs(work: Path, state: Mapping[str, Any], results: Path, name: str) -> Iterator[Path]:
    for directory in sorted({path.parent.parent for path in work.glob(f"runs/{SWEEP}-*/*/done")}):
        target = (results / SWEEP / name).resolve()
        with chdir(work):  # a report names its runs from where it is
            _write_report(directory.relative_to(work), target)
        provenance = {
            **read_json(target / "provenance.json"),
            "window": state,
            "length": read_json(work / "runs/chosen.json"),
        }
        write_json(target / "provenance.json", provenance)
        yield target


def _write_report(directory: Path, target: Path) -> None:
    experiment = of_records(directory)
    context = Context(read_json(directory / "sweep.json")["scale"], {SWEEP: directory})
    made = provenance(rerun_command(experiment, context), context)
    write_report(experiment, experiment.measure(context), target, made)


def _layer_table(work: Path, machine: Mapping[str, str]) -> Iterator[str]:
    yield _machine(machine)
    for stage in BENCHMARKS:
        if (report := work / stage / "report.md").exists():
            yield from ("", f"`python run.py bench {stage}`:", *_tables(report.read_text()))
    if runs := list(runs_table(work)):
        yield from ("", f"`python run.py report {SWEEP}`:", "", *runs)


def _tables(report: str) -> Iterator[str]:
    before = ""
    for line in report.splitlines():
        if line.startswith("|"):
            yield from (line,) if before.startswith("|") else ("", line)
        before = line


def _machine(machine: Mapping[str, str]) -> str:
    versions = f"torch {machine['torch']}" + (
        f", CUDA {machine['CUDA']}, driver {machine['driver']}" if machine["gpu"] else ""
    )
    return f"{machine['gpu'] or 'CPU'}, {versions}, Python {machine['python']}, {machine['date']}."


def faster_backends(path: Path) -> Iterator[str]:
    """Which of `triton` and `grouped` is faster by shape, where the layer's table has timed both."""
    rows = table(path) if path.exists() else []
    for row in rows:
        with suppress(KeyError, ValueError):  # a cell may hold the reason why there is no time
            times = {backend: float(row[f"{backend}_ms"]) for backend in ("triton", "grouped")}
            fast, slow = sorted(times, key=times.__getitem__)
            shape = ", ".join(f"{key} {row[key]}" for key in SHAPE)
            yield f"- {shape}: {fast}, {times[slow] / times[fast]:.2f} times as fast as {slow}"
