"""Every number of the schemas has a range, and every word a person may type is a choice, a registered name or text."""

import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any, Literal, get_args, get_origin

import pytest

from moepp import register
from moepp.config import compose
from moepp.errors import UsageError
from moepp.layers.bounds import FINITE, parts, taken_apart
from moepp.sweeps.launchers import LAUNCHERS
from moepp.sweeps.spec import Sweep
from moepp.training.settings import RunConfig

SCHEMAS = {"": RunConfig, "sweep": Sweep, **{f"launcher.{name}": schema for name, schema in LAUNCHERS.items()}}
# Words that no list can hold: paths and addresses, names of the user's own and of others' columns, prose and digests.
TEXT = """
name init_from init_weights runs plugins plugin_sources model.path data.path data.separator data.text_column data.hub.id
data.hub.config data.hub.split data.hub.revision data.sources.id data.sources.config data.sources.split
data.sources.revision data.sources.text_column data.tokenizer data.end_of_text data.cache data.digest tracking.uri
tracking.experiment tags sweep.name sweep.question sweep.paper sweep.plugins sweep.base sweep.scales.set
sweep.scales.arms sweep.scales.seeds sweep.baseline sweep.storage sweep.seeds sweep.objective sweep.lengthened
sweep.contrasts.arms sweep.contrasts.minus sweep.trend.x sweep.trend.series sweep.primary.contrast sweep.predictions
sweep.notes sweep.file launcher.slurm.partition launcher.slurm.parameters launcher.ray.address
"""


def values(kind: Any, key: str) -> Iterator[tuple[str, Any]]:
    """(key, type) of everything in a schema that is one value."""
    inner, _, _ = taken_apart(kind)
    if is_dataclass(inner):
        for name, part in parts(inner).items():
            yield from values(part, f"{key}.{name}".lstrip("."))
    elif get_origin(inner) in (dict, list):
        yield from values(get_args(inner)[-1], key)
    else:
        yield key, kind


FOUND = [found for name, schema in SCHEMAS.items() for found in values(schema, name)]


def test_every_number_has_a_range():
    numbers = {key: taken_apart(kind)[1] for key, kind in FOUND if taken_apart(kind)[0] in (int, float)}
    assert len(numbers) > 60 and [key for key, allowed in numbers.items() if allowed == FINITE] == []


def test_every_word_is_a_choice_a_registered_name_or_text():
    known = (bool, int, float, Any)
    words = [
        key
        for key, kind in FOUND
        if taken_apart(kind)[0] not in known and get_origin(taken_apart(kind)[0]) is not Literal
    ]
    named = {key for registry in register.ALL for key in (registry.key, f"model.{registry.key}")}
    assert sorted(key for key in words if key not in named) == sorted(TEXT.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("optim.name=SGD optim.options.momentum=-3", "optim.options.momentum=-3 must not be negative, and below 1"),
        ("optim.name=muon optim.options.ns_steps=0", "optim.options.ns_steps=0 must be at least 1"),
        ("optim.name=muon optim.options.adjust_lr_fn=x", "optim.options.adjust_lr_fn=x must be one of"),
        ("optim.name=SGD optim.options.nesterov=true", "optim.options={'nesterov': True}: optimizer SGD refuses this"),
        ("optim.name=SGD optim.options.maximize=true", "optim.options.maximize: optimizer SGD takes momentum"),
        ("optim.name=Adam optim.options.betas=[0.9]", "optim.options={'betas': [0.9]}: optimizer Adam refuses this"),
        ("optim.name=Adam optim.options.eps=.nan", "optim.options.eps=nan must be finite"),
        ("model.gate=softmax model.gate_options.scale=0", "model.gate_options.scale=0 must be positive"),
        (
            "trainer.callbacks.EarlyStopping.monitor=val_loss",
            "trainer.callbacks.EarlyStopping.monitor=val_loss: no such metric; choose from val/loss",
        ),
        ("trainer.callbacks.EarlyStopping.monitor=val/los", "monitor=val/los: no such metric; choose from val/loss"),
        ("trainer.callbacks.ModelCheckpoint.monitor=router/fnn_share", "did you mean router/ffn_share?"),
        (
            "trainer.callbacks.EarlyStopping.monitor=val/accuracy",
            "takes the worse val/accuracy for the better one: set trainer.callbacks.EarlyStopping.mode=max",
        ),
        (
            "trainer.callbacks.ModelCheckpoint={monitor: val/loss, mode: max}",
            "ModelCheckpoint.mode=max takes the worse val/loss for the better one",
        ),
        (
            "trainer.callbacks.EarlyStopping={monitor: val/loss, patience: -1}",
            "trainer.callbacks.EarlyStopping.patience=-1 must not be negative",
        ),
        ("optim.name=RMSprop optim.options.alpha=2", "10 steps down a slope, begun at 0, end at nan"),
        ("optim.name=Rprop optim.options.step_sizes=[-5,-1]", "10 steps down a slope, begun at 0, end at"),
        ("optim.name=SGD optim.options={momentum: 0.9, dampening: 5}", "10 steps down a slope, begun at 0, end at"),
        ("optim.schedule=wsd optim.decay_share=0.9", "lets the rate fall after step 1 of trainer.steps=8, and"),
        ("data.vocab_size=1000", "data.vocab_size=1000 is more ids than the embedding has rows, model.vocab_size=512"),
        ("model=remoe model.balance.beta=0", "balance.control=remoe multiplies balance.beta, which is 0"),
        ("model=remoe model.balance.expected_ffn=4", "balance.expected_ffn=4.0 must be less than experts.ffn=4"),
        ("trainer.callbacks.EarlyStopping={}", "EarlyStopping needs trainer.callbacks.EarlyStopping.monitor"),
        ("trainer.callbacks.Timer.duration=x", "trainer.callbacks.Timer={'duration': 'x'}: callback Timer refuses"),
        ("trainer.accelerator=mps", "trainer.accelerator=mps must be one of 'auto', 'cpu', 'gpu', 'cuda'"),
        ("optim.lr=fast", "optim.lr=fast must be a number"),
        ("model.kv_heads=few", "model.kv_heads=few must be a whole number, or null"),
        ("trainer.steps=null", "trainer.steps=null must be a whole number"),
        ("trainer.accelerator=???", "trainer.accelerator=??? stands for a value that is missing"),
        ("runs=", "runs='' must be a folder, written out"),
        ("runs=~/x", "runs='~/x' must be a folder, written out"),
        ("tracking.loggers=[csv,csv]", "tracking.loggers=['csv', 'csv'] must name each logger once"),
        ("plugins=os", "plugins=os: no module of that name can be imported"),
        ("model.balance.control_options.a=1", "model.balance.control_options={'a': 1} are of no control"),
        ("trainer.compile=maybe", "trainer.compile=maybe must be true or false"),
        ("strategy=expert_parallel trainer.devices=4 strategy.expert_parallel_size=3", "does not divide 4 devices"),
        (
            "strategy=fsdp trainer.devices=2 trainer.callbacks.StochasticWeightAveraging.swa_lrs=0.1",
            "StochasticWeightAveraging averages whole weights, and strategy=fsdp divides them: leave it out",
        ),
        ("strategy=fsdp trainer.devices=4 strategy.shard_size=3", "strategy.shard_size=3 does not divide 4 devices"),
        ("strategy=expert_parallel trainer.devices=8", "model.experts.ffn=4 cannot be divided among 8 devices"),
        ("strategy=expert_parallel trainer.devices=2 model.moe_every=0", "model.moe_every=0 leaves none"),
    ],
)  # fmt: skip
def test_what_only_building_would_show_is_refused_when_a_config_is_made(words, said):
    with pytest.raises(UsageError) as caught:
        compose(RunConfig, ["size=smoke", *re.split(r" (?=[a-z]\w*[.=])", words)])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_options_that_a_library_takes_are_taken_without_drawing_random_numbers():
    import torch

    before = torch.random.get_rng_state()
    compose(RunConfig, ["size=smoke", "optim.name=Adam", "optim.options.betas=[0.9,0.99]"])
    assert torch.equal(torch.random.get_rng_state(), before)
