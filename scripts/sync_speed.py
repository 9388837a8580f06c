"""Times `run.py sync`, `report` and `sweep status` on a sweep of many finished trials: `python scripts/sync_speed.py`.

The records are copies of one run that is trained first, so each holds real histories.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from moepp.records import write_json, write_text

SWEEP = """\
name: many
question: How long does it take?
base: [data=sotu, model=moepp, size=tiny]
scales: {laptop: {}}
baseline: arm0
arms: {arm0: [], arm1: [model.top_k=1]}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=4, help="trials of each arm")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        _make(Path(folder), options.trials, options.seeds)
        sweep = str(Path(folder) / "many.yaml")
        runs = f"runs={folder}/runs"
        for what, command in {
            "sync, nothing in MLflow yet": ["sync", runs],
            "sync, everything in MLflow": ["sync", runs],
            "sweep status": ["sweep", "status", sweep, runs],
            "report, nothing measured yet": ["report", sweep, runs],
            "report, once more": ["report", sweep, runs],
            "run.py --help (start of Python)": ["--help"],
        }.items():
            print(f"{what:<32} {_seconds(command):8.2f} s", flush=True)


def _make(folder: Path, trials: int, seeds: int) -> None:
    shape = ["size=tiny", "trainer.steps=360", "trainer.progress=false", "tracking=jsonl", f"runs={folder}/one"]
    _seconds(["train", *shape])
    (source,) = (folder / "one" / "train").iterdir()
    config = (source / "config.yaml").read_text().replace("backend: jsonl", "backend: mlflow")
    directory = folder / "runs" / "many-laptop"
    planned = [{"arm": f"arm{i // seeds}", "seed": i % seeds, "path": f"{i:012x}", "steps": 360} for i in range(trials)]
    for trial in planned:
        path = directory / trial["path"]
        shutil.copytree(source, path, ignore=shutil.ignore_patterns("checkpoints", "mlflow.json"))
        tags = f"tags:\n  arm: {trial['arm']}\n  baseline: arm0\n  sweep: many-laptop"
        write_text(
            path / "config.yaml", config.replace("seed: 0\n", f"seed: {trial['seed']}\n", 1).replace("tags:", tags, 1)
        )
    about = {"name": "many", "question": "How long?", "paper": "", "baseline": "arm0", "match": "tokens"}
    write_json(directory / "sweep.json", {**about, "objective": "final/val_loss", "scale": "laptop", "trials": planned})
    write_text(folder / "many.yaml", SWEEP)


def _seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "run.py", *command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
