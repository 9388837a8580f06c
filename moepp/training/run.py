"""One run from its config to its `done` marker: prepare, resume, fit, evaluate, record."""

import os
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch

from moepp import config as configs
from moepp.data.batches import TokenDataModule
from moepp.data.prepare import prepare
from moepp.data.token_files import TokenFiles
from moepp.errors import Interrupted, PeerLost, RunError, UsageError
from moepp.layers.kernels.base import BackendError
from moepp.models.budget import Budget
from moepp.records import RunRecord, write_json
from moepp.training.allocator import keep_freed_memory
from moepp.training.branching import branch_off
from moepp.training.final import finish
from moepp.training.foreign import completed
from moepp.training.initial import initial_weights
from moepp.training.machine import (
    is_out_of_memory,
    refuse_what_the_machine_lacks,
    uses_gpus,
    warn_of_slow_products,
)
from moepp.training.module import LanguageModel
from moepp.training.provenance import record_attempt
from moepp.training.pruning import Pruner, was_pruned
from moepp.training.ranks.launch import launch_ranks
from moepp.training.ranks.rank import Rank, from_rank_zero, is_lost_connection, process_group
from moepp.training.settings import RunConfig, changed_settings, run_directory, say_changes
from moepp.training.states import arrived, rewind_to_newest
from moepp.training.trainer import make_trainer, refused_by_callback
from moepp.training.weights import weights_to_begin_from


def freeze(config: RunConfig) -> RunConfig:
    """The config with the digests of its prepared tokens and of the weights it begins with, so that with others it is
    another run. Builds the tokens.
    """
    refuse_what_the_machine_lacks(config)
    config = completed(config)
    tokens = prepare(config.data, progress=config.trainer.progress)
    data = replace(config.data, digest=tokens.header.digest)
    return replace(config, data=data, init_weights=initial_weights(config))


def train(config: RunConfig, directory: Path | None = None, pruner: Pruner | None = None) -> RunRecord:
    """Trains a frozen config in its run directory, or continues, or returns at once when it is done or pruned. Without
    a directory the config is frozen here, and its own is taken.

    `pruner` may stop it early, with the status `pruned`. Over several devices this process starts one for each
    (launch.py), or is one of those that torchrun or srun started; of these, rank 0 alone writes the record. Raises
    RunError for what goes wrong after a correct start, and leaves the reason in failed.json; Interrupted after SIGTERM.
    """
    if directory is None:
        config = freeze(config)
        directory = run_directory(config)
    rank, record = Rank.here(), RunRecord(directory)
    config = rank.spread(config)
    refuse_what_the_machine_lacks(config)
    try:
        with record.lock() if rank.keeps_record(config.trainer.num_nodes) else nullcontext():
            _refuse_another_record(record, config)
            if record.status not in ("done", "pruned"):
                _train_or_say_why(record, config, rank, pruner)
    except OSError as error:
        raise RunError(_say_what_file(error, directory)) from error
    return record


def _refuse_another_record(record: RunRecord, config: RunConfig) -> None:
    if record.status == "damaged":
        raise RunError(record.damage)
    if changed := changed_settings(record, config):
        raise UsageError(f"{record.path} was begun with other settings ({say_changes(changed)}); choose another name=")


def _train_or_say_why(record: RunRecord, config: RunConfig, rank: Rank, pruner: Pruner | None) -> None:
    try:
        if rank.keeps_record(config.trainer.num_nodes):
            _open_record(record, config)
        if config.strategy.name != "single" and not rank.started_by:
            launch_ranks(record, config.trainer, config.strategy.timeout_s)
        else:
            _train_as(rank, record, config, pruner)
    except Interrupted:
        raise
    except BackendError as error:
        raise UsageError(str(error)) from None
    except RunError as error:
        known = isinstance(error, PeerLost) and record.status == "failed"  # from the rank that was lost
        if rank.started_by != "launch" and not known:
            record.fail(str(error))
        raise


def _open_record(record: RunRecord, config: RunConfig) -> None:
    tokens = config.trainer.steps * config.data.batch_size * config.data.seq_len
    configs.save(config, record.path / "config.yaml")
    write_json(record.path / "budget.json", asdict(Budget.of(config.model, config.data.seq_len, tokens)))
    record.path.joinpath("failed.json").unlink(missing_ok=True)


def _train_as(rank: Rank, record: RunRecord, config: RunConfig, pruner: Pruner | None) -> None:
    try:
        with process_group(rank, config.strategy.timeout_s, uses_gpus(config.trainer)):
            _train(record, config, rank, pruner)
    except (UsageError, RunError):
        raise
    except Exception as error:
        if refused := refused_by_callback(error):
            raise UsageError(refused) from error
        if is_out_of_memory(error):
            raise RunError(
                f"out of memory: {' '.join(str(error).split())}; --dry-run says what a step takes: choose a smaller"
                " model or data.batch_size, more trainer.accumulate, or model.activation_checkpointing=true"
            ) from error
        if rank.started_by and is_lost_connection(error):
            raise PeerLost(f"rank {rank.rank} lost another rank: {str(error).splitlines()[0]}") from error
        raise


def _train(record: RunRecord, config: RunConfig, rank: Rank, pruner: Pruner | None) -> None:
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    if config.trainer.keep_memory and not uses_gpus(config.trainer):
        keep_freed_memory()
    if rank.rank == 0:
        warn_of_slow_products(config.trainer)
    tokens = prepare(config.data, progress=False)
    state = from_rank_zero(_begin_attempt(record, config, tokens) if rank.rank == 0 else None)
    module = LanguageModel.of_run(config, tokens.header.end_of_text)
    data = TokenDataModule(config.data, config.seed, config.trainer.accumulate)
    trainer = make_trainer(record, config, tokens, pruner, joined=bool(rank.started_by))
    if config.init_from and state is None:
        module.begin_with(weights_to_begin_from(config, module.model))
    trainer.fit(module, data, ckpt_path=state and arrived(state))
    if not was_pruned(trainer):
        finish(record, config, trainer, module, data)


def _begin_attempt(record: RunRecord, config: RunConfig, tokens: TokenFiles) -> Path | None:
    """The state to go on from; None: anew. The record says with what, and has the tokenizer."""
    branch_off(record, config)
    state = rewind_to_newest(record)
    record_attempt(record, asdict(tokens.header), resumed=state is not None)
    record.keep_tokenizer(tokens.path)
    return state


def _say_what_file(error: OSError, directory: Path) -> str:
    why = error.strerror or str(error)
    if error.filename is None:  # of a write or a flush: a disk that is full, say
        return f"cannot write the run record {directory}: {why}"
    file = Path(os.fsdecode(error.filename))
    if file.absolute().is_relative_to(directory.absolute()) or directory.absolute().is_relative_to(file.absolute()):
        return f"cannot write the run record {file}: {why}"
    return f"cannot read or write {file}: {why}; the run {directory} needs it"
