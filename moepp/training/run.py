"""One run from its config to its `done` marker: prepare, resume, fit, evaluate, record."""

import dataclasses
import logging
import os
import socket
import statistics
import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback

from moepp import config as configs
from moepp.data.batches import TokenDataModule
from moepp.data.prepare import prepare
from moepp.data.token_files import TokenFiles
from moepp.data.windows import window_count
from moepp.errors import Interrupted, PeerLost, RunError, UsageError
from moepp.layers.kernels.base import BackendError
from moepp.models.budget import Budget
from moepp.models.decoder import Decoder
from moepp.records import TOKENIZER, RunRecord, UnreadableRecord, link_or_copy, write_json
from moepp.strategies import make_strategy
from moepp.training.averaging import LateAverage
from moepp.training.awakening import Awakening
from moepp.training.bar import StepBar
from moepp.training.branching import branch_off
from moepp.training.callbacks import MetricsReporter, ResumeCheckpoint, resume_points, save_whole
from moepp.training.cloze import ClozeScorer
from moepp.training.compiled import refuse_what_cannot_be_compiled
from moepp.training.foreign import completed
from moepp.training.initial import FINAL_WEIGHTS, initial_weights
from moepp.training.module import LanguageModel
from moepp.training.provenance import collect, continued
from moepp.training.pruning import Judge, Pruning
from moepp.training.ranks.launch import SECONDS_TO_ARRIVE, launch
from moepp.training.ranks.rank import Rank, from_rank_zero, is_lost_connection, process_group
from moepp.training.record_logger import RecordLogger
from moepp.training.settings import RunConfig, changed_settings, run_directory, say_changes
from moepp.training.throughput import autocast_of, expert_forward_times, validation_ids
from moepp.training.totals import TrainingTotals
from moepp.training.trainer import RecordedTrainer, make_callbacks, make_loggers, make_profiler
from moepp.training.val_windows import write_windows
from moepp.training.weights import DamagedCheckpoint, begin_from, read_whole_checkpoint

Own = TypeVar("Own", bound=Callback)


def freeze(config: RunConfig) -> RunConfig:
    """The config with the digests of its prepared tokens and of the weights it begins with, so that with others it is
    another run. Builds the tokens.
    """
    _refuse_what_is_missing(config)
    config = completed(config)
    tokens = prepare(config.data, progress=config.trainer.progress)
    data = dataclasses.replace(config.data, digest=tokens.header.digest)
    return dataclasses.replace(config, data=data, init_weights=initial_weights(config))


def train(config: RunConfig, directory: Path | None = None, judge: Judge | None = None) -> RunRecord:
    """Trains a frozen config in its run directory, or continues, or returns at once when it is done or pruned. Without
    a directory the config is frozen here, and its own is taken.

    `judge` may stop it early, with the status `pruned`. Over several devices this process starts one for each
    (launch.py), or is one of those that torchrun or srun started; of these, rank 0 alone writes the record. Raises
    RunError for what goes wrong after a correct start, and leaves the reason in failed.json; Interrupted after SIGTERM.
    """
    if directory is None:
        config = freeze(config)
        directory = run_directory(config)
    rank, record = Rank.here(), RunRecord(directory)
    config = rank.spread(config)
    _refuse_what_is_missing(config)
    try:
        with record.lock() if rank.keeps_record(config) else nullcontext():
            _refuse_other_record(record, config)
            if record.status not in ("done", "pruned"):
                _train_or_say_why(record, config, rank, judge)
    except OSError as error:
        raise RunError(_say_what_file(error, directory)) from error
    return record


def _refuse_other_record(record: RunRecord, config: RunConfig) -> None:
    if record.status == "damaged":
        raise RunError(record.damage)
    if changed := changed_settings(record, config):
        raise UsageError(f"{record.path} was begun with other settings ({say_changes(changed)}); choose another name=")


def _say_what_file(error: OSError, directory: Path) -> str:
    why = error.strerror or str(error)
    if error.filename is None:  # of a write or a flush: a disk that is full, say
        return f"cannot write the run record {directory}: {why}"
    file = Path(os.fsdecode(error.filename))
    if file.absolute().is_relative_to(directory.absolute()) or directory.absolute().is_relative_to(file.absolute()):
        return f"cannot write the run record {file}: {why}"
    return f"cannot read or write {file}: {why}; the run {directory} needs it"


def _refuse_what_is_missing(config: RunConfig) -> None:
    wanted, gpus = config.trainer.devices, torch.cuda.device_count()
    if config.trainer.accelerator in ("gpu", "cuda") and not gpus:
        raise UsageError(f"trainer.accelerator={config.trainer.accelerator}: no GPU is visible; use cpu or auto")
    if _uses_gpus(config) and wanted > gpus:
        raise UsageError(f"trainer.devices={wanted}, but {gpus} GPUs are visible on this machine")
    if config.trainer.cuda_graphs and not _uses_gpus(config):
        raise UsageError("trainer.cuda_graphs=true needs a GPU; set trainer.cuda_graphs=false")
    if config.trainer.compile:
        refuse_what_cannot_be_compiled(config, _uses_gpus(config))


def _uses_gpus(config: RunConfig) -> bool:
    return config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def _train_or_say_why(record: RunRecord, config: RunConfig, rank: Rank, judge: Judge | None) -> None:
    try:
        if rank.keeps_record(config):
            _open_record(record, config)
        if config.strategy.name != "single" and not rank.started_by:
            launch(record, config)
        else:
            _train_as(rank, record, config, judge)
    except Interrupted:
        raise
    except BackendError as error:
        raise UsageError(str(error)) from None
    except RunError as error:
        known = isinstance(error, PeerLost) and record.status == "failed"  # from the rank that was lost
        if rank.started_by != "launch" and not known:
            record.fail(str(error))
        raise


def _train_as(rank: Rank, record: RunRecord, config: RunConfig, judge: Judge | None) -> None:
    try:
        with process_group(rank, config.strategy.timeout_s, _uses_gpus(config)):
            _train(record, config, rank, judge)
    except (UsageError, RunError):
        raise
    except Exception as error:
        if rank.started_by and is_lost_connection(error):
            raise PeerLost(f"rank {rank.rank} lost another rank: {str(error).splitlines()[0]}") from error
        raise


def _open_record(record: RunRecord, config: RunConfig) -> None:
    tokens = config.trainer.steps * config.data.batch_size * config.data.seq_len
    configs.save(config, record.path / "config.yaml")
    write_json(record.path / "budget.json", dataclasses.asdict(Budget.of(config.model, config.data.seq_len, tokens)))
    record.path.joinpath("failed.json").unlink(missing_ok=True)


def _train(record: RunRecord, config: RunConfig, rank: Rank, judge: Judge | None) -> None:
    _quiet()
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    tokens = prepare(config.data, progress=False)
    if rank.rank == 0:
        branch_off(record, config)
    resume = from_rank_zero(_resume_point(record) if rank.rank == 0 else None)
    if rank.rank == 0:
        _record_provenance(record, dataclasses.asdict(tokens.header), resumed=resume is not None)
        _keep_tokenizer(record, tokens)
    module = LanguageModel.of_run(config, tokens.header.end_of_text)
    data = TokenDataModule(config.data, config.seed, config.trainer.accumulate)
    trainer = _trainer(record, config, rank, tokens, judge)
    if config.init_from and resume is None:
        begin_from(config, module.model)
    trainer.fit(module, data, ckpt_path=resume and _arrived(resume))
    if any(isinstance(callback, Pruning) and callback.reason for callback in trainer.callbacks):
        return
    if config.data.final_val_sequences is not None:
        data.val_sequences = config.data.final_val_sequences
    if module.validated_step != trainer.global_step or data.val_sequences != config.data.val_sequences:
        trainer.validate(module, data, verbose=False)
    _finish(record, config, trainer, module, data)


def _record_provenance(record: RunRecord, header: dict, resumed: bool) -> None:
    """Of this attempt, and of those whose steps it continues. What cannot be read is no reason not to train."""
    try:
        before = record.read("provenance.json") if resumed else {}
    except UnreadableRecord as error:
        print(f"warning: {error}; what the run was begun with is no longer known", file=sys.stderr)
        before = {}
    write_json(record.path / "provenance.json", continued(before, collect(header)))


def _keep_tokenizer(record: RunRecord, tokens: TokenFiles) -> None:
    """Tokens that were prepared elsewhere may come without one."""
    source, target = tokens.path / TOKENIZER, record.path / TOKENIZER
    if source.is_file() and not target.exists():
        link_or_copy(source, target)


def _trainer(record: RunRecord, config: RunConfig, rank: Rank, tokens: TokenFiles, judge: Judge | None) -> pl.Trainer:
    settings = config.trainer
    return RecordedTrainer(
        strategy=make_strategy(**dataclasses.asdict(config.strategy)),
        plugins=[TorchElasticEnvironment() if rank.started_by else LightningEnvironment()],
        accelerator=settings.accelerator,
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        precision=settings.precision,
        deterministic=settings.deterministic,
        max_steps=settings.steps,
        max_epochs=-1,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=config.optim.grad_clip or None,
        val_check_interval=settings.val_every * settings.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        profiler=make_profiler(settings.profiler, record),
        logger=[RecordLogger(record), *make_loggers(config.tracking, record)],
        log_every_n_steps=settings.log_every,
        callbacks=[
            *make_callbacks(settings.callbacks),
            *_own_callbacks(record, config, tokens, judge),
            *([StepBar()] if settings.progress else []),
        ],
        default_root_dir=record.path,
        use_distributed_sampler=False,
        enable_progress_bar=settings.progress,
        enable_model_summary=False,
    )


def _own_callbacks(record: RunRecord, config: RunConfig, tokens: TokenFiles, judge: Judge | None) -> list[Callback]:
    """After those of the config, whose metrics belong into the same lines and whose state into the same checkpoints."""
    data, every, steps = config.data, config.trainer.val_every, config.trainer.steps
    epoch_steps = window_count(tokens.header.train.tokens, data.seq_len) // data.batch_size
    averaged, added = config.trainer.average_checkpoints, config.model.retrofit
    return [
        TrainingTotals(steps, epoch_steps),
        *([LateAverage(averaged, steps)] if averaged else []),
        *([Awakening(added)] if added.wakes else []),
        *([ClozeScorer(config.cloze, data.seq_len, every)] if config.cloze.points else []),
        MetricsReporter(data.batch_size * data.seq_len, data.seq_len),
        *([Pruning(judge)] if judge else []),
        ResumeCheckpoint(record, config.trainer.checkpoint_every, every, config.trainer.keep_at),
    ]


def _resume_point(record: RunRecord) -> Path | None:
    """The newest checkpoint that can be read; the record's metrics are rewound to its step. Damaged ones are set aside:
    the run goes on from an older one, or anew.
    """
    for point in reversed(resume_points(record.checkpoints)):
        try:
            step = read_whole_checkpoint(point)["global_step"]
        except DamagedCheckpoint as error:
            aside = point.with_name(f"damaged-{point.name}")
            point.replace(aside)
            print(f"warning: {error}; it is now {aside.name}, and the run goes on without it", file=sys.stderr)
            continue
        record.rewind(step)
        return point
    record.rewind(0)
    return None


def _arrived(point: Path) -> Path:
    """Waits until another node's file system shows what rank 0 has seen."""
    deadline = time.monotonic() + SECONDS_TO_ARRIVE
    while not point.exists():
        if time.monotonic() > deadline:
            raise RunError(f"{point} is not on {socket.gethostname()}; all nodes must share the folder of runs")
        time.sleep(0.2)
    return point


def _finish(
    record: RunRecord,
    config: RunConfig,
    trainer: pl.Trainer,
    module: LanguageModel,
    data: TokenDataModule,
) -> None:
    """Writes the final weights, tables and `final/*` metrics, then the marker."""
    routing = {name: float(value) for name, value in module.val_routing.compute().items()}
    final = {f"val_{name}": value for name, value in module.validation_metrics().items()} | routing
    final["router_entropy"] = final.pop("entropy")
    if trainer.is_global_zero:
        module.val_routing.write_table(record.path / "tables" / "expert_load.csv")
    write_windows(record, trainer, module, data)
    final |= _speed(record)
    final |= _own(trainer, TrainingTotals).metrics()
    final["train_seconds"] = _own(trainer, ResumeCheckpoint).seconds
    if trainer.global_step < config.trainer.steps:
        final["stopped_at_step"] = trainer.global_step  # by a callback, early
    if config.cloze.points and "step_time_ms" in final:
        final["cloze_share"] = _cloze_seconds(record) / (trainer.global_step * final["step_time_ms"] / 1000)
    final["active_params"] = module.model.active_parameters(routing["ffn_per_token"])
    final["flops_per_token"] = sum(module.model.forward_flops(config.data.seq_len, routing["ffn_per_token"]).values())
    timed = config.trainer.expert_timing and isinstance(module.model, Decoder)
    if timed and config.strategy.name in ("single", "ddp"):  # others shard what is timed
        module.to(trainer.strategy.root_device)  # from the CPU, where Lightning leaves it
        final |= _expert_times(module, config, data.files)
    save_whole(trainer, record, FINAL_WEIGHTS, weights_only=True)
    if config.trainer.average_checkpoints:
        final |= _averaged(trainer, module, data)
    if trainer.is_global_zero:
        record.log(trainer.global_step, {f"final/{name}": value for name, value in final.items()})
        record.finish()
        for point in resume_points(record.checkpoints, but=config.trainer.keep_at):
            point.unlink()


def _own(trainer: pl.Trainer, kind: type[Own]) -> Own:
    return next(callback for callback in trainer.callbacks if isinstance(callback, kind))


def _averaged(trainer: pl.Trainer, module: LanguageModel, data: TokenDataModule) -> dict[str, float]:
    """What the validation says of the mean of the late weights."""
    with _own(trainer, LateAverage).in_place(module):
        trainer.validate(module, data, verbose=False)
    return {f"averaged_val_{name}": value for name, value in module.validation_metrics().items()}


def _speed(record: RunRecord) -> dict[str, float]:
    """Medians over the logged intervals; the first holds the warm-up and is left out where there are others."""
    lines = [line for line in record.metrics() if "perf/tokens_per_s" in line]
    steady = lines[1:] or lines
    names = ("tokens_per_s", "step_time_ms", "tflops", "mfu")
    found = {name: [line[f"perf/{name}"] for line in steady if f"perf/{name}" in line] for name in names}
    speed = {name: statistics.median(values) for name, values in found.items() if values}
    if lines:
        speed["peak_mem_gib"] = max(line["perf/peak_mem_gib"] for line in lines)
    return speed


def _cloze_seconds(record: RunRecord) -> float:
    return sum(line.get("perf/cloze_seconds", 0.0) for line in record.metrics())


def _expert_times(module: LanguageModel, config: RunConfig, tokens: TokenFiles) -> dict[str, float]:
    ids = validation_ids(tokens, config.data.seq_len).to(module.device)
    rows = expert_forward_times({"run": module.model}, ids, autocast_of(config, module.device))
    by_routing = {row["routing"]: row["median_ms"] for row in rows}
    return {"expert_forward_ms": by_routing["learned"], "expert_forward_ms_balanced": by_routing["balanced"]}


def _quiet() -> None:
    """Lightning's tips and notices would drown the progress bar; errors still pass."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
