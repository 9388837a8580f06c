"""What `python run.py sweep` prints and does: plan, run, status, work, retry."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from moepp.errors import UsageError
from moepp.records import RunRecord
from moepp.sweeps.allocations import threads
from moepp.sweeps.budgets import MatchedTrials, match_trials, require_match, table
from moepp.sweeps.hints import sweep_command
from moepp.sweeps.launchers.call import SweepCall
from moepp.sweeps.plan import edits, read_plan, refuse_another_sweep
from moepp.sweeps.probe import beyond_this_machine, step_seconds
from moepp.sweeps.spec import Sweep
from moepp.sweeps.status import STATES, SweepStatus, TrialStatus, read_status
from moepp.terminal import painted

LISTED = 20  # waiting trials by name
COLOURS = {"failed": "red", "damaged": "red", "running": "green"}


def plan(call: SweepCall, register: str | None = None) -> None:
    """Prints what `run` would train, what is held equal and how long it takes; trains nothing and tokenises nothing.
    Unless `register` is None the plan is registered, with the power that the records in that folder let expect (empty:
    the sweep file says it).
    """
    from moepp.sweeps.search import proposed, searched

    sweep = call.load()
    matched = match_trials(sweep, call.scale, call.overrides, call.seeds, call.workers)
    search, trials, allocations = sweep.search(call.scale), matched.trials, matched.allocations
    arms = dict.fromkeys(trial.of_arm for trial in trials)
    lengths = dict.fromkeys(f"{trial.length:g}" for trial in trials if trial.lengthened)
    n = search.n if search else 1
    steps = sorted({trial.config.trainer.steps for trial in trials})
    chosen = ", ".join(str(seed) for seed in dict.fromkeys(trial.seed for trial in trials))
    print(f"{sweep.name} at scale {call.scale}: {sweep.question}")
    counts = f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else steps[0]
    each = f"{n} proposals for each of " if search else ""
    lengthened = ", ".join(dict.fromkeys(trial.of_arm for trial in trials if trial.lengthened))
    longer = f", and {lengthened} to {', '.join(lengths)} times the tokens" if lengths else ""
    print(f"{n * len(trials)} trials of {counts} steps: {each}{len(arms)} arms{longer}, seeds {chosen}\n")
    print("\n".join(table({arm: matched.arms[arm] for arm in arms}, matched.seconds)))
    require_match(sweep.match, matched.arms, matched.seconds)
    print("\nnothing is declared equal" if sweep.match == "none" else f"\nequal as declared: {sweep.match}")
    directory = sweep.folder(call.scale, call.overrides)
    begun = read_plan(directory) or {"trials": []}
    refuse_another_sweep(directory, begun, sweep, searched(sweep, call.scale, call.seeds) if search else {})
    known = proposed(begun, sweep, call.scale, call.overrides, call.seeds) if search else trials
    if edited := edits(directory, known):
        changes = "; ".join(f"{arm} ({change})" for arm, change in edited.items())
        raise UsageError(
            f"{directory} was begun before these arms were edited, and `sweep run` will refuse them: {changes}; start"
            " afresh under another name or with runs=FOLDER, or remove that folder"
        )
    status = _status(directory)
    print(f"done: {status.count('done') if status else 0} trials; {len(allocations)} run at a time")
    print(f"time: {_time_left(call, sweep, matched, n * len(trials), status)}")
    if register is not None:
        from moepp.sweeps.registration import register as write_plan

        print("\n".join(write_plan(sweep, call.scale, trials, call.overrides, register)))


def _time_left(call: SweepCall, sweep: Sweep, matched: MatchedTrials, planned: int, status: SweepStatus | None) -> str:
    """Of `planned` trials, by what those that are finished took, or by a probe."""
    trials, shares = matched.trials, matched.allocations
    ended = status.count("done") + status.count("pruned") if status else 0
    source, seconds = "from finished trials", status.trial_seconds if status else None
    if seconds is None:
        if beyond_this_machine(trials, {arm: budget.flops_per_token for arm, budget in matched.arms.items()}):
            return "not known here: its steps are for a GPU, and none is visible; plan it where it will run"
        per_step = step_seconds(sweep.folder(call.scale, call.overrides), trials, threads(shares[0]))
        seconds = statistics.fmean(trial.config.trainer.steps * per_step[trial.arm] for trial in trials)
        source = "from a probe of each arm's steps, without start and validation"
    most = ", less what is pruned" if sweep.pruner_at(call.scale) else ""
    return f"about {_duration(seconds * max(0, planned - ended) / len(shares))}{most} ({source})"


def run(call: SweepCall, launcher: Sequence[str]) -> Path | None:
    """Trains everything that is not done and returns the folder of the records; None where nobody waited for that.

    `launcher` holds the words that say where.
    """
    from moepp.sweeps.launchers import launch

    directory = launch(call, launcher)
    if directory is not None:
        _finished(directory)
    return directory


def work(call: SweepCall) -> None:
    """One worker of any number: a trial at a time, on a free one of `workers` shares of this machine (0: one per GPU,
    or all cores where there is none).
    """
    from moepp.process import die_with_parent

    die_with_parent()
    from moepp.sweeps.runner import run_sweep

    _finished(run_sweep(call.load(), call.scale, call.workers, call.overrides, call.seeds, one_share=True))


def status(call: SweepCall) -> None:
    directory = call.load().folder(call.scale, call.overrides)
    print("\n".join(describe_status(directory.name, _begun(call, directory))))


def retry(call: SweepCall) -> None:
    """Forgets failures; what a failed trial has saved is kept, and it goes on from there."""
    directory = call.load().folder(call.scale, call.overrides)
    failed = [trial for trial in _begun(call, directory).trials if trial.state == "failed"]
    for trial in failed:
        RunRecord(trial.path).forgive()
    print(f"{len(failed)} failed trials will be tried again by the next `sweep run` or `sweep work`")


def pack(call: SweepCall) -> None:
    """Finished trials, without their weights, into an archive beside the registration."""
    from moepp.sweeps.parcel import pack as pack_records

    directory, archive = call.load().folder(call.scale, call.overrides), _archive(call)
    packed = pack_records(directory, archive)
    print(f"{packed} trials of {directory} are in {archive} ({archive.stat().st_size / 1000:,.0f} kB), without weights")


def unpack(call: SweepCall) -> None:
    """Back from that archive, for `run` to go on and for reports."""
    from moepp.sweeps.parcel import unpack as unpack_records

    directory, archive = call.load().folder(call.scale, call.overrides), _archive(call)
    new, packed = unpack_records(archive, directory)
    print(f"{new} of the {packed} trials in {archive} are new in {directory}; they have no weights")


def _archive(call: SweepCall) -> Path:
    from moepp.sweeps.registration import plan_path

    config = call.load().trials(call.scale, call.overrides, call.seeds)[0].config
    name, scale = config.tags["experiment"], config.tags["scale"]
    return plan_path(name, scale, call.overrides, config.tags.get("size", "")).with_name("runs.tar.xz")


def describe_status(title: str, status: SweepStatus) -> list[str]:
    """The counts, then every trial that is not done."""
    counted = [(status.count(state), state) for state in STATES]
    counts = ", ".join(f"{count} {state}" for count, state in counted if count or state not in ("pruned", "damaged"))
    counts += f", {status.unproposed} to be proposed" if status.unproposed else ""
    left = status.seconds_left
    lines = [f"{title}: {counts}" + ("" if left is None else f"; about {_duration(left)} left"), *_metrics(status)]
    for trial in status.trials:
        if trial.state in ("running", "failed", "damaged"):
            lines += _lines(trial)
    waiting = [trial for trial in status.trials if trial.state == "waiting"]
    for trial in waiting[:LISTED]:
        lines += _lines(trial)
    return [*lines, f"waiting  and {len(waiting) - LISTED} more"] if len(waiting) > LISTED else lines


def _metrics(status: SweepStatus) -> Iterable[str]:
    """How many trials stand behind each final metric; those that have most are only counted."""
    by_n: dict[int, list[str]] = defaultdict(list)
    for name, n in status.final_metrics().items():
        by_n[n].append(name)
    if by_n:
        most, *others = sorted(by_n, reverse=True)
        fewer = "".join(f"; n = {n}: {', '.join(sorted(by_n[n]))}" for n in others)
        yield f"final metrics: n = {most}: {'all' if not others else len(by_n[most])}{fewer}"


def _lines(trial: TrialStatus) -> Iterable[str]:
    reached = f", step {trial.step} of {trial.steps}" if trial.step or trial.state == "running" else ""
    left = "" if trial.seconds_left is None else f", {_duration(trial.seconds_left)} left"
    note = f" ({trial.note})" if trial.state == "running" else f": {trial.note}" if trial.note else ""
    state = painted(f"{trial.state:<8}", fg=COLOURS.get(trial.state))
    yield f"{state} {trial.label}{reached}{left}{note}"
    for line in trial.log:
        yield f"         | {line}"


def _begun(call: SweepCall, directory: Path) -> SweepStatus:
    found = _status(directory)
    if found is None:
        begins = sweep_command("run", call.load(), call.scale, call.overrides)
        raise UsageError(f"{directory} holds no sweep; `{begins}` begins one")
    return found


def _status(directory: Path) -> SweepStatus | None:
    known = read_plan(directory)
    return read_status(directory, known) if known else None


def _finished(directory: Path) -> None:
    print(f"all trials are done: {directory}")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
