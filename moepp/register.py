"""Parts by name, the package's own and everybody else's: `@register.router("mine")` on a class or a function.

A registered name is valid wherever a built-in one is. docs/extend.md says what each kind of part is called with; its
other parameters are its options. Loads no torch.
"""

import traceback

from moepp import plugins
from moepp.errors import UsageError
from moepp.layers.registry import Registry, balance, control, expert, gate, router, selection

__all__ = [
    "Registry", "balance", "callback", "control", "corpus", "expert", "gate", "logger", "model", "optimizer",
    "router", "selection",
]  # fmt: skip

CORPORA = "moepp.data.corpora"

corpus = Registry(
    "corpus",
    key="data.corpus",
    options="data.corpus_options",
    given=("config",),
    defined={"sotu": CORPORA, "text": CORPORA, "hub": CORPORA, "mixture": CORPORA, "tokens": "moepp.data.prepare"},
)
OPTIMIZERS = ("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
CALLBACKS = (
    "DeviceStatsMonitor", "EarlyStopping", "GradientAccumulationScheduler", "LearningRateMonitor", "ModelCheckpoint",
    "StochasticWeightAveraging", "Timer",
)  # fmt: skip

optimizer = Registry(
    "optimizer",
    key="optim.name",
    options="optim.options",
    given=("module", "config"),
    defined=dict.fromkeys(("adamw", "muon", *OPTIMIZERS), "moepp.training.optim"),
)
callback = Registry(
    "callback",
    key="trainer.callbacks",
    options="trainer.callbacks.{}",
    given=(),
    defined=dict.fromkeys(CALLBACKS, "moepp.training.trainer"),
    complete=False,
)
logger = Registry(
    "logger",
    key="tracking.loggers",
    options="tracking.logger_options.{}",
    given=("record",),
    defined=dict.fromkeys(("csv", "tensorboard", "wandb"), "moepp.training.trainer"),
)
model = Registry(
    "model",
    key="model.name",
    options="model.options",
    given=("config", "seed"),
    defined={"decoder": "moepp.models.decoder", "hf": "moepp.retrofit.model"},
)


ALL = (router, expert, selection, gate, balance, control, corpus, optimizer, callback, logger, model)
for registry in ALL:
    registry.find_more = plugins.load_installed


def failed(error: BaseException) -> UsageError | None:
    """What to say of an error that a plugin's code raised, or what that called: the plugin's own lines of the
    traceback, and which part failed. None for others, and for those of a training step: an optimizer's closure is one.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [frame.f_globals.get("__name__", "") for frame in frames]
    own = [number for number, module in enumerate(modules) if plugins.of_module(module)]
    if not own or "moepp.training.module" in modules[own[-1] :]:
        return None
    lines = traceback.extract_tb(error.__traceback__)
    found = [each.described(name) for n in reversed(own) for each in ALL if (name := each.part_in(frames[n]))]
    plugin = plugins.of_module(modules[own[-1]])
    named = found[0] if found else f"plugins={plugin.name if plugin else modules[own[-1]]}"
    said = " ".join(str(error).split())
    shown = "".join(traceback.format_list([lines[number] for number in own]))
    return UsageError(f"{shown}error: {named} failed: {type(error).__name__}: {said}")
