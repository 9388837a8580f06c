"""Writes sweep directories as the runner leaves them, with numbers the tests choose."""

import json
from pathlib import Path

from moepp.records import RunRecord, write_json, write_text
from moepp.reports.comparison import Comparison, compare
from moepp.reports.experiment import Context, Experiment
from moepp.reports.provenance import provenance
from moepp.reports.report import write_report
from moepp.reports.rerun import rerun_command
from moepp.reports.results import load_sweep_results

START_MS = 1_700_000_000_000
STEPS, TOKENS = 100, 102_400


Losses = dict[str, dict[int, float]]  # arm -> seed -> final validation loss
Times = dict[str, tuple[float, float]]  # arm -> (median ms, FFN width), written for both routings


def write_sweep(directory: Path, losses: Losses, times: Times | None = None) -> Path:
    trials = []
    for arm, by_seed in losses.items():
        for seed, loss in by_seed.items():
            trials.append({"arm": arm, "seed": seed, "path": f"trials/{arm}-{seed}"})
            write_run(directory / f"trials/{arm}-{seed}", loss, tokens_per_s=1000 + 10 * seed)
    about = {"name": "zero_computation_experts", "question": "Which?", "scale": "laptop", "match": "tokens"}
    write_json(directory / "sweep.json", {**about, "baseline": "vanilla", "trials": trials})
    if times:
        write_times(directory, times)
    return directory


def write_run(path: Path, loss: float, **final: float) -> RunRecord:
    record = RunRecord(path)
    lines = [{"step": step, "val/loss": loss + (STEPS - step) / 50} for step in (25, 50, 75, STEPS)]
    values = {"val_loss": loss, "val_bits_per_byte": loss / 2, "ffn_share": 0.75, "ffn_per_token": 1.5}
    lines.append({"step": STEPS, **{f"final/{name}": value for name, value in (values | final).items()}})
    text = "".join(json.dumps({"time": START_MS + 1000 * line["step"], **line}) + "\n" for line in lines)
    write_text(path / "metrics.jsonl", text)
    budget = {"total_params": 1_000_000, "active_params": 500_000, "flops_per_token": 1e6, "tokens": TOKENS}
    write_json(path / "budget.json", budget)
    write_text(path / "config.yaml", "model: {experts: {ffn: 8, zero: 1, copy: 1, constant: 2}}\n")
    provenance = {"git": {"sha": "abc", "dirty": False}, "hardware": {"cpu": "two cores"}, "host": "h"}
    write_json(path / "provenance.json", provenance)
    record.finish()
    return record


def write_times(directory: Path, times: Times) -> None:
    rows = [
        {"arm": arm, "routing": routing, "median_ms": median, "min_ms": 0.9 * median, "ffn_width": share}
        for arm, (median, share) in times.items()
        for routing in ("learned", "balanced")
    ]
    training = [{"arm": arm, "tokens": 512, "median_ms": 3 * median} for arm, (median, _) in times.items()]
    about = {"hardware": "two cores", "threads": 2, "repeats": 30}
    write_json(directory / "timing.json", {**about, "expert_forward": rows, "training": training})


def written(experiment: Experiment, directory: Path, folder: Path) -> list[Path]:
    """The report of a sweep's experiment on these records."""
    context = Context("laptop", {experiment.runs[0].sweep: directory})
    made = provenance(rerun_command(experiment, context), context)
    return write_report(experiment, experiment.measure(context), folder, made)


def compared(experiment: Experiment, directory: Path) -> Comparison:
    return compare(experiment.measure.design, load_sweep_results(directory))
