"""Expert forward and training times of a sweep's arms, interleaved in one process: speed-ups are ratios of these, never
of separately timed trials.
"""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moepp.errors import RunError
from moepp.records import RunRecord, read_json, write_json
from moepp.terminal import working
from moepp.training.initial import FINAL_WEIGHTS

TRAINING_ROUNDS = 3  # for one of expert forwards: the differences to be seen are a few percent


def time_arms(directory: Path, repeats: int = 15) -> dict[str, Any]:
    """Times every arm of a finished sweep with the weights of its first finished seed; writes and returns
    timing.json.

    Measured once: a file that already covers these runs is returned as it is, and so is any where the weights of an arm
    are elsewhere.
    """
    runs = _first_runs(directory)
    path = directory / "timing.json"
    known = read_json(path)
    if known and known["runs"] == {arm: run.name for arm, run in runs.items()}:
        return known
    if without := [arm for arm, run in runs.items() if not _has_weights(run)]:
        print(f"not timed: no weights of arm {', '.join(without)} are here, as of records that `sweep pack` made")
        return known or {}

    with working("timing the arms together"):
        times = _times(runs, repeats)
    write_json(path, times)
    return times


def _times(runs: dict[str, Path], repeats: int) -> dict[str, Any]:
    import torch

    from moepp.data.prepare import prepare
    from moepp.training.provenance import collect
    from moepp.training.throughput import (
        autocast_of,
        expert_forward_times,
        training_batch,
        training_times,
        validation_ids,
    )
    from moepp.training.weights import load_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    loaded = {arm: load_model(run) for arm, run in runs.items()}
    config = next(iter(loaded.values()))[1]
    tokens, precision = prepare(config.data, progress=False), autocast_of(config.trainer.precision, device)
    ids = validation_ids(tokens, config.data.seq_len).to(device)
    batches = {arm: training_batch(tokens, of_arm).to(device) for arm, (_, of_arm) in loaded.items()}
    models = {arm: model.to(device) for arm, (model, _) in loaded.items()}
    expert_forward = expert_forward_times(models, ids, precision, repeats)
    hardware = collect({})["hardware"]
    return {
        "runs": {arm: run.name for arm, run in runs.items()},
        "hardware": hardware["gpus"][0] if hardware["gpus"] else hardware["cpu"],
        "threads": torch.get_num_threads(),
        "tokens": ids.numel(),
        "dtype": config.trainer.precision,
        "repeats": repeats,
        "date": datetime.now(UTC).date().isoformat(),
        "expert_forward": expert_forward,
        "training_repeats": TRAINING_ROUNDS * repeats,
        "training": training_times(models, batches, precision, TRAINING_ROUNDS * repeats),
    }


def _first_runs(directory: Path) -> dict[str, Path]:
    """Of each arm the first finished run, of those that have their weights where there is one."""
    sweep = read_json(directory / "sweep.json")
    if sweep is None:
        raise RunError(f"{directory} holds no sweep")
    runs: dict[str, Path] = {}
    for trial in sweep["trials"]:
        run = directory / trial["path"]
        if RunRecord(run).status != "done" or "length" in trial:
            continue
        if not _has_weights(runs.setdefault(trial["arm"], run)) and _has_weights(run):
            runs[trial["arm"]] = run
    return runs


def _has_weights(run: Path) -> bool:
    return (RunRecord(run).checkpoints / FINAL_WEIGHTS).is_file()
