"""The files of a released checkpoint: a folder or the hub, safetensors or .bin, whole or sharded with an index."""

import json
import pickle
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moepp.errors import UsageError
from moepp.lfs import refuse_pointer
from moepp.records import write_json

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
CHECKPOINT_FILES = ("config.json", "model*.safetensors*", "pytorch_model*.bin*")
REMAP_BYTES = 2**25


def find_folder(source: str | Path) -> Path:
    """The folder itself, or the local copy of a hub id `owner/name`, fetched where it is not there yet."""
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise UsageError(f"{source} is neither a folder nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(CHECKPOINT_FILES)))
    except (OSError, ValueError) as error:  # the hub's own errors derive from these
        raise UsageError(f"{source} is no folder here and cannot be fetched from the hub: {_line(error)}") from None


def find_weights(folder: Path) -> list[Path]:
    """The files that hold the weights, in the order in which the released code would look for them."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _indexed(index)
    raise UsageError(f"{folder} has no weights: neither {' nor '.join(WEIGHT_FILES)}, nor an index of shards")


def _indexed(index: Path) -> list[Path]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UsageError(f"{index} has no weight_map from tensors to files")
    if strays := [name for name in weight_map.values() if Path(name).name != name or name in ("", "..")]:
        raise UsageError(f"{index} names files outside its folder: {some(strays)}")
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UsageError(f"{index.parent} lacks files that {index.name} lists: {some(missing)}")
    return files


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file that must be there."""
    refuse_pointer(path)
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{path.parent} has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {_line(error)}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} must hold a JSON object")
    return value


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The file's tensors, mapped into memory: only what is used is read."""
    refuse_pointer(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        raise UsageError(f"cannot read {path}: {_line(error)}") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UsageError(f"{path} is not a mapping from names to tensors")
    return tensors


def stored_dtype(files: Iterable[Path]) -> torch.dtype:
    """The floating-point type of most of the weights, by their size in the files."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in (tensor for file in files for tensor in map_tensors(file).values()):
        if tensor.is_floating_point():
            sizes[tensor.dtype] += tensor.nbytes
    return max(sizes, key=sizes.__getitem__, default=torch.float32)


def read_tensors(path: Path, wanted: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """The wanted tensors of a file, one by one.

    Pages that were read stay in memory as long as their mapping does, so the file is mapped anew after every
    REMAP_BYTES; a mapping ends with the last tensor taken from it.
    """
    mapped, resident = map_tensors(path), 0
    for name in [name for name in mapped if name in wanted]:
        if resident >= REMAP_BYTES:
            mapped, resident = map_tensors(path), 0
        resident += mapped[name].nbytes
        yield name, mapped[name]


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int) -> None:
    """Writes model.safetensors, or shards of at most `shard_bytes` and their index; a larger tensor has a shard to
    itself.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    # Not its version for torch, which keeps in one shard whatever shares memory, as all slices of a parameter do here.
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for name, keys in split.filename_to_tensors.items():
        save_file({key: tensors[key].cpu() for key in keys}, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def some(names: list[str]) -> str:
    """The first few names, for a message of one line."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
