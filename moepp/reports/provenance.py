"""Where the numbers of a report come from: the records of its runs, or, without any, the machine that measured now.

No clock where there are runs: the same records give the same bytes.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from moepp.reports.experiment import Context
from moepp.reports.results import Run, SweepResults
from moepp.statistics.wording import several

SAME_FOR_ALL = ("git", "versions", "hardware", "data")  # that all runs of one report should share


def provenance(command: str, context: Context) -> dict[str, Any]:
    """A section on which runs disagree is a list of its values, each with its runs."""
    made = {"command": command, "scale": context.scale}
    if not context.directories:
        from moepp.training.provenance import collect

        now = collect({})
        return made | {key: now[key] for key in ("started", "git", "versions", "hardware")}
    results = [context.results(sweep) for sweep in context.directories]
    runs = [run for found in results for run in _runs(found)]
    return {
        **made,
        "sweeps": {found.name: found.baseline for found in results},
        "first_run_began": _utc(min(run.first_ms for run in runs)),
        "last_run_ended": _utc(max(run.last_ms for run in runs)),
        **{section: _agreed(runs, section) for section in SAME_FOR_ALL},
        "runs": [{"arm": run.arm, "seed": run.seed, "record": run.path.name} for run in runs],
        "missing": [f"{arm}, seed {seed}: {why}" for r in results for (arm, seed), why in r.missing.items()],
    }


def disagreements(results: SweepResults) -> list[str]:
    """What keeps the runs of a sweep from being alike, in sentences."""
    runs = _runs(results)
    differing = [section for section in SAME_FOR_ALL if isinstance(_agreed(runs, section), list)]
    said = [f"The runs differ in {', '.join(differing)}: see provenance.json."] if differing else []
    dirty = sum(bool(run.provenance.get("git", {}).get("dirty")) for run in runs)
    were = "was" if dirty == 1 else "were"
    return [*said, f"{dirty} of {several(len(runs), 'run')} {were} made with uncommitted changes."] if dirty else said


def _runs(results: SweepResults) -> list[Run]:
    return [by_seed[seed] for by_seed in results.runs.values() for seed in sorted(by_seed)]


def _agreed(runs: Sequence[Run], section: str) -> Any:
    values: dict[str, list[str]] = {}
    for run in runs:
        key = json.dumps(run.provenance.get(section), sort_keys=True)
        values.setdefault(key, []).append(f"{run.arm}, seed {run.seed}")
    if len(values) == 1:
        return json.loads(next(iter(values)))
    return [{"value": json.loads(value), "runs": names} for value, names in values.items()]


def _utc(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds // 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
