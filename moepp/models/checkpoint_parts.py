"""Checkpoints in parts: a folder into which every device writes what it holds, in the background, and from which every
device reads what it needs, however many there were (torch.distributed.checkpoint).

<checkpoint>/
  .metadata, *.distcp   tensors of weights and optimizer, by the names of `named_tensors`
  rest.pt               all else of the checkpoint, with what is left of the optimizers' state

`whole` and `divide` turn such a folder into the file that one device writes, and back.
"""

import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

REST = "rest.pt"
SCRATCH = "scratch"  # of mapped tensors, while a folder becomes a file


def named_tensors(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """`state_dict.<name>`, and `optimizer.<optimizer>.<parameter>.<name>` for what belongs to its elements."""
    named = {f"state_dict.{name}": value for name, value in checkpoint["state_dict"].items()}
    for number, optimizer in enumerate(checkpoint.get("optimizer_states", [])):
        for index, state in optimizer["state"].items():
            named |= {f"optimizer.{number}.{index}.{k}": v for k, v in state.items() if _of_elements(v)}
    return named


def _of_elements(value: Any) -> bool:
    return torch.is_tensor(value) and value.dim() > 0


def rest(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint without its `named_tensors`, but with the weights' names in their order."""
    optimizers = [
        {**o, "state": {i: {k: v for k, v in s.items() if not _of_elements(v)} for i, s in o["state"].items()}}
        for o in checkpoint.get("optimizer_states", [])
    ]
    states = {"optimizer_states": optimizers} if "optimizer_states" in checkpoint else {}
    return {**checkpoint, "state_dict": dict.fromkeys(checkpoint["state_dict"]), **states}


def joined(rest: Mapping[str, Any], named: Mapping[str, Tensor]) -> dict[str, Any]:
    """The checkpoint of these `named_tensors` and this `rest`."""
    checkpoint = {**rest, "state_dict": dict(rest["state_dict"])}
    for name, value in named.items():
        kind, path = name.split(".", 1)
        if kind == "state_dict":
            checkpoint["state_dict"][path] = value
        else:
            number, index, key = path.split(".", 2)
            state = checkpoint["optimizer_states"][int(number)]["state"].setdefault(int(index), {})
            state[key] = value
    return checkpoint


def save_parts(folder: Path, checkpoint: Mapping[str, Any], group: dist.ProcessGroup) -> Future:
    """Copies this device's part to the host and writes it in a thread; the folder is whole when all devices' futures
    are done. `group`, which talks by gloo, serves nothing else meanwhile.
    """
    if dist.get_rank() == 0:
        _begin(folder, checkpoint)
    dist.barrier(group)
    return dcp.async_save(named_tensors(checkpoint), checkpoint_id=folder, process_group=group)


def _begin(folder: Path, checkpoint: Mapping[str, Any]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.save(rest(checkpoint), folder / REST)


def wait_for(saving: Future) -> None:
    """Until this device's part is written. Raises what went wrong, here or on another device."""
    with _own_errors():
        saving.result()


@contextmanager
def _own_errors() -> Iterator[None]:
    """What a device raised, in place of the exception that torch wraps around all devices' own. A process that is alone
    knows that it is.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def read_rest(folder: Path) -> dict[str, Any]:
    return torch.load(folder / REST, map_location="cpu", weights_only=True)


def metadata(folder: Path) -> Metadata:
    return dcp.FileSystemReader(folder).read_metadata()


def stored_tensors(folder: Path, prefix: str = "") -> dict[str, TensorStorageMetadata]:
    found = metadata(folder).state_dict_metadata
    return {name: kind for name, kind in found.items() if name.startswith(prefix)}


def read_into(folder: Path, named: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Fills these tensors, each with its part. All devices must call, unless this process is alone."""
    with _own_errors():
        dcp.load(named, checkpoint_id=folder, process_group=group, no_dist=group is None)


def read_whole(folder: Path, empty: Callable[[str, torch.Size, torch.dtype], Tensor] | None = None) -> dict[str, Any]:
    """The checkpoint that one device would have written. `empty` makes the tensors that are filled."""
    empty = empty or (lambda name, shape, dtype: torch.empty(shape, dtype=dtype))
    stored = stored_tensors(folder)
    named = {name: empty(name, kind.size, kind.properties.dtype) for name, kind in stored.items()}
    read_into(folder, named)
    return joined(read_rest(folder), named)


def missing_bytes(folder: Path) -> str:
    """The first file of the folder that is not there or too short for what the metadata say of it; "" if none is."""
    ends: dict[str, int] = {}
    for info in metadata(folder).storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    sizes = {name: (folder / name).stat().st_size if (folder / name).exists() else 0 for name in ends}
    return next((name for name, end in ends.items() if sizes[name] < end), "")


def join(folder: Path, file: Path) -> None:
    """Writes the folder as the file that one device writes. Tensors lie in a scratch file beside it on the way, not in
    memory.
    """
    scratch = file.with_name(f"{file.name}.{SCRATCH}")
    scratch.mkdir(parents=True, exist_ok=True)

    def mapped(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.from_file(str(scratch / name), shared=True, size=shape.numel(), dtype=dtype).view(shape)

    try:
        torch.save(read_whole(folder, mapped), file)
    finally:
        shutil.rmtree(scratch)


def divide(file: Path, folder: Path) -> None:
    """Writes a checkpoint file as a folder that any number of devices reads in parts."""
    write_whole(torch.load(file, map_location="cpu", mmap=True, weights_only=True), folder)


def write_whole(checkpoint: Mapping[str, Any], folder: Path) -> None:
    """As `save_parts`, by a process that is alone and holds all of it."""
    _begin(folder, checkpoint)
    write(named_tensors(checkpoint), folder)


def write(named: dict[str, Tensor], folder: Path) -> None:
    """Tensors alone, by a process that is alone."""
    with _own_errors():
        dcp.save(named, checkpoint_id=folder, no_dist=True)
