"""What a training step of each arm costs, measured before anything runs: for estimates, and for arms that are to be
given equal time.

A probe runs whole steps (forward, backward, clipping, AdamW) on random tokens, with every token routed as a balanced
layer would (Table 1): at random weights the router does not know tau yet, and a step would take another time than
later. Arms take turns, the median counts. What it cannot know: the share that training reaches, the time of logging,
validation and checkpoints, other work on the machine, and other machines.
"""

import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moepp.config import identity
from moepp.errors import UsageError
from moepp.records import read_json, write_json
from moepp.sweeps.leases import exclusive
from moepp.terminal import working

if TYPE_CHECKING:
    from moepp.sweeps.spec import Trial
    from moepp.training.settings import RunConfig

SECONDS = 1.0  # of measurement for each arm, about
WARMUP, STEPS = 2, 10  # steps; at least three are measured
MOST_FLOPS = 2e12  # of a step that a CPU is asked for: half a minute, several times for each model
SHAPES = 4  # of models that an estimate probes, from all over the sweep; the rest are taken for their mean


def step_seconds(directory: Path, trials: Sequence["Trial"], threads: int, most: int = SHAPES) -> dict[str, float]:
    """Seconds of one optimizer step by arm, on `threads` CPU threads or the first GPU.

    Measured once and kept in probe.json of the sweep's directory, so that every later call and every worker has the
    same figures. Of more than `most` different models the others get the mean.
    """
    keys = {trial.arm: _shape(trial.config) for trial in trials}
    configs = {keys[trial.arm]: trial.config for trial in trials}
    chosen = dict(list(configs.items())[:: math.ceil(len(configs) / most)])
    with exclusive(directory / "probing"):
        known = read_json(directory / "probe.json") or {"seconds": {}}
        missing = {key: config for key, config in chosen.items() if key not in known["seconds"]}
        if missing:
            with working("timing a training step of each arm"):
                known = {**known, **_measure(missing, threads, known["seconds"])}
            write_json(directory / "probe.json", known)
    seconds = known["seconds"]
    mean = statistics.fmean(seconds[key] for key in chosen)
    return {arm: seconds.get(key, mean) for arm, key in keys.items()}


def beyond_this_machine(trials: Sequence["Trial"], flops_per_token: Mapping[str, float]) -> bool:
    """Whether a step of one of them is more than a CPU should be asked for, and no GPU is here. `flops_per_token`: of
    a forward pass, by arm.
    """

    def is_heavy(trial: "Trial") -> bool:
        data = trial.config.data
        return 3 * flops_per_token[trial.of_arm] * data.batch_size * data.seq_len > MOST_FLOPS

    heavy = [trial.config.trainer.accelerator for trial in trials if is_heavy(trial)]
    if not heavy:
        return False
    import torch

    return "cpu" in heavy or not torch.cuda.is_available()


def give_equal_seconds(trials: Sequence["Trial"], baseline: str, seconds: dict[str, float]) -> None:
    """Sets the steps of every arm to what fits into the baseline's training time.

    Raises UsageError where an arm sets its own steps.
    """
    steps = {trial.arm: trial.config.trainer.steps for trial in trials}
    if own := [arm for arm in steps if steps[arm] != steps[baseline]]:
        raise UsageError(f"match: wallclock sets the steps of every arm from the baseline's; arm {own[0]} sets its own")
    for trial in trials:
        trial.config.trainer.steps = max(1, round(steps[baseline] * seconds[baseline] / seconds[trial.arm]))


def _shape(config: "RunConfig") -> str:
    """Of all configs whose steps cost the same."""
    data, trainer = config.data, config.trainer
    model = identity(config.model, ("backend", "balance.beta", "init_std"))
    return f"{model} {data.batch_size}x{data.seq_len}x{trainer.accumulate} {trainer.precision}"


def _measure(configs: dict[str, "RunConfig"], threads: int, known: dict[str, float]) -> dict[str, Any]:
    import torch

    from moepp.training.provenance import collect

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        steps = {key: _step(config) for key, config in configs.items()}
        times: dict[str, list[float]] = {key: [] for key in configs}
        for turn in range(WARMUP + STEPS):
            for key, step in steps.items():
                if sum(times[key]) < SECONDS or len(times[key]) < 3:
                    started = time.perf_counter()
                    step()
                    if turn >= WARMUP:
                        times[key].append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    hardware = collect({})["hardware"]
    return {
        "hardware": hardware["gpus"][0] if hardware["gpus"] else hardware["cpu"],
        "threads": threads,
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": known | {key: statistics.median(found) for key, found in times.items()},
        "spread": {key: (max(found) - min(found)) / statistics.median(found) for key, found in times.items()},
    }


def _step(config: "RunConfig") -> Callable[[], None]:
    """One optimizer step of the config, as often as it is called."""
    import torch

    from moepp.training.module import LanguageModel
    from moepp.training.optim import build_optimizer
    from moepp.training.throughput import autocast_of

    gpu = config.trainer.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    module = LanguageModel.of_run(config, end_of_text=0).to(device)
    optimizer = build_optimizer(module, config.optim)
    shape = (config.data.batch_size // config.trainer.accumulate, config.data.seq_len + 1)
    # A model of transformers says its vocabulary once its run begins: its embedding knows already.
    tables = [part.num_embeddings for part in module.modules() if isinstance(part, torch.nn.Embedding)]
    tokens = torch.randint(min([config.model.vocab_size, *tables]), shape, device=device)
    for layer in module.model.moe_layers() if hasattr(module.model, "moe_layers") else ():
        _balance(layer, tokens[:, 1:].numel(), device)

    def step() -> None:
        for _ in range(config.trainer.accumulate):
            with autocast_of(config.trainer.precision, device)(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Lightning misses a trainer to log to
                loss = module.training_step(tokens)
            loss.backward()
        if config.optim.grad_clip:
            torch.nn.utils.clip_grad_norm_(module.parameters(), config.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        if gpu:
            torch.cuda.synchronize()

    return step


def _balance(layer: Any, tokens: int, device: Any) -> None:
    """Lets the layer route as usual, at the usual cost, and then send every token where a balanced one would."""
    import torch

    from moepp.training.throughput import balanced_routing

    if layer.config.selection != "top_k":
        return  # as many experts as the scores say; nothing fixed to force
    forced = balanced_routing(layer.config, tokens, torch.Generator().manual_seed(0), device)
    learned = layer.route
    layer.route = lambda logits_TN: replace(learned(logits_TN), expert_TK=forced.expert_TK)
