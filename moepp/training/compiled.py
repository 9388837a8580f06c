"""The loss of training as one compiled function: whatever else runs the model (validation, cloze questions, timing,
generation) finds it as it was, and no parameter gets another name.
"""

import os
import shutil
from importlib.util import find_spec

import torch
from torch.torch_version import TorchVersion

from moepp.errors import UsageError
from moepp.layers.dispatch import TRACEABLE
from moepp.models.settings import DecoderConfig
from moepp.training.loss import LossFunction, training_losses
from moepp.training.settings import RunConfig

COMPILER = "inductor"


def losses_of(config: RunConfig) -> LossFunction:
    """`training_losses`, compiled where the config says so: for one shape, that of all batches."""
    if not config.trainer.compile:
        return training_losses
    mode = {"mode": "reduce-overhead"} if config.trainer.cuda_graphs else {}
    return torch.compile(training_losses, backend=COMPILER, fullgraph=in_one_graph(config), dynamic=False, **mode)


def in_one_graph(config: RunConfig) -> bool:
    """Whether nothing need leave the graph, so that what does is a fault: other backends ask the device for sizes or
    have kernels of their own, and devices that share a batch send each other their counts.
    """
    return config.model.backend in TRACEABLE and config.strategy.name == "single"


def refuse_what_cannot_be_compiled(model: DecoderConfig, on_gpu: bool) -> None:
    """UsageError in one line that says what trainer.compile=true lacks on this machine."""
    if model.activation_checkpointing and torch.__version__ < TorchVersion("2.13"):
        raise UsageError(
            f"trainer.compile=true with model.activation_checkpointing=true needs torch 2.13, and this is "
            f"{torch.__version__}, which loses what the layers report: set one of them to false"
        )
    if on_gpu and find_spec("triton") is None:
        raise UsageError("trainer.compile=true needs the package triton on a GPU: pip install triton")
    name, tried = ("CC", ("gcc", "clang", "cc")) if on_gpu else ("CXX", ("g++", "clang++", "c++"))
    candidates = [os.environ[name]] if os.environ.get(name) else tried
    if not any(shutil.which(candidate) for candidate in candidates):
        language = "C" if on_gpu else "C++"
        raise UsageError(
            f"trainer.compile=true needs a {language} compiler, and {' or '.join(candidates)} is not on the PATH; "
            f"install one, or name it in {name}"
        )
