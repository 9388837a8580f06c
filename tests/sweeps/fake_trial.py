"""Stands in for the trial command: logs steps into the record of its config, and resumes after the last one.

An arm named broken fails until a file `fixed` lies beside the runs folder, an arm named flaky fails the first time.
"""

import os
import sys
import time
from pathlib import Path

from moepp.process import die_with_parent
from moepp.records import RunRecord
from moepp.sweeps.leases import end_without_lease

die_with_parent()
end_without_lease()
record = RunRecord(Path(sys.argv[1]).parent)
config = record.read("config.yaml")
with record.lock():
    with open(record.path / "attempts", "a") as attempts:
        attempts.write(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')} {os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
    arm = config["tags"].get("search", config["tags"]["arm"])
    if arm == "broken" and not (Path(config["runs"]).parent / "fixed").exists():
        sys.exit("the router is cold\nexpert 3 is on fire")
    if arm == "flaky" and len((record.path / "attempts").read_text().splitlines()) == 1:
        record.fail("a cosmic ray")
        sys.exit(1)
    finished = record.metrics()[-1]["step"] if record.metrics() else 0
    record.rewind(finished)
    for step in range(finished + 1, config["trainer"]["steps"] + 1):
        time.sleep(float(os.environ.get("SECONDS_PER_STEP", "0")))
        record.log(step, {"train/loss": config["optim"]["lr"] / step, "perf/tokens_per_s": 100.0})
    final = {"final/val_loss": 0.5, "final/train_seconds": 7.0}
    # As a model does, this remembers every step that it has made.
    final["final/train_loss"] = sum(line["train/loss"] for line in record.metrics())
    record.log(config["trainer"]["steps"], final)
    record.finish()
    with open(record.path / "ends", "a") as ends:
        ends.write(f"{os.getpid()}\n")
