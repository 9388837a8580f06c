"""What a run ends with: the last validation, `final/*` metrics, tables, weights, and the `done` marker."""

import statistics
from typing import TypeVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from moepp.data.batches import TokenDataModule
from moepp.models.decoder import Decoder
from moepp.records import RunRecord
from moepp.terminal import working
from moepp.training.averaging import LateAverage
from moepp.training.callbacks import ResumeCheckpoint
from moepp.training.initial import FINAL_WEIGHTS
from moepp.training.module import LanguageModel
from moepp.training.settings import RunConfig, TrainerConfig
from moepp.training.states import remove_state, save_whole, states
from moepp.training.throughput import autocast_of, expert_forward_times, validation_ids
from moepp.training.totals import TrainingTotals
from moepp.training.val_windows import write_windows

Own = TypeVar("Own", bound=Callback)
TIMED, WARMUP = 7, 2  # passes; a sweep's report times all arms again, in turn, and that is what it compares


def finish(
    record: RunRecord, config: RunConfig, trainer: pl.Trainer, module: LanguageModel, data: TokenDataModule
) -> None:
    """Measures and saves what a run ends with, the marker last. All ranks call it."""
    _validate(trainer, module, data)
    quality = {f"val_{name}": value for name, value in module.validation_metrics().items()}
    routing = {name: float(value) for name, value in module.val_routing.compute().items()}
    if trainer.is_global_zero:
        module.val_routing.write_table(record.path / "tables" / "expert_load.csv")
    write_windows(record, trainer, module, data)
    routing["router_entropy"] = routing.pop("entropy")
    final = quality | routing | _speed(record.metrics()) | _own(trainer, TrainingTotals).metrics()
    final["train_seconds"] = _own(trainer, ResumeCheckpoint).seconds
    if trainer.global_step < config.trainer.steps:
        final["stopped_at_step"] = trainer.global_step  # by a callback, early
    if config.cloze.points and "step_time_ms" in final:
        final["cloze_share"] = _cloze_seconds(record.metrics()) / (trainer.global_step * final["step_time_ms"] / 1000)
    final["active_params"] = module.model.active_parameters(routing["ffn_per_token"])
    final["flops_per_token"] = sum(module.model.forward_flops(config.data.seq_len, routing["ffn_per_token"]).values())
    timed = config.trainer.expert_timing and isinstance(module.model, Decoder)
    if timed and config.strategy.name in ("single", "ddp"):  # others shard what is timed
        module.to(trainer.strategy.root_device)  # from the CPU, where Lightning leaves it
        with working("timing the experts"):
            final |= _expert_times(module, config.trainer, data)
    save_whole(trainer, record, FINAL_WEIGHTS, weights_only=True)
    if config.trainer.average_checkpoints and _own(trainer, LateAverage).is_whole(trainer.global_step):
        final |= _averaged(trainer, module, data)
    _log(trainer, {f"final/{name}": value for name, value in final.items()})
    if trainer.is_global_zero:
        record.finish()
        for state in states(record.checkpoints, but=config.trainer.keep_at):
            remove_state(state)


def _validate(trainer: pl.Trainer, module: LanguageModel, data: TokenDataModule) -> None:
    """On as much held-out text as the last validation takes, unless that has just been done."""
    asked = data.config.final_val_sequences
    if asked is not None:
        data.val_sequences = asked
    if module.validated_step != trainer.global_step or data.val_sequences != data.config.val_sequences:
        trainer.validate(module, data, verbose=False)


def _speed(lines: list[dict[str, float]]) -> dict[str, float]:
    """Medians over the logged intervals; the first holds the warm-up and is left out where there are others."""
    lines = [line for line in lines if "perf/tokens_per_s" in line]
    steady = lines[1:] or lines
    names = ("tokens_per_s", "step_time_ms", "tflops", "mfu")
    found = {name: [line[f"perf/{name}"] for line in steady if f"perf/{name}" in line] for name in names}
    speed = {name: statistics.median(values) for name, values in found.items() if values}
    if lines:
        speed["peak_mem_gib"] = max(line["perf/peak_mem_gib"] for line in lines)
    return speed


def _log(trainer: pl.Trainer, metrics: dict[str, float]) -> None:
    """To all loggers, which Lightning has closed by now."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, trainer.global_step)
        logger.save()
        logger.finalize("success")


def _own(trainer: pl.Trainer, kind: type[Own]) -> Own:
    return next(callback for callback in trainer.callbacks if isinstance(callback, kind))


def _cloze_seconds(lines: list[dict[str, float]]) -> float:
    return sum(line.get("perf/cloze_seconds", 0.0) for line in lines)


def _expert_times(module: LanguageModel, trainer: TrainerConfig, data: TokenDataModule) -> dict[str, float]:
    ids = validation_ids(data.files, data.config.seq_len).to(module.device)
    precision = autocast_of(trainer.precision, module.device)
    rows = expert_forward_times({"run": module.model}, ids, precision, TIMED, WARMUP)
    by_routing = {row["routing"]: row["median_ms"] for row in rows}
    return {"expert_forward_ms": by_routing["learned"], "expert_forward_ms_balanced": by_routing["balanced"]}


def _averaged(trainer: pl.Trainer, module: LanguageModel, data: TokenDataModule) -> dict[str, float]:
    """What the validation says of the mean of the late weights."""
    with _own(trainer, LateAverage).in_place(module):
        trainer.validate(module, data, verbose=False)
    return {f"averaged_val_{name}": value for name, value in module.validation_metrics().items()}
