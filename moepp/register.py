"""Parts by name, the package's own and everybody else's: `@register.router("mine")` on a class or a function.

A registered name is valid wherever a built-in one is. docs/extend.md says what each kind of part is called with; its
other parameters are its options. Loads no torch.
"""

import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moepp import plugins
from moepp.errors import UsageError
from moepp.layers.registry import Part, Registry, balance, control, expert, gate, router, selection

__all__ = [
    "Registry", "balance", "callback", "control", "corpus", "expert", "gate", "logger", "model", "optimizer",
    "router", "selection",
]  # fmt: skip

CORPORA = "moepp.data.corpora"


class CorpusRegistry(Registry):
    """Corpora, and which keys of `data` each reads of those in KEYS, which not all do."""

    KEYS = ("path", "separator", "text_column", "hub", "sources", "bad_rows")

    def __init__(self, *arguments: Any, reads: Mapping[str, tuple[str, ...]], **options: Any):
        super().__init__(*arguments, **options)
        self._reads: dict[str, tuple[str, ...] | None] = dict(reads)

    def __call__(self, name: str, reads: Iterable[str] | None = None) -> Callable[[Part], Part]:
        """`reads` are those of KEYS that a corpus reads; None where it does not say, and may read any of them. Raises
        ValueError for others.
        """
        keys = None if reads is None else tuple(reads)
        if unknown := [key for key in keys or () if key not in self.KEYS]:
            raise ValueError(f"corpus '{name}': reads={unknown[0]}: choose from {', '.join(self.KEYS)}")
        register = super().__call__(name)

        def add(part: Part) -> Part:
            register(part)
            if name not in self.defined:
                self._reads[name] = keys
            return part

        return add

    def reads(self, name: str) -> tuple[str, ...] | None:
        """Those of KEYS that the corpus reads; None where it has not said."""
        return self._reads.get(name)


corpus = CorpusRegistry(
    "corpus",
    reads={
        "sotu": ("bad_rows",),
        "text": ("path", "separator", "text_column", "bad_rows"),
        "hub": ("text_column", "hub", "bad_rows"),
        "mixture": ("path", "sources", "bad_rows"),
        "tokens": ("path",),
    },
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
