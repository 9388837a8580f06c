"""One page about a window: how each stage ended and what it found, read from the files that it has written."""

import csv
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moepp.records import RunRecord, UnreadableRecord, read_json

REPORT_LINES = 60  # of a benchmark's report
FAILURES = 40  # tests listed
ENDS = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
# Of one process "tests/a.py::b PASSED [ 5%]", of several "tests/a.py::b" and later "[gw0] [ 5%] PASSED tests/a.py::b".
TEST = re.compile(rf"(?:\[gw\d+\] \[ *\d+%\] ({ENDS}) )?(tests/\S+::\S.*?)(?: ({ENDS})\b.*)?")
REASON = re.compile(r"(?:FAILED|ERROR) (tests/\S+::.*?)(?: - (.*))?")


def summary(work: Path, state: Mapping[str, Any], left_out: Sequence[str] = ()) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in state["machine"].items() if value)
    lines = [
        "# What a window on a GPU found",
        "",
        f"{machine}.",
        "",
        "| stage | outcome | seconds | limit |",
        "|---|---|---:|---:|",
    ]
    for name, found in state["stages"].items():
        lines.append(f"| {name} | {found['outcome']} | {found.get('seconds', '')} | {found.get('limit', '')} |")
    for name, found in state["stages"].items():
        lines += ["", f"## {name}", ""]
        lines += [f"{found['outcome']}: `{found['why']}`", ""] if found.get("why") else []
        try:
            lines += _found(work, name)
        except Exception as error:  # whatever a stage has left half done, the others' results shall come back
            lines.append(f"Its files cannot be read: {type(error).__name__}: {error}")
    if left_out:
        lines += ["", f"Left out of window.tar.gz, for its size: {', '.join(left_out)}."]
    return "\n".join(lines) + "\n"


def _found(work: Path, name: str) -> list[str]:
    if name == "runs":
        return [*_chosen(work), *runs_table(work)]
    if (report := work / name / "report.md").exists():
        return [line for line in report.read_text().splitlines() if not line.startswith("#")][:REPORT_LINES]
    log = work / f"{name}.txt"
    return tests(log.read_text(errors="replace")) if name in ("empty_experts", "tests") and log.exists() else []


def ended_tests(log: str) -> dict[str, str]:
    """How each test of a verbose pytest log ended, at last, where several calls have written it."""
    ended = {}
    for line in map(str.strip, log.splitlines()):
        if match := REASON.fullmatch(line):
            ended[match[1]] = "failed"
        elif (match := TEST.fullmatch(line)) and (outcome := match[1] or match[3]):
            ended[match[2]] = outcome.lower()
    return ended


def tests(log: str) -> list[str]:
    """Counts of a verbose pytest log, what failed and why, and what began and never ended. The log may be cut off."""
    lines = [line.strip() for line in log.splitlines()]
    ended, begun = ended_tests(log), [match[2] for line in lines if (match := TEST.fullmatch(line))]
    reasons = {match[1]: match[2] or "" for line in lines if (match := REASON.fullmatch(line))}
    counts = {outcome: list(ended.values()).count(outcome) for outcome in dict.fromkeys(ended.values())}
    failed = [test for test, outcome in ended.items() if outcome in ("failed", "error")]
    told = [", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "no test ended"]
    told += [f"- {test}: {reasons.get(test, '')[:300]}" for test in failed[:FAILURES]]
    return told + [f"- {test}: never ended" for test in dict.fromkeys(begun) if test not in ended]


def _chosen(work: Path) -> Iterator[str]:
    if chosen := read_json(work / "runs" / "chosen.json"):
        yield from (", ".join(f"{key} {value}" for key, value in chosen.items()) + ".", "")


def runs_table(work: Path) -> Iterator[str]:
    """Validation losses of the finished runs by arm, and their paired differences to the baseline's."""
    for path in sorted(work.glob("runs/*/sweep.json")):
        plan = read_json(path)
        losses: dict[str, dict[int, float]] = {}
        for trial in plan["trials"]:
            if (loss := _loss(path.parent / trial["path"])) is not None:
                losses.setdefault(trial["arm"], {})[trial["seed"]] = loss
        baseline = losses.get(plan["baseline"], {})
        yield from (
            f"| {path.parent.name} | seeds | validation loss | minus {plan['baseline']} |",
            "|---|---:|---:|---:|",
        )
        for arm, by_seed in losses.items():
            paired = [by_seed[seed] - baseline[seed] for seed in by_seed.keys() & baseline.keys()]
            difference = _spread(paired, "+.4f") if arm != plan["baseline"] else "–"
            yield f"| {arm} | {len(by_seed)} | {_spread(list(by_seed.values()), '.4f')} | {difference} |"
        yield from ("", "± is the standard deviation over seeds.")


def _loss(run: Path) -> float | None:
    try:
        return RunRecord(run).final().get("val_loss") if (run / "done").exists() else None
    except UnreadableRecord:
        return None


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{deviation}"


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
