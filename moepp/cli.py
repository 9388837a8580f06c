"""The commands. Every import that costs time happens inside the command that needs it."""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moepp.errors import Interrupted, RunError, UsageError, reason

if TYPE_CHECKING:
    from moepp.sweeps.launchers.call import SweepCall
    from moepp.training.settings import RunConfig

OVERRIDES = "config values: group=fragment (size=tiny, data=text) or dotted.key=value (model.top_k=1); see conf/"

SWEEP_ACTIONS = (
    "plan: trials, budgets and time, without training; run: everything that is not done, on this machine or with"
    " launcher=slurm or launcher=ray; status: what is done, running,"
    " failed and waiting; work: one trial at a time, beside any number of workers that share the folder of records"
    " (--workers: how many share this machine); retry: forget failures, for the next run or work to try again"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and hasattr(options, "overrides") and all("=" in word and word[0] != "-" for word in rest):
        options.overrides += rest  # argparse takes positional words in one place only; ours may stand anywhere
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if hasattr(options, "overrides"):
        options.overrides += getattr(options, "after_seeds", [])
    if not hasattr(options, "command"):
        parser.print_help()
        return 0
    try:
        options.command(options)
    except (UsageError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # a folder that is not there, is none, or must not be read or written
        where = f"cannot read or write {error.filename}: " if error.filename else ""
        print(f"error: {where}{reason(error)}", file=sys.stderr)
        return RunError.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


class _Seeds(argparse.Action):
    """The numbers after --seeds. argparse gives an option all words that follow, so overrides among them go on."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        numbers = [word for word in values if "=" not in word]
        for word in numbers:
            if not word.isdecimal():
                raise argparse.ArgumentError(self, f"'{word}' is not a whole number")
        if not numbers:
            raise argparse.ArgumentError(self, "expected at least one number")
        namespace.seeds = [int(word) for word in numbers]
        namespace.after_seeds = [word for word in values if "=" in word]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="run.py", description="MoE++: train, ablate, compare.")
    commands = parser.add_subparsers(title="commands", metavar="")

    def add(name: str, command: Callable[[argparse.Namespace], None], summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(command=command)
        return sub

    def add_overrides(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)

    def add_scale(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--scale", default="laptop", help="smoke, laptop, gpu or paper, as the sweep file defines them"
        )

    def add_what(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "experiment", nargs="?", help="an experiment, a sweep, the path of a sweep file, or a folder of its records"
        )
        sub.add_argument("--out", type=Path, metavar="DIR", help="write DIR/<name>/<scale>/; else beside the records")

    def add_tasks(sub: argparse.ArgumentParser, default: str | None) -> None:
        sub.add_argument("--tasks", default=default, help="`paper`: the paper's eleven; or names, as sciq,piqa,boolq:0")
        sub.add_argument("--tasks-dir", metavar="DIR", help="local task data, <task>.jsonl[.gz]; else the hub's")
        sub.add_argument("--limit", type=int, help="examples of each task at most, in all of its parts")

    reproduce = add("reproduce", _reproduce, "make a table or figure of the paper and print ours beside it")
    add_what(reproduce)
    reproduce.add_argument("--list", action="store_true", help="list the experiments and the sweeps")
    reproduce.add_argument("--workers", type=int, default=0, help="trials at a time; 0: one per core, one per GPU")
    reproduce.add_argument("--seeds", action=_Seeds, nargs="+", help="instead of the sweep file's")
    add_tasks(reproduce, default=None)
    add_scale(reproduce)
    add_overrides(reproduce)

    sweep = add("sweep", _sweep, "plan, run, watch or share a sweep, with the same arguments for each")
    sweep.add_argument("action", choices=["plan", "run", "status", "work", "retry"], help=SWEEP_ACTIONS)
    sweep.add_argument("sweep", help="a file of sweeps/, such as routers, or the path of your own")
    sweep.add_argument("--workers", type=int, default=0, help="trials at a time; 0: one per core, one per GPU")
    sweep.add_argument("--seeds", action=_Seeds, nargs="+", help="instead of the sweep file's")
    sweep.add_argument("--minutes", type=float, help="of `run`: no trial begins that would not end in time")
    add_scale(sweep)
    add_overrides(sweep)

    report = add("report", _report, "rebuild a report from the run records, without training")
    add_what(report)
    report.add_argument("--all", action="store_true", help="write results/index.html, all reports on one page")
    report.add_argument("--runs", default="runs", help="folder of the run records")
    add_scale(report)

    train = add("train", _train, "train one model, or continue it")
    train.add_argument("--dry-run", action="store_true", help="print size, tokens, FLOPs, GPU hours, memory; then stop")
    add_overrides(train)

    prepare = add("prepare", _prepare, "tokenise a corpus and print the folder of token files")
    add_overrides(prepare)

    generate = add("generate", _generate, "continue a prompt with a trained run")
    generate.add_argument("run", type=Path, help="directory of a finished run")
    generate.add_argument("--prompt", default="The state of the Union", help="text to continue")
    generate.add_argument("--tokens", type=int, default=64, help="how many tokens to add")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    generate.add_argument("--seed", type=int, default=0, help="of the sampling")

    evaluate = add("evaluate", _evaluate, "score a trained run or a released checkpoint on the paper's tasks or others")
    evaluate.add_argument("checkpoint", type=Path, help="run directory, *.ckpt file, or folder in the released layout")
    add_tasks(evaluate, default="paper")
    evaluate.add_argument("--batch-tokens", type=int, default=4096, help="padded tokens per batch")

    compare = add("compare", _compare, "two runs, or two arms of a sweep, side by side")
    compare.add_argument("a", metavar="A", help="a run directory, or SWEEP_DIRECTORY:ARM")
    compare.add_argument("b", metavar="B", help="what to compare it with, in the same form")

    rerun = add("rerun", _rerun, "repeat a finished run from its record and compare the losses")
    rerun.add_argument("run", type=Path, help="directory of a finished run")

    ui = add("ui", _ui, "open the MLflow UI on the runs, on this machine only")
    ui.add_argument("sweep", nargs="?", help="a file of sweeps/, such as tau; without it, the newest one opens")
    ui.add_argument("--port", type=int, default=5000)
    add_scale(ui)
    add_overrides(ui)

    sync = add("sync", _sync, "bring MLflow up to the run records")
    add_overrides(sync)

    bench = add("bench", _bench, "time the device, the expert layer beside its floor and its peers, or training")
    bench.add_argument("what", choices=["card", "layer", "training", "parallel"])
    bench.add_argument("--scale", help="smoke, laptop, gpu or paper, as far as the benchmark has them")
    bench.add_argument("--minutes", type=float, help="measure nothing that would not end in time, and say what")
    bench.add_argument("--ffn", type=int, nargs="+", choices=[8, 16, 32, 64], help="FFN experts of the sets to measure")
    bench.add_argument(
        "--devices", type=int, help="of `bench parallel`: a process each, on GPUs where there are any (4)"
    )
    bench.add_argument("--routing", nargs="+", choices=["learned", "balanced"])
    bench.add_argument("--tokens", type=int, nargs="+")
    bench.add_argument("--repeats", type=int)
    bench.add_argument(
        "--out",
        type=Path,
        help="folder of the results, where the same command goes on with what is"
        " missing; default: results/bench_<what>/latest",
    )

    trial = add("trial", _trial, "train a frozen config in its own directory (what a sweep starts for each trial)")
    trial.add_argument("config", type=Path, help="config.yaml of a run directory")
    add("fork-server", _fork_server, "fork trials as the sweep at the other end of standard input asks")
    return parser


def _train(options: argparse.Namespace) -> None:
    from moepp.config import compose
    from moepp.training.settings import RunConfig, run_directory

    config = compose(RunConfig, options.overrides)
    if options.dry_run:
        from moepp.training.estimate import estimate

        print("\n".join(estimate(config)))
        return
    from moepp.process import no_collections

    with no_collections():
        from moepp.training.ranks.rank import Rank
        from moepp.training.run import freeze, train

    config = freeze(config)
    directory = run_directory(config)
    if not Rank.here().keeps_record(config):
        train(config, directory)
        return
    print(f"run record: {directory}")
    with _mirrored(config, directory):
        record = train(config, directory)
    for name, value in record.final().items():
        print(f"{name:>28} {value:.6g}")


def _mirrored(config: "RunConfig", directory: Path) -> AbstractContextManager[None]:
    """Follows the run into MLflow while it trains, where MLflow is asked for."""
    if config.tracking.backend == "jsonl":
        return nullcontext()
    from moepp.tracking.follower import followed

    return followed(directory, config.tracking, config.runs)


def _trial(options: argparse.Namespace) -> None:
    from moepp.sweeps.trial import run_trial

    run_trial(options.config)


def _fork_server(options: argparse.Namespace) -> None:
    from moepp.sweeps.fork_server import serve_forks
    from moepp.sweeps.trial import run_trial

    if config := serve_forks():
        run_trial(config)


def _prepare(options: argparse.Namespace) -> None:
    from moepp.config import compose
    from moepp.data.prepare import prepare
    from moepp.training.settings import RunConfig

    tokens = prepare(compose(RunConfig, options.overrides).data)
    train, val = tokens.header.train, tokens.header.val
    print(f"{tokens.path}: {train.tokens:,} training tokens, {val.tokens:,} held out, {train.documents:,} documents")


def _reproduce(options: argparse.Namespace) -> None:
    from moepp.reports.reproduce import listing, reproduce

    if options.list or options.experiment is None:
        print("\n".join(listing()))
        return
    given = {"tasks": options.tasks, "tasks_dir": options.tasks_dir, "limit": options.limit}
    flags = {name: str(value) for name, value in given.items() if value is not None}
    arguments = options.workers, options.overrides, options.seeds
    reproduce(options.experiment, options.scale, *arguments, flags, options.out)


def _sweep(options: argparse.Namespace) -> None:
    from moepp.sweeps import commands

    call, launcher = _call(options, options.sweep)
    if options.minutes is not None:
        if options.action != "run":
            raise UsageError(f"--minutes belongs to `sweep run`, not to `sweep {options.action}`")
        call = replace(call, minutes=options.minutes)
    if options.action == "run":
        if directory := commands.run(call, launcher):
            from moepp.reports.reproduce import report_sweep

            report_sweep(call.sweep, directory)
    else:
        getattr(commands, options.action)(call)


def _call(options: argparse.Namespace, sweep: str) -> "tuple[SweepCall, list[str]]":
    """The sweep as it was asked for, and the words that say where it shall run."""
    from moepp.sweeps.launchers import split
    from moepp.sweeps.launchers.call import SweepCall

    launcher, overrides = split(options.overrides)
    return SweepCall(sweep, options.scale, options.workers, overrides, options.seeds), launcher


def _report(options: argparse.Namespace) -> None:
    from moepp.reports.reproduce import page, report

    if options.all:
        print(f"open {page()} in a browser")
        return
    if options.experiment is None:
        raise UsageError("name an experiment or a sweep (`python run.py reproduce --list`), or give --all")
    report(options.experiment, options.scale, options.runs, options.out)


def _generate(options: argparse.Namespace) -> None:
    from moepp.training.generate import continue_text

    print(continue_text(options.run, options.prompt, options.tokens, options.temperature, options.seed))


def _evaluate(options: argparse.Namespace) -> None:
    from moepp.evaluation.commands import evaluate_checkpoint

    tasks = (options.tasks, Path(options.tasks_dir) if options.tasks_dir else None, options.limit)
    print(evaluate_checkpoint(options.checkpoint, *tasks, options.batch_tokens))


def _compare(options: argparse.Namespace) -> None:
    from moepp.reports.side_by_side import read_side, side_by_side

    print(side_by_side(read_side(options.a), read_side(options.b)))


def _rerun(options: argparse.Namespace) -> None:
    from moepp.records import RunRecord
    from moepp.reports.repetition import compare_repetition, describe
    from moepp.training.rerun import rerun

    again = rerun(options.run)
    repetition = compare_repetition(RunRecord(options.run), again)
    print("\n".join([f"{options.run} repeated in {again.path}", *describe(repetition)]))
    if repetition.unexplained:
        raise RunError(f"the losses of {options.run} differ although nothing else does")


def _bench(options: argparse.Namespace) -> None:
    from moepp.benchmarks.commands import bench

    out = options.out or Path(f"results/bench_{options.what}/latest")
    given = {
        "ffn": options.ffn, "devices": options.devices, "routings": options.routing, "tokens": options.tokens,
        "repeats": options.repeats,
    }  # fmt: skip
    lines, missing = bench(options.what, options.scale, out, options.minutes, given)
    print("\n".join([*lines, "", f"report: {out / 'report.md'}"]))
    if missing:
        raise Interrupted(f"{missing} groups of measurements were left out for lack of time; call this again")


def _ui(options: argparse.Namespace) -> None:
    from moepp.config import compose
    from moepp.sweeps.spec import read_sweep
    from moepp.tracking.mlflow_store import serve
    from moepp.training.settings import RunConfig

    if options.sweep and "=" in options.sweep:  # an override: argparse fills positions from the left
        options.overrides.insert(0, options.sweep)
        options.sweep = None
    config = compose(RunConfig, options.overrides)
    sweep = read_sweep(options.sweep).folder(options.scale, options.overrides) if options.sweep else None
    serve(config.tracking, config.runs, options.port, sweep)


def _sync(options: argparse.Namespace) -> None:
    from moepp.config import compose
    from moepp.tracking.mirror import sync_all
    from moepp.training.settings import RunConfig

    config = compose(RunConfig, options.overrides)
    print(f"{sync_all(config.runs, config.tracking)} run records are in MLflow")


if __name__ == "__main__":
    sys.exit(main())
