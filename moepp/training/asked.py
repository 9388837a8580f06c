"""What the words of a command or an arm ask of a run, and which of them nothing in it reads. Such a word is refused:
whoever compares runs that differ in it alone finds that it makes no difference.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from moepp import register
from moepp.config import compose
from moepp.data.settings import refuse_unread
from moepp.errors import UsageError
from moepp.layers.registry import Registry
from moepp.layers.settings import TOP_K_SELECTIONS, BalanceConfig, MoEConfig
from moepp.models.settings import DecoderConfig
from moepp.training.settings import RunConfig

OF_ADAMW = ("optim.beta1", "optim.beta2", "optim.eps")  # and of muon, which has AdamW beside it
# Not of a model without MoE layers, but for what dense blocks have as well and what other keys ask to be switched off.
OF_MOE = {part.name for part in fields(MoEConfig)} - {"dim", "hidden", "top_k", "gating_residual", "capacity_factor"}
# Of a model of transformers, beside `balance`: the rest of `model` its own config.json says.
OF_FOREIGN = ("name", "options", "path", "retrofit", "architecture", "balance", "activation_checkpointing")


class Condition(NamedTuple):
    """Keys that some runs read: whether a run does, and how it would."""

    keys: tuple[str, ...]
    reads: Callable[[RunConfig], bool]
    instead: str


def _chosen(registry: Registry, name: str | None, *readers: str) -> bool:
    """Whether a part is one of these, or a registered one, which may read any key."""
    return name is not None and (name in readers or name not in registry.defined)


def _is_foreign(balance: BalanceConfig) -> bool:
    return _chosen(register.balance, balance.form) or _chosen(register.control, balance.control)


def _reads_form(balance: BalanceConfig) -> bool:
    return balance.beta > 0 or _is_foreign(balance)


def _weighs(model: DecoderConfig) -> bool:
    """Whether there is anything that tau sets against FFN experts; a folder may bring its own."""
    return model.name == "hf" or model.experts.zero_computation > 0 or _is_foreign(model.balance)


def _reads_tau(model: DecoderConfig) -> bool:
    """Whether a loss, a capacity or a bias is weighed with it; see moepp/layers/balance.py and control.py."""
    balance = model.balance
    if model.name == "hf" or _is_foreign(balance):
        return True
    in_loss = balance.beta > 0 and balance.form != "grouped"
    return in_loss or model.capacity_factor is not None or balance.control == "loss_free"


def _reads_residual(model: DecoderConfig) -> bool:
    """Switched off it is read by any model; switched on, by a second MoE layer, which takes the first one's logits."""
    return model.name != "decoder" or not model.gating_residual or len(model.moe_blocks) > 1


def _reads_top_k(model: DecoderConfig) -> bool:
    """Dense blocks take their width from it where they have none of their own."""
    if model.name != "decoder" or (len(model.moe_blocks) < model.layers and model.dense_hidden is None):
        return True
    chooses = _chosen(register.selection, model.selection, *TOP_K_SELECTIONS)
    return bool(model.moe_blocks) and (chooses or model.multiply_by_top_k)


CONDITIONS = (
    Condition(
        ("model.top_k",),
        lambda config: _reads_top_k(config.model),
        "choose a selection that takes so many experts, such as model.selection=top_k",
    ),
    Condition(
        ("model.gating_residual", "model.residual_detached", "model.residual_init"),
        lambda config: _reads_residual(config.model),
        "choose a model of two MoE layers or more, of which the second carries the logits of the first",
    ),
    Condition(
        ("model.balance.over",),
        lambda config: _reads_form(config.model.balance),
        "set model.balance.beta above 0",
    ),
    Condition(
        ("model.balance.form",),  # an arm may take back what its base says
        lambda config: _reads_form(config.model.balance) or config.model.balance.form == BalanceConfig.form,
        "set model.balance.beta above 0",
    ),
    Condition(
        ("model.top_p",),
        lambda config: _chosen(register.selection, config.model.selection, "top_p"),
        "set model.selection=top_p",
    ),
    Condition(
        ("model.router_width",),
        lambda config: _chosen(register.router, config.model.router, "recurrent"),
        "set model.router=recurrent",
    ),
    Condition(
        ("model.balance.control_rate",),
        lambda config: config.model.balance.control is not None,
        "set model.balance.control",
    ),
    Condition(
        ("model.balance.control_decay",),
        lambda config: _chosen(register.control, config.model.balance.control, "loss_free", "longcat"),
        "set model.balance.control=loss_free or longcat",
    ),
    Condition(
        ("model.balance.expected_ffn",),
        lambda config: config.model.balance.aims_at_expected_ffn or _is_foreign(config.model.balance),
        "set model.balance.form=grouped, or model.balance.control=longcat or remoe",
    ),
    Condition(
        ("model.balance.tau",),
        lambda config: _weighs(config.model),
        "choose a model that has zero-computation experts, such as model=moepp",
    ),
    Condition(
        ("model.balance.tau",),
        lambda config: _reads_tau(config.model),
        "set model.capacity_factor, or model.balance.beta above 0 with a form other than grouped",
    ),
    Condition(
        ("model.dense_hidden",),
        lambda config: config.model.name != "decoder" or len(config.model.moe_blocks) < config.model.layers,
        "set model.dense_first or model.moe_every, which make some blocks dense",
    ),
    Condition(
        ("model.retrofit.share", "model.retrofit.wake_steps", "model.retrofit.recalibrate_every"),
        lambda config: config.model.retrofit.wakes,
        "add experts that begin silent, such as model.retrofit.zero=1",
    ),
    Condition(
        ("model.retrofit.init",),
        lambda config: config.model.retrofit.adds,
        "add something, such as model.retrofit.zero=1",
    ),
    Condition(
        ("model.retrofit.scaled_copy",),
        lambda config: config.model.retrofit.copy > 0,
        "set model.retrofit.copy above 0",
    ),
    Condition(
        ("model.retrofit.lora_rank",),
        lambda config: config.model.retrofit.train == "lora",
        "set model.retrofit.train=lora",
    ),
    Condition(
        OF_ADAMW,
        lambda config: config.optim.name not in register.OPTIMIZERS,
        "set what this optimizer has in optim.options, or choose optim.name=adamw or muon",
    ),
    Condition(("optim.decay_share",), lambda config: config.optim.schedule == "wsd", "set optim.schedule=wsd"),
    Condition(("cloze.questions",), lambda config: config.cloze.points > 0, "set cloze.points above 0"),
    Condition(("tracking.uri",), lambda config: config.tracking.backend == "mlflow", "set tracking.backend=mlflow"),
)


def asked_for(words: Sequence[str], base: Path | None = None) -> RunConfig:
    """The config that a command's words ask for, over `base`, a run's config, if there is one. Raises UsageError for
    words that make none and for words in vain.
    """
    config = compose(RunConfig, words, base=base)
    refuse_vain(words, [config])
    return config


def refuse_vain(words: Iterable[str], configs: Iterable[RunConfig]) -> None:
    """Raises UsageError for words `key=value` of a command that none of its runs reads. What presets and records say is
    for the parts that they choose, if the command chooses no others.
    """
    words, configs = list(words), list(configs)
    refuse_unread(words, [config.data for config in configs])
    for word in words:
        key = word.partition("=")[0]
        referred_to = any(f"${{{key}}}" in other for other in words)
        reasons = [_instead(key, config) for config in configs]
        if all(reasons) and not referred_to:
            raise UsageError(f"{word} has no effect: leave it out, or {reasons[0]}")


def _instead(key: str, config: RunConfig) -> str:
    """What would make the run read the key; empty where it does."""
    section, _, inside = key.partition(".")
    if section == "model" and config.model.name == "hf" and inside.partition(".")[0] not in ("", *OF_FOREIGN):
        return "choose another model: model=hf has it from its own config.json, and what is added in model.retrofit"
    dense = config.model.name == "decoder" and not config.model.moe_blocks
    if section == "model" and dense and inside.partition(".")[0] in OF_MOE:
        return "choose a model that has MoE layers: set model.moe_every above 0"
    if key.startswith("tracking.logger_options."):
        logger, loggers = key.split(".")[2], config.tracking.loggers
        return "" if logger in loggers else f"name the logger in tracking.loggers=[{', '.join([*loggers, logger])}]"
    return next((each.instead for each in CONDITIONS if key in each.keys and not each.reads(config)), "")
