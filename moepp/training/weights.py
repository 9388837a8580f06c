"""The weights in a run's checkpoints. Reads them without Lightning, whose import takes longer than most of what is then
done with them.
"""

import zipfile
from pathlib import Path

import torch

from moepp.config import load
from moepp.errors import RunError, UsageError
from moepp.lfs import refuse_pointer
from moepp.models.build import build_model
from moepp.models.protocol import CausalLM
from moepp.records import digest_of
from moepp.training.initial import checkpoint_file, initial_file
from moepp.training.settings import RunConfig


class DamagedCheckpoint(RunError):
    """A checkpoint that a broken disk has cut or scrambled."""


def load_model(source: Path) -> tuple[CausalLM, RunConfig]:
    """The trained model of a finished run, or of one of a run's checkpoint files, on the CPU, and its config."""
    run = checkpoint_file(source).resolve().parent.parent if source.suffix == ".ckpt" else source
    config = load(RunConfig, run / "config.yaml")
    file = checkpoint_file(source)
    model = build_model(config.model)
    model.load_state_dict(_weights(file))
    return model.eval(), config


def weights_to_begin_from(config: RunConfig, model: CausalLM) -> dict[str, torch.Tensor]:
    """The weights of `init_from`, whole. Raises UsageError where they do not fit the model or have changed since the
    run was frozen.
    """
    file = initial_file(config.init_from)
    if digest_of(file) != config.init_weights.get("digest"):
        raise UsageError(f"init_from={config.init_from}: {file} has changed since this run was frozen")
    found, wanted = _weights(file), model.state_dict()
    for name in sorted(found.keys() | wanted.keys()):
        shapes = [tuple(state[name].shape) if name in state else "none" for state in (found, wanted)]
        if shapes[0] != shapes[1]:
            raise UsageError(
                f"init_from={config.init_from} does not fit: {name} is {shapes[0]} there, {shapes[1]} here"
            )
    return found


def _weights(file: Path) -> dict[str, torch.Tensor]:
    """The decoder's state, without what else a checkpoint holds."""
    state = read_checkpoint(file)["state_dict"]
    return {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}


def read_checkpoint(path: Path) -> dict:
    """What a checkpoint file holds, tensors on the CPU and read when they are used; of a folder of parts all are read
    at once. Raises DamagedCheckpoint.
    """
    refuse_pointer(path)
    try:
        if path.is_dir():
            from moepp.models import checkpoint_parts

            return checkpoint_parts.read_whole(path)
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # torch reports damage with whatever its zip and pickle readers raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedCheckpoint(f"checkpoint {path} cannot be read ({reason})") from error


def read_whole_checkpoint(path: Path) -> dict:
    """As `read_checkpoint`, once every byte fits the checksums beside it: what lies in a tensor no reader looks at. Of
    a folder of parts all but the tensors, once no file is too short.
    """
    if path.is_dir():
        return _read_whole_parts(path)
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise DamagedCheckpoint(f"checkpoint {path} cannot be read ({error})") from error
    if damaged:
        raise DamagedCheckpoint(f"checkpoint {path} cannot be read ({damaged} does not fit its checksum)")
    return read_checkpoint(path)


def _read_whole_parts(folder: Path) -> dict:
    from moepp.models import checkpoint_parts

    try:
        missing, rest = checkpoint_parts.missing_bytes(folder), checkpoint_parts.read_rest(folder)
    except (PermissionError, MemoryError):
        raise
    except Exception as error:
        raise DamagedCheckpoint(f"checkpoint {folder} cannot be read ({error})") from error
    if missing:
        raise DamagedCheckpoint(f"checkpoint {folder} cannot be read ({missing} is not whole)")
    return rest
