"""Stage `runs`: the sweep `dropless`, vanilla MoE and MoE++ first, then its other arms: `python -m window.runs`.

Its length is fitted to the time by a probe that trains as many short runs side by side as the sweep will. A second call
keeps the length and goes on.
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moepp.errors import RunError, UsageError
from moepp.records import RunRecord, read_json, write_json
from moepp.sweeps.launchers import launch
from moepp.sweeps.launchers.call import SweepCall

SWEEP = "dropless"
FIRST = ("vanilla", "moepp")
TOKENS = ["data=tokens", "data.path=tokens/8192", "model.vocab_size=8192", "tracking=jsonl"]
PROBE_SEED = 1000  # and the following: of no run that is judged
PROBED_SHARE = 1 / 30  # of a whole run's steps
SPARE = 0.9  # of the time that the runs are fitted to
LEAST_SHARE = 1 / 3  # of a whole run: what does not fit then is for a second call
VALIDATIONS = 4  # of each run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", required=True)
    parser.add_argument("--minutes", type=float, required=True)
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    try:
        chosen = _choose(options.scale, deadline)
        words = [*TOKENS, "runs=runs", *_length(chosen["steps"])]
        for arms in (FIRST, ()):
            minutes = (deadline - time.monotonic()) / 60
            launch(SweepCall(SWEEP, options.scale, chosen["workers"], words, arms=arms, minutes=minutes), [])
    except (UsageError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _choose(scale: str, deadline: float) -> dict[str, Any]:
    """How many runs at a time, and of how many steps: kept from an earlier call, or measured now."""
    path = Path("runs", "chosen.json")
    if known := read_json(path):
        return known
    sweep = SweepCall(SWEEP, scale).load()
    whole = sweep.trials(scale, TOKENS)[0].config.trainer.steps
    runs, workers = len(FIRST) * len(sweep.chosen_seeds(scale)), _workers(scale)
    probed = _probe(scale, workers, max(4, round(whole * PROBED_SHARE)))
    left = SPARE * (deadline - time.monotonic()) / math.ceil(runs / workers)
    fitting = int((left - probed["seconds_beside_steps"]) / probed["seconds_of_a_step"])
    steps = min(whole, max(fitting, math.ceil(whole * LEAST_SHARE)))
    write_json(path, {"steps": steps, "of": whole, "workers": workers, **probed})
    return read_json(path)


def _workers(scale: str) -> int:
    """On a GPU half the cores': each run has one process that keeps a core busy, and the card is shared."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // 2) if scale == "gpu" else cores


def _probe(scale: str, workers: int, steps: int) -> dict[str, float]:
    """Seconds of a step, and of everything else in a run, where so many train side by side."""
    seeds = range(PROBE_SEED, PROBE_SEED + math.ceil(workers / len(FIRST)))
    words = [*TOKENS, "runs=probe", f"trainer.log_every={max(1, steps // 4)}", *_length(steps)]
    records = _records(launch(SweepCall(SWEEP, scale, workers, words, seeds, FIRST), []))
    step = statistics.fmean(record.final()["step_time_ms"] for record in records) / 1000
    whole = statistics.fmean(_seconds(record) for record in records)
    return {"seconds_of_a_step": round(step, 5), "seconds_beside_steps": round(max(0.0, whole - steps * step), 2)}


def _length(steps: int) -> list[str]:
    return [f"trainer.steps={steps}", f"trainer.val_every={math.ceil(steps / VALIDATIONS)}"]


def _records(directory: Path) -> Sequence[RunRecord]:
    return [RunRecord(path.parent) for path in directory.glob("*/done")]


def _seconds(record: RunRecord) -> float:
    return (record.path / "done").stat().st_mtime - (record.path / "attempt.json").stat().st_mtime


if __name__ == "__main__":
    sys.exit(main())
