"""`run.py bench`: which benchmark, at which scale, and what the command line changes of it."""

from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from moepp.errors import UsageError
from moepp.terminal import working

FLAGS = {"routings": "routing"}  # fields that are called otherwise on the command line


def bench(
    what: str, scale: str | None, out: Path, minutes: float | None, given: dict[str, Any]
) -> tuple[list[str], int]:
    """The lines of the report, and how many groups of measurements were left out for lack of time.

    `given` are fields of the benchmark, None where the scale's own value holds.
    """
    benchmark = at_scale(what, scale, {name: value for name, value in given.items() if value is not None})
    if what != "parallel":
        from moepp.benchmarks.folder import run_benchmark

        return run_benchmark(benchmark, out, minutes)
    if minutes is not None:
        raise UsageError("bench parallel takes no --minutes")
    from moepp.benchmarks.parallel import run_parallel, traffic_table

    return list(traffic_table(run_parallel(benchmark, out))), 0


def at_scale(what: str, scale: str | None, given: dict[str, Any]) -> Any:
    """Raises UsageError for a scale or a flag that the benchmark does not know."""
    with working("loading torch"):  # and nothing that another benchmark needs: Lightning takes seconds
        kind = getattr(import_module(f"moepp.benchmarks.{what}"), f"{what.title()}Benchmark")
    if scale is not None and scale not in kind.SCALES:
        known = f"; choose from {', '.join(kind.SCALES)}" if kind.SCALES else ""
        raise UsageError(f"bench {what} has no scale {scale}{known}")
    chosen = scale or next(iter(kind.SCALES), None)
    given = {name: _value(what, kind, name, value) for name, value in given.items()}
    return kind(**(kind.SCALES.get(chosen, {}) | given))


def _value(what: str, kind: type, name: str, value: Any) -> Any:
    """The field's value: the only one of those given where it takes one."""
    known, flag = {field.name: field.type for field in fields(kind)}, FLAGS.get(name, name)
    if name not in known:
        raise UsageError(f"bench {what} takes no --{flag}")
    if known[name] is not int or not isinstance(value, list):
        return value
    if len(value) > 1:
        raise UsageError(f"bench {what} takes one number after --{flag}")
    return value[0]
