"""What a run of a model of transformers needs before it is frozen: what its folder says, and a first phase where that
is asked for. Needs no torch before that: a sweep asks before it trains.
"""

import fcntl
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from moepp.config import save
from moepp.data.prepare import prepare
from moepp.errors import RunError, UsageError
from moepp.layers.settings import BalanceConfig, ExpertCounts
from moepp.locks import locked
from moepp.models.foreign import EXPERTS, SLOTS, RetrofitConfig, architecture_of, first, folder_of
from moepp.models.settings import DecoderConfig
from moepp.process import cause_of_end, start
from moepp.records import TOKENIZER, RunRecord
from moepp.terminal import working
from moepp.training.initial import initial_weights
from moepp.training.settings import ClozeConfig, RunConfig, StrategyConfig, run_directory


def completed(config: RunConfig) -> RunConfig:
    """The config with the folder's architecture, vocabulary and tokenizer, where it has none of its own; any other
    model's, and one that is complete, as it is. Of `first_steps` the folder is the one in which these end. Raises
    UsageError for a folder that lacks something.
    """
    if config.model.name != "hf" or config.model.architecture:
        return config
    if config.model.retrofit.first_steps:
        config = replace(config, model=replace(config.model, path=str(first_phase(config))))
    model, data = config.model, config.data
    folder, architecture = folder_of(model.path), architecture_of(model.path)
    vocab_size = first(architecture, ("vocab_size",)) or model.vocab_size
    own = data.tokenizer == "bpe" and data.corpus != "tokens"
    if own and not (folder / TOKENIZER).is_file():
        raise UsageError(f"model.path={model.path} holds no {TOKENIZER}: set data.tokenizer")
    tokenizer = str(folder / TOKENIZER) if own else data.tokenizer
    model = replace(model, architecture=architecture, vocab_size=vocab_size, **expert_counts(model, architecture))
    return replace(config, model=model, data=replace(data, vocab_size=vocab_size, tokenizer=tokenizer))


def expert_counts(model: DecoderConfig, architecture: dict) -> dict:
    """Its experts with the new ones, as reports count them; those of a dense model or an unknown name as they are."""
    upcycled = model.retrofit.upcycle
    experts = first(architecture, EXPERTS) or upcycled or None
    slots = first(architecture, SLOTS) or min(2, upcycled) or None
    if experts is None or slots is None:
        return {}
    added = architecture.get("moepp", vars(model.retrofit))
    counts = ExpertCounts(experts, added["zero"], added["copy"], added["constant"])
    return {"experts": counts, "top_k": slots, "gating_residual": added["gating_residual"]}


def first_phase(config: RunConfig) -> Path:
    """The folder of the upcycled model that `first_steps` have trained: an export of a run of its own, which is made
    where it is not there yet, by one process while others wait.
    """
    asked = frozen_first(config)
    directory = run_directory(asked)
    folder = directory / "export-hf"
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory.with_suffix(".lock"), "w") as lock:
        locked(fcntl.flock, lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            save(asked, directory / "config.yaml")
            run_alone(directory)
            from moepp.training.export import export_run

            scratch = directory / "exporting"
            shutil.rmtree(scratch, ignore_errors=True)
            os.rename(export_run(directory, out=scratch), folder)
    return folder


def frozen_first(config: RunConfig) -> RunConfig:
    """The config of the first phase: all of the upcycled model is trained, and nothing is added to it."""
    steps = config.model.retrofit.first_steps
    alone = RetrofitConfig(upcycle=config.model.retrofit.upcycle)
    model = replace(config.model, retrofit=alone, balance=BalanceConfig())
    trainer = replace(
        config.trainer, steps=steps, val_every=steps, checkpoint_every=steps, callbacks={}, keep_at=[],
        average_checkpoints=0, accumulate=1, devices=1, num_nodes=1, progress=False,
    )  # fmt: skip
    asked = replace(
        config,
        name="first_phase",
        init_from="",
        model=model,
        trainer=trainer,
        strategy=StrategyConfig(),
        cloze=ClozeConfig(),
        tags={},
    )
    asked = completed(asked)
    asked = replace(asked, data=replace(asked.data, digest=prepare(asked.data, progress=False).header.digest))
    return replace(asked, init_weights=initial_weights(asked))


def run_alone(directory: Path) -> None:
    """Trains the frozen config in this folder by a process of its own, as a sweep its trials."""
    log = directory / "log.txt"
    with working("training the first phase of a model"):
        code = start([sys.executable, "-m", "moepp.cli", "trial", str(directory / "config.yaml")], log, {}).wait()
    if code:
        reason = RunRecord(directory).read("failed.json").get("reason") or cause_of_end(code, log)
        raise RunError(f"the first phase in {directory} did not end: {reason}")
