"""Checkpoints in another form: one file, parts that every device reads its own of, or torchtitan's model, and back."""

from pathlib import Path
from typing import Literal

import torch

from moepp.errors import UsageError
from moepp.models import checkpoint_parts as parts
from moepp.models.build import build_model
from moepp.pretrain.state import from_torchtitan, to_torchtitan
from moepp.training.loading import load_run
from moepp.training.weights import load_model

Form = Literal["file", "parts", "torchtitan"]


def convert(source: Path, target: Path, to: Form, run: Path | None = None) -> None:
    """`source` is a checkpoint, file or folder; for torchtitan also a finished run. What comes from torchtitan, a
    folder of its model, needs the `run` whose config says what model that is. Raises UsageError for what is neither.
    """
    if target.exists():
        raise UsageError(f"{target} exists already; name another target")
    if not source.exists():
        raise UsageError(f"there is no file and no folder {source}")
    if to == "torchtitan":
        model, config = load_model(source)
        parts.write(to_torchtitan(model.state_dict(), config.model), target)
    elif run is not None:
        _from_torchtitan(source, target, to, run)
    elif to == "file" and (source / parts.REST).is_file():
        parts.join(source, target)
    elif to == "parts" and source.is_file():
        parts.divide(source, target)
    else:
        wanted = "a checkpoint file" if to == "parts" else "a checkpoint in parts (a folder with rest.pt)"
        raise UsageError(f"{source} is not {wanted}; a folder of torchtitan's needs --run, a run with the same model")


def _from_torchtitan(source: Path, target: Path, to: Form, run: Path) -> None:
    config = load_run(run).config.model
    with torch.device("meta"):
        wanted = build_model(config).state_dict()
    named = {name: torch.empty_like(value, device="cpu") for name, value in to_torchtitan(wanted, config).items()}
    if absent := sorted(named.keys() - parts.stored_tensors(source)):
        raise UsageError(f"{source} has no {absent[0]}, so its model is not that of {run}")
    parts.read_into(source, named)
    ours = from_torchtitan(named, wanted, config)
    checkpoint = {"state_dict": {f"model.{name}": value for name, value in ours.items()}}
    torch.save(checkpoint, target) if to == "file" else parts.write_whole(checkpoint, target)
