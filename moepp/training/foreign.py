"""What the folder of a model of transformers says of a run. Needs no torch: a sweep asks before it trains."""

from dataclasses import replace

from moepp.errors import UsageError
from moepp.layers.settings import ExpertCounts
from moepp.models.foreign import EXPERTS, SLOTS, architecture_of, first, folder_of
from moepp.models.settings import DecoderConfig
from moepp.records import TOKENIZER
from moepp.training.settings import RunConfig


def completed(config: RunConfig) -> RunConfig:
    """The config with the folder's architecture, vocabulary and tokenizer, where it has none of its own; any other
    model's, and one that is complete, as it is. Raises UsageError for a folder that lacks something.
    """
    model, data = config.model, config.data
    if model.name != "hf" or model.architecture:
        return config
    folder, architecture = folder_of(model.path), architecture_of(model.path)
    vocab_size = first(architecture, ("vocab_size",)) or model.vocab_size
    own = data.tokenizer == "bpe" and data.corpus != "tokens"
    if own and not (folder / TOKENIZER).is_file():
        raise UsageError(f"model.path={model.path} holds no {TOKENIZER}: set data.tokenizer")
    tokenizer = str(folder / TOKENIZER) if own else data.tokenizer
    model = replace(model, architecture=architecture, vocab_size=vocab_size, **counts_of(model, architecture))
    return replace(config, model=model, data=replace(data, vocab_size=vocab_size, tokenizer=tokenizer))


def counts_of(model: DecoderConfig, architecture: dict) -> dict:
    """Its experts with the new ones, as reports count them; those of a dense model or an unknown name as they are."""
    experts, slots = first(architecture, EXPERTS), first(architecture, SLOTS)
    if experts is None or slots is None:
        return {}
    added = architecture.get("moepp", vars(model.retrofit))
    counts = ExpertCounts(experts, added["zero"], added["copy"], added["constant"])
    return {"experts": counts, "top_k": slots, "gating_residual": added["gating_residual"]}
