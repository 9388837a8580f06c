"""`python run.py reproduce` and `report`: trains what is missing, measures, and writes a report beside the records."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any

from moepp.errors import RunError, UsageError
from moepp.experiments import discover
from moepp.names import did_you_mean
from moepp.program import command
from moepp.records import RunRecord, read_json, write_json, write_text
from moepp.reports.arms import TASKS, of_records, of_sweep
from moepp.reports.experiment import Context, Experiment, Findings, Runs
from moepp.reports.provenance import provenance
from moepp.reports.rerun import rerun_command
from moepp.reports.seconds import Clock
from moepp.reports.standing import Standing, standing
from moepp.shipped import SWEEPS, YAML, names, overlaid
from moepp.terminal import width, working

RESULTS = Path("results")
RUNS = Path("runs")  # where records are unless `runs=` says otherwise


def find(what: str) -> Experiment:
    """By the name of an experiment or of a sweep, or by the path of a sweep file. Raises UsageError."""
    experiments, sweeps = discover(), names(overlaid(SWEEPS))
    if what in experiments:
        return experiments[what]
    if what in sweeps or what.endswith(YAML):
        return of_sweep(what)
    if Path(what).is_dir():
        raise UsageError(f"{what} holds no sweep.json, as the folder of a sweep's records does: runs/<sweep>-<scale>")
    if Path(what).parent != Path():
        raise UsageError(f"there is no file and no folder {what}")
    known = [*experiments, *sweeps]
    raise UsageError(f"no experiment and no sweep '{what}'; choose from {', '.join(known)}{did_you_mean(what, known)}")


def in_order() -> list[Experiment]:
    """The paper's tables, its figures, our own questions, then every sweep."""

    def place(experiment: Experiment) -> tuple[int, str, str]:
        kinds = [kind for kind, word in enumerate(("Table", "Fig")) if experiment.reference.startswith(word)]
        return (*(kinds or [2 if experiment.reference else 3]), experiment.reference, experiment.name)

    experiments = discover()
    sweeps = [of_sweep(name) for name in names(overlaid(SWEEPS)) if name not in experiments]
    return [*sorted(experiments.values(), key=place), *sweeps]


def listing() -> list[str]:
    """One line per experiment; `--wide` adds where it stands in the paper, what it trains, and its options."""
    columns = width()
    if columns is None:
        return [f"{e.name:<25} {e.reference:<17} {_about(e)}  ({_needs(e)})" for e in in_order()]
    return [f"{e.name:<25} {shorten(_about(e), columns - 26, placeholder='...')}" for e in in_order()]


def _about(experiment: Experiment) -> str:
    """A title that says more than the name, else the question."""
    named = experiment.title.lower() == experiment.name.replace("_", " ")
    return experiment.question if named else experiment.title


def _needs(experiment: Experiment) -> str:
    options = [f"{key}=..." for key in experiment.options] if experiment.options != TASKS else []
    return ", ".join([*(f"sweep {runs.sweep}" for runs in experiment.runs), *options]) or "trains nothing"


def reproduce(
    what: str,
    scale: str,
    workers: int = 0,
    arguments: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    flags: Mapping[str, str] | None = None,
    out: Path | None = None,
) -> None:
    """Trains what the experiment's runs lack, writes its report and prints its summary.

    `what` is an experiment, a sweep, the path of a sweep file, or the folder of a sweep's records. `arguments` are
    config values of the runs and the experiment's own options; `flags` are such options given as flags. The report goes
    beside the records, or to `out`/<name>/<scale>/. Says at the end where the seconds went. Raises UsageError for a
    scale, key or option that does not fit.
    """
    if plan := _records(what):
        what, scale, arguments = plan["name"], plan["scale"], [*arguments, f"runs={Path(what).parent}"]
    clock, experiment = Clock(), find(what)
    scale = _scale(experiment, scale)
    options, overrides = _own_options(experiment, arguments, flags or {})
    score = _asks_for_tasks(experiment, options)
    needed = () if options.get("weights") else experiment.runs  # a checkpoint takes the place of trained runs
    if overrides and not needed:
        raise UsageError(f"{overrides[0]} is of trained runs, and weights= takes their place: leave one of them out")
    Context(scale, options=options).check(least=2 if experiment.of_routing else 1)
    directories = {runs.sweep: _train(runs, scale, workers, overrides, seeds) for runs in needed}
    with clock.phase("timing"):
        for runs in needed:
            _time(runs, directories[runs.sweep])
    with clock.phase("tasks"):
        for directory in directories.values() if score else ():
            _score(directory, options)
    with clock.phase("report"):
        _publish(experiment, Context(scale, directories, options), out)
    print("\n".join(clock.told(directories.values())))


def report(what: str, scale: str, runs: Path = RUNS, out: Path | None = None) -> None:
    """The report of runs that are there already, without training. Arguments and errors as of `reproduce`."""
    if plan := _records(what):
        experiment, scale = of_records(Path(what)), plan["scale"]
        directories = {experiment.runs[0].sweep: Path(what)}
    else:
        experiment = find(what)
        scale = _scale(experiment, scale)
        directories = {needed.sweep: runs / f"{_sweep_name(needed)}-{scale}" for needed in experiment.runs}
    _publish(experiment, Context(scale, directories), out)


def report_sweep(sweep: str, directory: Path, out: Path | None = None) -> None:
    """What comes after the last trial of a sweep: its arms are timed together, and it reports itself."""
    experiment = of_sweep(sweep)
    [runs] = experiment.runs
    _time(runs, directory)
    _publish(experiment, Context(read_json(directory / "sweep.json")["scale"], {sweep: directory}), out)


def page() -> Path:
    """Writes results/index.html from the reports that are there."""
    from moepp.reports.page import write_page

    return write_page(in_order(), RESULTS)


def _records(what: str) -> Any:
    """The sweep.json of a folder of records; None for anything else."""
    return read_json(Path(what) / "sweep.json") if Path(what).is_dir() else None


def _sweep_name(runs: Runs) -> str:
    from moepp.sweeps.reading import read_sweep

    return read_sweep(runs.sweep).name


def _scale(experiment: Experiment, scale: str) -> str:
    if len(experiment.scales) == 1:
        return experiment.scales[0]
    if scale not in experiment.scales:
        raise UsageError(f"{experiment.name} has no scale '{scale}'; choose from {', '.join(experiment.scales)}")
    return scale


def _own_options(
    experiment: Experiment, arguments: Sequence[str], flags: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """The experiment's own options, and the config values that remain for its runs."""
    given = dict(flags)
    overrides = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in experiment.options:
            given[key] = value
        else:
            overrides.append(argument)
    unknown = [key for key in given if key not in experiment.options]
    if unknown or (overrides and not experiment.runs):
        known = ", ".join(f"{key}= ({about})" for key, about in experiment.options.items()) or "no options"
        raise UsageError(f"{experiment.name} knows no {[*unknown, *overrides][0]}; it takes {known}")
    return given, overrides


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


def _time(runs: Runs, directory: Path) -> None:
    if runs.timed:
        from moepp.sweeps.timing import time_arms

        time_arms(directory)


def _asks_for_tasks(experiment: Experiment, options: Mapping[str, str]) -> bool:
    """Whether trials are to be scored on downstream tasks; what is wrong with that is said before anything trains."""
    if "tasks" not in experiment.options or not experiment.runs or not options:
        return False
    if "tasks" not in options:
        raise UsageError(f"{min(options)} belongs to tasks, which names what to score")
    from moepp.evaluation.commands import check_request

    check_request(*_request(options))
    return True


def _request(options: Mapping[str, str]) -> tuple[str, Path | None, int | None]:
    folder, limit = options.get("tasks_dir"), options.get("limit")
    if limit is not None and not limit.isdecimal():
        raise UsageError(f"limit={limit} must be a whole number of examples")
    return options["tasks"], Path(folder) if folder else None, int(limit) if limit else None


def _score(directory: Path, options: Mapping[str, str]) -> None:
    from moepp.evaluation.commands import evaluate_sweep

    evaluate_sweep(directory, *_request(options))
    write_json(directory / "tasks.json", dict(options))  # for reports to say how they are made


def _publish(experiment: Experiment, context: Context, out: Path | None) -> None:
    """Measures, writes the report, puts it onto the sweeps' parent runs in the tracker, and prints its summary."""
    from moepp.reports.page import one_report
    from moepp.reports.report import note, terminal, write_report

    made_by = rerun_command(experiment, context)
    with working("measuring and writing the report"):
        found = replace(experiment.measure(context), standing=_standing(experiment, context))
        folder = _folder(experiment, context, out)
        files = write_report(experiment, found, folder, provenance(made_by, context))
    page = folder / "report.html"
    write_text(page, one_report(folder))
    with working("sending the report to MLflow"):
        for directory in context.directories.values():
            _log(directory, experiment.name, found, [*files, page], note(experiment, found, made_by))
    print(terminal(found))
    print(f"\nreport: {folder / 'report.md'}")
    for directory in context.directories.values():
        print(f"compare the runs in the browser: {command('ui', directory)}")


def _standing(experiment: Experiment, context: Context) -> tuple[Standing, ...]:
    needed = [runs for runs in experiment.runs if runs.sweep in context.directories]
    return tuple(standing(context.results(runs.sweep), runs.arms) for runs in needed)


def _folder(experiment: Experiment, context: Context, out: Path | None) -> Path:
    """Beside the records it was made from; below `out` with the size, as in gpu-1b, where the command chose one."""
    if out is not None:
        results = map(context.results, context.directories)
        chosen = {found.size for found in results if found.chose_size}
        return out / experiment.name / "-".join([context.scale, *sorted(chosen)])
    own = f"{experiment.name}-{context.scale}"
    beside = next(iter(context.directories.values()), RUNS / own)
    return beside / "report" if beside.name == own else beside / "report" / experiment.name


def _log(directory: Path, experiment: str, found: Findings, files: list[Path], text: str) -> None:
    """Puts a report onto the parent run of a sweep that it read, and onto runs of its arms, where these are tracked."""
    from moepp.tracking.arm_runs import log_arms
    from moepp.tracking.mirror import log_report
    from moepp.tracking.settings import mirror_config

    first = read_json(directory / "sweep.json")["trials"][0]["path"]
    tracking = mirror_config(RunRecord(directory / first).read("config.yaml").get("tracking", {"backend": "jsonl"}))
    if tracking.backend == "mlflow":
        log_report(directory, tracking, directory.parent, experiment, found.metrics, files, text)
        if found.arm_runs:
            log_arms(directory, tracking, directory.parent, found.arm_runs)
