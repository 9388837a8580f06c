"""`python run.py reproduce` and `report`: trains what is missing, measures, writes results/<experiment>/<scale>/."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import discover
from moepp.errors import RunError, UsageError
from moepp.records import RunRecord, read_json, write_json
from moepp.reports.experiment import Experiment
from moepp.reports.rerun import reproduce_command
from moepp.reports.results import load_sweep_results
from moepp.reports.study import Runs, Study, StudyContext

RESULTS = Path("results")


def find(name: str) -> Experiment | Study:
    experiments = discover()
    if name not in experiments:
        nearest = difflib.get_close_matches(name, experiments, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UsageError(f"no experiment '{name}'; choose from {', '.join(experiments)}{hint}")
    return experiments[name]


def in_order() -> list[Experiment | Study]:
    """The paper's tables, its figures, then our own questions."""

    def place(experiment: Experiment | Study) -> tuple[int, str, str]:
        kinds = [kind for kind, word in enumerate(("Table", "Fig")) if experiment.reference.startswith(word)]
        return (*(kinds or [2 if experiment.reference else 3]), experiment.reference, experiment.name)

    return sorted(discover().values(), key=place)


def listing() -> list[str]:
    """One line per experiment."""
    return [f"{e.name:<16} {e.reference:<12} {e.title}  ({_needs(e)})" for e in in_order()]


def _needs(experiment: Experiment | Study) -> str:
    sweeps = [experiment.sweep] if isinstance(experiment, Experiment) else [runs.sweep for runs in experiment.runs]
    options = [] if isinstance(experiment, Experiment) else [f"{key}=..." for key in experiment.options]
    return ", ".join([*(f"sweep {sweep}" for sweep in sweeps), *options]) or "trains nothing"


def reproduce(
    name: str,
    scale: str,
    workers: int = 0,
    arguments: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    flags: Mapping[str, str] | None = None,
) -> None:
    """Trains what the experiment's runs lack, writes its report and prints the table.

    `arguments` are config values of the runs and, of a study, its own options; `flags` are options given as flags, of
    an arm comparison `tasks` with `tasks_dir` and `limit`: downstream tasks on which every trial is scored.
    Raises UsageError for a scale, key or option that does not fit.
    """
    experiment = find(name)
    if isinstance(experiment, Study):
        _reproduce_study(experiment, scale, workers, arguments, seeds, flags or {})
        return
    score = _task_scorer(flags or {})
    from moepp.sweeps.timing import time_arms

    directory = _train(Runs(experiment.sweep), scale, workers, arguments, seeds)
    time_arms(directory)
    score(directory)
    _write_comparison(experiment, directory)


def _task_scorer(flags: Mapping[str, str]) -> Callable[[Path], None]:
    """Scores the trials of a sweep on downstream tasks, where `tasks` asks for it; what is wrong is said at once."""
    if "tasks" not in flags:
        if flags:
            raise UsageError(f"--{min(flags).replace('_', '-')} belongs to --tasks, which names what to score")
        return lambda directory: None
    from moepp.evaluation.commands import check_request, evaluate_sweep

    folder, limit = flags.get("tasks_dir"), flags.get("limit")
    asked = (flags["tasks"], Path(folder) if folder else None, int(limit) if limit else None)
    check_request(*asked)

    def score(directory: Path) -> None:
        evaluate_sweep(directory, *asked)
        write_json(directory / "tasks.json", flags)  # for reports to say how they are made

    return score


def report(name: str, scale: str, runs: Path | str) -> None:
    """Rebuilds the report of an arm comparison from its records, without training."""
    experiment = find(name)
    if isinstance(experiment, Study):
        raise UsageError(f"{name} is measured, not read from records: `python run.py reproduce {name}` repeats it")
    _write_comparison(experiment, Path(runs) / f"{experiment.sweep}-{scale}")


def page() -> Path:
    """Writes results/index.html from the reports that are there."""
    from moepp.reports.page import write_page

    return write_page(in_order(), RESULTS)


def _train(runs: Runs, scale: str, workers: int, overrides: Sequence[str], seeds: Sequence[int] | None) -> Path:
    from moepp.sweeps.launchers import launch, split
    from moepp.sweeps.launchers.call import SweepCall

    launcher, overrides = split(overrides)
    directory = launch(
        SweepCall(runs.sweep, scale, workers, overrides, seeds or runs.seeds or None, runs.arms), launcher
    )
    if directory is None:
        raise RunError("nothing is reported yet; the same command does it once all trials are done")
    return directory


def _reproduce_study(
    study: Study,
    scale: str,
    workers: int,
    arguments: Sequence[str],
    seeds: Sequence[int] | None,
    flags: Mapping[str, str],
) -> None:
    from moepp.reports.study_report import study_note, terminal_study, write_study

    scale = study.scales[0] if len(study.scales) == 1 else scale
    if scale not in study.scales:
        raise UsageError(f"{study.name} has no scale '{scale}'; choose from {', '.join(study.scales)}")
    options, overrides = _split(study, arguments, flags)
    needed = () if options.get("weights") else study.runs  # a checkpoint takes the place of trained runs
    directories = {runs.sweep: _train(runs, scale, workers, overrides, seeds) for runs in needed}
    found = study.measure(StudyContext(scale, directories, options))
    command = reproduce_command(study.name, scale, arguments, seeds or (), flags)
    folder = _folder(study.name, scale, directories)
    files = write_study(study, found, folder, _provenance(command, scale, directories))
    for directory in directories.values():
        _log(directory, study.name, {}, files, study_note(study, found, command))
    print(terminal_study(found))
    print(f"\nreport: {folder / 'report.md'}")


def _split(study: Study, arguments: Sequence[str], flags: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The study's own options, and the config values that remain for its runs."""
    given = dict(flags)
    overrides = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in study.options:
            given[key] = value
        else:
            overrides.append(argument)
    unknown = [key for key in given if key not in study.options]
    if unknown or (overrides and not study.runs):
        known = ", ".join(f"{key}= ({about})" for key, about in study.options.items()) or "no options"
        raise UsageError(f"{study.name} knows no {[*unknown, *overrides][0]}; it takes {known}")
    return given, overrides


def _provenance(command: str, scale: str, directories: Mapping[str, Path]) -> dict[str, Any]:
    """Where a study's numbers come from; `command` is the one that repeats them."""
    from moepp.training.provenance import collect

    made = collect({})
    trials = {sweep: (read_json(path / "sweep.json") or {}).get("trials", []) for sweep, path in directories.items()}
    about = {key: made[key] for key in ("started", "git", "versions", "hardware")}
    return {"command": command, "scale": scale, **about, "runs": trials}


def _folder(name: str, scale: str, directories: Mapping[str, Path]) -> Path:
    """results/<name>/<scale>/; with the size, as in gpu-1b, where the runs have another than the scale's own."""
    from moepp.sweeps.spec import load_sweep

    for sweep, directory in directories.items():
        size = load_sweep_results(directory).size
        if size not in ("", load_sweep(sweep).size(scale)):
            return RESULTS / name / f"{scale}-{size}"
    return RESULTS / name / scale


def _write_comparison(experiment: Experiment, directory: Path) -> None:
    from moepp.reports.comparison import compare
    from moepp.reports.report import report_metrics, report_note, write_report
    from moepp.reports.tables import terminal_table

    results = load_sweep_results(directory)
    folder = _folder(experiment.name, results.scale, {experiment.sweep: directory})
    files = write_report(experiment, results, folder)
    comparison = compare(experiment, results)
    _log(directory, experiment.name, report_metrics(comparison), files, report_note(comparison))
    print(terminal_table(comparison))
    ui = f"python run.py ui {experiment.sweep} --scale {results.scale}"
    ui += f" runs={directory.parent}" if str(directory.parent) != "runs" else ""
    print(f"\nreport: {folder / 'report.md'}    compare the runs in the browser: {ui}")


def _log(directory: Path, experiment: str, metrics: Mapping[str, float], files: list[Path], note: str) -> None:
    """Puts a report onto the parent run of a sweep that it read, where its runs are tracked."""
    from moepp.tracking.mirror import log_report
    from moepp.tracking.settings import TrackingConfig

    first = read_json(directory / "sweep.json")["trials"][0]["path"]
    tracking = TrackingConfig(**RunRecord(directory / first).read("config.yaml").get("tracking", {"backend": "jsonl"}))
    if tracking.backend == "mlflow":
        log_report(directory, tracking, directory.parent, experiment, metrics, files, note)
