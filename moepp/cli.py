"""The commands. Every import that costs time happens inside the command that needs it."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from moepp import __version__
from moepp.errors import Interrupted, RunError, UsageError
from moepp.grammar import CommandGroup, Number, Several, Unicode, Word, run_command
from moepp.layers.bounds import Count, NotNegative, Range, Seed
from moepp.options import DIRECTORY, limit, minutes, out, overrides, scale, seeds, tasks, tasks_dir, wide, workers
from moepp.program import program
from moepp.terminal import working

if TYPE_CHECKING:
    from moepp.sweeps.launchers.call import SweepCall
    from moepp.training.settings import RunConfig

SWEEP_ACTIONS = {
    "plan": "trials, budgets and time, without training",
    "run": "all that is not done, here or with launcher=slurm or launcher=ray",
    "status": "what is done, running, failed and waiting",
    "work": "one trial at a time, beside others that share the records",
    "retry": "forget failures, for the next run or work to try again",
    "pack": "finished trials, without weights, into results/<sweep>/<scale>",
    "unpack": "back from there",
}


@click.group(
    cls=CommandGroup,
    invoke_without_command=True,
    context_settings={"show_default": True, "help_option_names": ["-h", "--help"]},
    epilog="Values of the config are written key=value and chosen by fragments, as model=vanilla: `keys` lists them.",
)
@click.version_option(__version__, prog_name="moepp")
@click.pass_context
def commands(context: click.Context) -> None:
    """MoE++: train, ablate, compare."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    return run_command(commands, arguments)


@commands.command(examples=["", "seed=1 runs=runs/mine"])
@overrides
def demo(overrides: Sequence[str]) -> None:
    """Train a tiny MoE++ and a vanilla MoE side by side, in a minute; draw what came of it."""
    with working("loading torch"):
        from moepp.demo import demo

    print(f"open {demo(overrides)} in a browser; next: `{program()} reproduce table5`")


@commands.command(examples=["--list", "table5 --scale smoke", "table3 model.gate=softmax runs=runs/softmax"])
@click.argument("experiment", required=False)
@click.option("--list", "listed", is_flag=True, help="List the experiments and the sweeps.")
@workers
@seeds
@tasks()
@tasks_dir
@limit
@out
@wide
@scale
@overrides
def reproduce(experiment: str | None, listed: bool, workers: int, scale: str, **asked: Any) -> None:
    """Make a table or figure of the paper and print ours beside it.

    EXPERIMENT is an experiment, a sweep, the path of a sweep file, or a folder of its records.
    """
    from moepp.reports.reproduce import listing, reproduce

    if listed or experiment is None:
        print("\n".join(listing()))
        return
    options = {name: asked[name] for name in ("tasks", "tasks_dir", "limit")}
    flags = {name: str(value) for name, value in options.items() if value is not None}
    reproduce(experiment, scale, workers, asked["overrides"], asked["seeds"], flags, asked["out"])


@commands.command(
    help="Plan, run, watch or share a sweep.\n\n"
    "SWEEP is a file of sweeps/, such as routers, or the path of your own. ACTION is one of\n\n\b\n"
    + "\n".join(f"{action:<8}{meaning}" for action, meaning in SWEEP_ACTIONS.items()),
    examples=["plan routers", "run tau --workers 2", "status tau runs=runs/softmax", "run routers launcher=slurm"],
)
@click.argument("action", type=Word(list(SWEEP_ACTIONS)), metavar="ACTION")
@click.argument("sweep")
@workers
@seeds
@minutes(help="Of `run`: no trial begins that would not end in time.")
@click.option(
    "--register",
    type=Several(click.STRING),
    metavar="[RECORDS]",
    help="Of `plan`: write results/<sweep>/<scale>/plan.json, what will be compared and how it will be judged; the"
    " deviation over seeds is that of an earlier sweep's records, else the file's.",
)
@wide
@scale
@overrides
def sweep(action: str, minutes: float | None, register: list[str] | None, **asked: Any) -> None:
    from moepp.sweeps import commands

    for flag, value, of in (("--minutes", minutes, "run"), ("--register", register, "plan")):
        if value is not None and action != of:
            raise UsageError(f"{flag} belongs to `sweep {of}`, not to `sweep {action}`")
    call, launcher = _call(**asked)
    if minutes is not None:
        call = replace(call, minutes=minutes)
    if action == "plan":
        commands.plan(call, register and register[0])
    elif action == "run":
        if directory := commands.run(call, launcher):
            from moepp.reports.reproduce import report_sweep

            report_sweep(call.sweep, directory)
    else:
        getattr(commands, action)(call)


def _call(
    sweep: str, scale: str, workers: int, overrides: Sequence[str], seeds: Sequence[int] | None
) -> "tuple[SweepCall, list[str]]":
    """The sweep as it was asked for, and the words that say where it shall run."""
    from moepp.sweeps.launchers import split
    from moepp.sweeps.launchers.call import SweepCall

    launcher, overrides = split(overrides)
    return SweepCall(sweep, scale, workers, overrides, seeds), launcher


@commands.command(examples=["table5", "tau --scale smoke runs=runs/softmax", "--all"])
@click.argument("experiment", required=False)
@click.option(
    "--all", "everything", is_flag=True, help="Write results/index.html, a front page, and a page for each experiment."
)
@click.option("--runs", type=DIRECTORY, default="runs", metavar="DIR", help="Folder of the run records.")
@out
@wide
@scale
def report(experiment: str | None, everything: bool, runs: Path, out: Path | None, scale: str) -> None:
    """Rebuild a report from the run records, without training.

    EXPERIMENT is an experiment, a sweep, the path of a sweep file, or a folder of its records.
    """
    from moepp.reports.reproduce import page, report

    if everything:
        print(f"open {page()} in a browser")
        return
    if experiment is None:
        raise UsageError(f"name an experiment or a sweep (`{program()} reproduce --list`), or give --all")
    report(experiment, scale, runs, out)


@commands.command(
    examples=[
        "size=tiny model=vanilla seed=3",
        "data=text data.path='books/*.txt.gz'",
        "recipe=s1 size=1b --dry-run",
        "--config runs/train/<hash>/config.yaml optim.lr=1e-3",
    ]
)
@click.option("--config", type=DIRECTORY, metavar="FILE", help="A run's config.yaml, in place of conf/base.yaml.")
@click.option("--dry-run", is_flag=True, help="Print size, tokens, FLOPs, GPU hours, memory; then stop.")
@overrides
def train(config: Path | None, dry_run: bool, overrides: Sequence[str]) -> None:
    """Train one model, or continue it."""
    from moepp.training.asked import asked_for
    from moepp.training.settings import run_directory

    asked = asked_for(_planned(overrides) if dry_run else overrides, config)
    if config and any(word.startswith(("data=", "data.")) for word in overrides):
        asked.data.digest = ""  # of other tokens
    if dry_run:
        from moepp.training.estimate import estimate
        from moepp.training.plan import plan

        print("\n".join([*estimate(asked), *plan(asked)]))
        return
    from moepp.data.corpora import refuse_missing_files
    from moepp.process import no_collections

    refuse_missing_files(asked.data)
    with no_collections(), working("loading torch and Lightning"):
        from moepp.training.ranks.rank import Rank
        from moepp.training.run import freeze, train
        from moepp.training.summary import summary

    asked = freeze(asked)
    directory = run_directory(asked)
    if not Rank.here().keeps_record(asked.trainer.num_nodes):
        train(asked, directory)
        return
    print(f"run record: {directory}")
    with _mirrored(asked, directory):
        record = train(asked, directory)
    print("\n".join(summary(record)))


def _planned(overrides: Sequence[str]) -> Sequence[str]:
    """For several devices and no strategy the plan of the simplest, beside all others: one is chosen from a plan."""
    several = any(word.startswith(("trainer.devices=", "trainer.num_nodes=")) for word in overrides)
    chosen = any(word.startswith(("strategy=", "strategy.")) for word in overrides)
    return [*overrides, "strategy=ddp"] if several and not chosen else overrides


def _mirrored(config: "RunConfig", directory: Path) -> AbstractContextManager[None]:
    """Follows the run into MLflow while it trains, where MLflow is asked for."""
    if config.tracking.backend == "jsonl":
        return nullcontext()
    from moepp.tracking.follower import followed

    return followed(directory, config.tracking, config.runs)


@commands.command(examples=["", "optim", "lr", "model.router plugins=my_router.py", "trainer size=1b"])
@click.argument("prefix", required=False)
@overrides
def keys(prefix: str | None, overrides: Sequence[str]) -> None:
    """List the keys of the config: type, default, meaning, choices.

    PREFIX is a key, a group of keys, or the last part of a key. Values of the config may be given to see what they
    change; parts of plugins are among the choices.
    """
    from moepp.config import compose
    from moepp.keys import describe_keys
    from moepp.training.settings import RunConfig

    print("\n".join(describe_keys(compose(RunConfig, overrides), prefix or "")))


@commands.command(examples=["data=sotu", "data=text data.path='books/*.txt'"])
@overrides
def prepare(overrides: Sequence[str]) -> None:
    """Tokenise a corpus and print the folder of token files."""
    from moepp.data.prepare import prepare
    from moepp.training.asked import asked_for
    from moepp.training.foreign import completed

    tokens = prepare(completed(asked_for(overrides)).data)
    print(f"{tokens.path}: {tokens.header}")


@commands.command(examples=["runs/train/<hash> --prompt 'The union' --temperature 0"])
@click.argument("run", type=DIRECTORY)
@click.option("--prompt", type=Unicode(), default="The state of the Union", help="Text to continue.")
@click.option("--tokens", type=Number(Count), default=64, help="How many tokens to add.")
@click.option("--temperature", type=Number(NotNegative), default=0.8, help="0 is greedy.")
@click.option("--seed", type=Number(Seed), default=0, help="Of the sampling.")
def generate(run: Path, prompt: str, tokens: int, temperature: float, seed: int) -> None:
    """Continue a prompt with a trained run.

    RUN is the directory of a finished run.
    """
    from moepp.training.generate import continue_text

    with working("reading"):
        text = continue_text(run, prompt, tokens, temperature, seed)
    print(text)


@commands.command(examples=["runs/train/<hash> --tasks paper", "runs/train/<hash> --tasks sciq,boolq:0 --limit 100"])
@click.argument("checkpoint", type=DIRECTORY)
@tasks(default="paper")
@tasks_dir
@limit
@click.option("--batch-tokens", type=Number(Count), default=4096, help="Padded tokens per batch.")
@wide
def evaluate(checkpoint: Path, tasks: str, tasks_dir: Path | None, limit: int | None, batch_tokens: int) -> None:
    """Score a trained run, its export or a released checkpoint on the paper's tasks or others.

    CHECKPOINT is a run directory, a *.ckpt file, or a folder: of `export`, of transformers, or in the released layout.
    """
    with working("loading lm-evaluation-harness"):
        from moepp.evaluation.commands import evaluate_checkpoint

    print(evaluate_checkpoint(checkpoint, tasks, tasks_dir, limit, batch_tokens))


@commands.command(examples=["runs/train/<hash>", "runs/train/<hash> --biases -2 0 2"])
@click.argument("run", type=DIRECTORY)
@click.option(
    "--biases", type=Several(Number(Annotated[float, Range(-100, 100)])), help="What to add; else nine from -4 to 4."
)
@click.option("--out", type=DIRECTORY, metavar="DIR", help="For table and figure; else the run's folder tables.")
@wide
def dial(run: Path, biases: list[float] | None, out: Path | None) -> None:
    """Measure a finished run's loss against its compute, by a bias on its zero-computation logits.

    RUN is the directory of a finished run.
    """
    with working("measuring the loss at each bias"):
        from moepp.routing.dial import BIASES, dial

        table = dial(run, biases or BIASES, out)
    print(table)


@commands.command(examples=["<folder>", "<folder> --offsets -2 0 2 data=text data.path=held_out.txt"])
@click.argument("folder", type=DIRECTORY)
@click.option(
    "--offsets", type=Several(Number(Annotated[float, Range(-100, 100)])), help="What to add; else nine from -4 to 4."
)
@click.option("--out", type=DIRECTORY, metavar="DIR", help="For table and figure; else the model's folder.")
@wide
@overrides
def route(folder: Path, offsets: list[float] | None, out: Path | None, overrides: Sequence[str]) -> None:
    """Measure a retrofitted model's loss against the FFN experts a token uses, as the offsets of new experts move.

    FOLDER holds the model, as `export` and save_pretrained write it. Values of the config say on what text.
    """
    from moepp.routing.offsets import OFFSETS, route_by_offsets

    print(route_by_offsets(folder, offsets or OFFSETS, overrides, out))


@commands.command(examples=["runs/train/<hash>", "runs/train/<hash> --format zeda --out model"])
@click.argument("run", type=DIRECTORY)
@click.option("--format", "kind", type=Word(["hf", "zeda", "longcat"]), default="hf", help="The layout of the folder.")
@click.option("--out", type=DIRECTORY, metavar="DIR", help="The folder; else export-<format> in the run's.")
def export(run: Path, kind: str, out: Path | None) -> None:
    """Write a finished run as a folder that plain transformers runs, with a model card.

    RUN is the directory of a finished run.
    """
    with working("writing the folder"):
        from moepp.training.export import export_run

        folder = export_run(run, kind, out)
    print(folder)


@commands.command(
    examples=[
        "runs/train/<hash>/checkpoints/step-00000500.ckpt one.ckpt",
        "one.ckpt folder --to parts",
        "runs/train/<hash> titan --to torchtitan",
        "titan back.ckpt --run runs/train/<hash>",
    ]
)
@click.argument("source", type=DIRECTORY)
@click.argument("target", type=DIRECTORY)
@click.option("--to", "form", type=Word(["file", "parts", "torchtitan"]), default="file", help="Its form.")
@click.option("--run", type=DIRECTORY, help="Of a torchtitan SOURCE: a run with the same model.")
def convert(source: Path, target: Path, form: str, run: Path | None) -> None:
    """Write a checkpoint in another form: one file, parts for many devices, or torchtitan's model, and back."""
    from moepp.pretrain.convert import convert

    convert(source, target, form, run)
    print(target)


@commands.command(examples=["runs/train/<hash> runs/train/<other>", "runs/tau-laptop:vanilla runs/tau-laptop:tau_0.50"])
@click.argument("a")
@click.argument("b")
@wide
def compare(a: str, b: str) -> None:
    """Set two runs, or two arms of a sweep, side by side.

    A and B are run directories, or SWEEP_DIRECTORY:ARM.
    """
    with working("reading"):
        from moepp.reports.side_by_side import read_side, side_by_side

        compared = side_by_side(read_side(a), read_side(b))
    print(compared)


@commands.command(examples=["runs/train/<hash>"])
@click.argument("run", type=DIRECTORY)
def rerun(run: Path) -> None:
    """Repeat a finished run from its record and compare the losses.

    RUN is the directory of a finished run.
    """
    from moepp.records import RunRecord
    from moepp.reports.repetition import compare_repetition, describe_repetition

    with working("loading torch and Lightning"):
        from moepp.training.rerun import rerun

    again = rerun(run)
    repetition = compare_repetition(RunRecord(run), again)
    print("\n".join([f"{run} repeated in {again.path}", *describe_repetition(repetition)]))
    if repetition.unexplained:
        raise RunError(f"the losses of {run} differ although nothing else does")


@commands.command(examples=["", "tau", "tau --scale smoke runs=runs/softmax", "runs/tau-laptop"])
@click.argument("sweep", required=False)
@click.option("--port", type=Number(Annotated[int, Range(1, 65535)]), default=5000, help="Where it is served.")
@scale
@overrides
def ui(sweep: str | None, port: int, scale: str, overrides: Sequence[str]) -> None:
    """Open the MLflow UI on the runs, on this machine only.

    SWEEP is a file of sweeps/, such as tau, or a folder of its records; without it the newest one opens.
    """
    from moepp.config import compose
    from moepp.sweeps.reading import read_sweep
    from moepp.training.settings import RunConfig

    with working("loading MLflow"):
        from moepp.tracking.mirror import as_recorded
        from moepp.tracking.ui import serve

    config = compose(RunConfig, overrides)
    if sweep is None:
        serve(config.tracking, config.runs, port, None)
        return
    records = Path(sweep)
    folder = records if (records / "sweep.json").is_file() else read_sweep(sweep).folder(scale, overrides)
    serve(as_recorded(config.tracking, folder), folder.parent, port, folder)


@commands.command(examples=["", "tracking.uri=http://tracker:5000"])
@overrides
def sync(overrides: Sequence[str]) -> None:
    """Bring MLflow up to the run records."""
    from moepp.config import compose
    from moepp.tracking.mirror import sync_all
    from moepp.training.settings import RunConfig

    config = compose(RunConfig, overrides)
    with working("sending"):
        sent = sync_all(config.runs, config.tracking)
    print(f"{sent} run records are in MLflow")


@commands.command(examples=["layer --scale laptop", "layer --ffn 8 16 --tokens 4096 --routing learned", "training"])
@click.argument("what", type=Word(["card", "layer", "training", "choices", "scoring", "parallel"]), metavar="WHAT")
@click.option("--scale", help="smoke, laptop, cpu, gpu or paper, as far as the benchmark has them.")
@wide
@minutes(help="Measure nothing that would not end in time, and say what.")
@click.option("--ffn", type=Several(Word([8, 16, 32, 64])), metavar="N...", help="FFN experts: 8, 16, 32 or 64.")
@click.option("--devices", type=Number(Count), help="Of `parallel`: a process each, on GPUs if any; else 4.")
@click.option(
    "--routing", "routings", type=Several(Word(["learned", "balanced"])), metavar="ROUTING...",
    help="learned, balanced or both.",
)  # fmt: skip
@click.option("--tokens", type=Several(Number(Count)), help="Of a call; else the scale's.")
@click.option("--repeats", type=Number(Count), help="Calls that are timed; else the scale's.")
@click.option(
    "--out",
    type=DIRECTORY,
    metavar="DIR",
    help="Folder of the results, where the same command goes on; else results/bench_<what>/latest.",
)
def bench(what: str, scale: str | None, minutes: float | None, out: Path | None, **given: Any) -> None:
    """Time the device, the expert layer beside its floor and its peers, training, or the scoring of tasks.

    WHAT is card, layer, training, choices (what a training step may do otherwise), scoring, or parallel (what experts
    on several devices send).
    """
    from moepp.benchmarks.commands import bench
    from moepp.statistics.tables import on_terminal

    out = out or Path(f"results/bench_{what}/latest")
    lines, missing = bench(what, scale, out, minutes, given)
    print("\n".join([*on_terminal(lines), "", f"report: {out / 'report.md'}"]))
    if missing:
        raise Interrupted(f"{missing} groups of measurements were left out for lack of time; call this again")


@commands.command(hidden=True)
@click.argument("config", type=DIRECTORY)
def trial(config: Path) -> None:
    """Train a frozen config in its own directory: what a sweep starts for each trial."""
    from moepp.sweeps.trial import run_trial

    run_trial(config)


@commands.command("fork-server", hidden=True)
def fork_server() -> None:
    """Fork trials as the sweep at the other end of standard input asks."""
    from moepp.sweeps.fork_server import serve_forks
    from moepp.sweeps.trial import run_trial

    if config := serve_forks():
        run_trial(config)


if __name__ == "__main__":
    sys.exit(main())
