"""Stands in for the trial command: logs steps into the record of its config, and resumes after the last one.

An arm named broken fails until a file `fixed` lies beside the runs folder.
"""

import os
import sys
import time
from pathlib import Path

from moepp.records import RunRecord
from moepp.sweeps.process import die_with_parent

die_with_parent()
record = RunRecord(Path(sys.argv[1]).parent)
config = record.read("config.yaml")
with record.lock():
    with open(record.path / "attempts", "a") as attempts:
        attempts.write(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')}\n")
    if config["tags"]["arm"] == "broken" and not (Path(config["runs"]).parent / "fixed").exists():
        sys.exit("expert 3 is on fire")
    finished = record.metrics()[-1]["step"] if record.metrics() else 0
    for step in range(finished + 1, config["trainer"]["steps"] + 1):
        time.sleep(float(os.environ.get("SECONDS_PER_STEP", "0")))
        record.log(step, {"train/loss": 1.0 / step, "perf/tokens_per_s": 100.0})
    record.log(config["trainer"]["steps"], {"final/val_loss": 0.5})
    record.finish()
