import json
import os
import subprocess
import sys
from pathlib import Path

import official_reference as reference
import pytest
import torch
from safetensors.torch import load_file, save_file

from moepp.errors import UsageError
from moepp.models.official import load_official
from moepp.models.weight_files import write_tensors

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden"


def split_in_three(tensors):
    names = list(tensors)
    return [{name: tensors[name] for name in names[start::3]} for start in range(3)]


def write_shards(folder, tensors, base, suffix, save):
    parts = {f"{base}-{i + 1:05}-of-00003.{suffix}": part for i, part in enumerate(split_in_three(tensors))}
    for file, part in parts.items():
        save(part, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / f"{base}.{suffix}.index.json").write_text(json.dumps(index))


LAYOUTS = {
    "bin": lambda folder, tensors: torch.save(tensors, folder / "pytorch_model.bin"),
    "sharded bin": lambda folder, tensors: write_shards(folder, tensors, "pytorch_model", "bin", torch.save),
    "sharded safetensors": lambda folder, tensors: write_shards(folder, tensors, "model", "safetensors", save_file),
}


@pytest.mark.parametrize("write", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_of_files_gives_the_same_parameters(write, tmp_path):
    source = GOLDEN / "released_7b_flags"
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    write(tmp_path, load_file(source / "model.safetensors"))
    found, wanted = load_official(tmp_path).state_dict(), load_official(source).state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted) and found.keys() == wanted.keys()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's record of peak memory")
def test_a_checkpoint_is_never_held_twice_nor_in_another_type(tmp_path):
    """Peak resident memory, file mappings included, in a process of its own."""
    program = """
import ctypes, sys, torch
from moepp.models.official import load_official

def resident(what):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(what))

torch.set_num_threads(1)
load_official(sys.argv[1])  # what is loaded lazily is loaded now
for folder in sys.argv[2:]:
    ctypes.CDLL(None).malloc_trim(0)  # gives back what the model before had
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    before = resident("VmRSS")
    model = load_official(folder)
    weights = list(model.parameters())
    print(weights[0].dtype, (resident("VmHWM") - before) / sum(p.nbytes for p in weights))
    del model, weights
"""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_experts": [10]}
    keys = reference.SMALL | sizes
    tensors = {name: torch.zeros(shape) for name, shape in reference.shapes(keys).items()}
    folders = [tmp_path / name for name in ("shards", "safetensors", "bin")]
    for folder in folders:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(keys))
    save_file(tensors, folders[1] / "model.safetensors")
    torch.save(tensors, folders[2] / "pytorch_model.bin")
    write_tensors(folders[0], {name: tensor.bfloat16() for name, tensor in tensors.items()}, 2**24)
    command = [sys.executable, "-c", program, str(GOLDEN / "plain_softmax"), *map(str, folders)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = [line.split() for line in done.stdout.splitlines()]
    assert [dtype for dtype, _ in found] == ["torch.bfloat16", "torch.float32", "torch.float32"]
    assert all(0.9 < float(share) < 1.3 for _, share in found), found


def broken(tmp_path, change):
    """The one line with which a checkpoint is refused after `change(folder, tensors)`."""
    _, tensors = reference.write_checkpoint(tmp_path)
    change(tmp_path, tensors)
    with pytest.raises(UsageError) as error:
        load_official(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    return str(error.value)


def resave(change):
    def rewrite(folder, tensors):
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return rewrite


def without_layer_1(tensors):
    for name in [name for name in tensors if "layers.1." in name]:
        tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (resave(lambda t: t.pop("model.norm.weight")), ["1 missing (model.norm.weight)"]),
        (resave(without_layer_1), ["22 missing (model.layers.1.input_layernorm.weight, ", ", ...)"]),
        (resave(lambda t: t.update(other=torch.zeros(2))), ["1 unknown (other)"]),
        (
            resave(lambda t: t.update({"lm_head.weight": torch.zeros(3, 32)})),
            ["1 of another shape (lm_head.weight [3, 32] for [64, 32])"],
        ),
        (lambda f, _: (f / "model.safetensors").unlink(), ["has no weights", "model.safetensors", "pytorch_model.bin"]),
        (lambda f, _: (f / "model.safetensors").write_bytes(b"\x00" * 40), ["cannot read", "model.safetensors"]),
        (lambda f, _: os.truncate(f / "model.safetensors", 90_000), ["cannot read", "model.safetensors"]),
        (lambda f, _: (f / "config.json").unlink(), ["has no config.json"]),
        (lambda f, _: (f / "config.json").write_text("{"), ["cannot read", "config.json"]),
        (lambda f, _: (f / "config.json").write_text("[]"), ["config.json must hold a JSON object"]),
    ],
)  # fmt: skip
def test_broken_checkpoints_are_refused_in_one_line(change, parts, tmp_path):
    line = broken(tmp_path, change)
    assert all(part in line for part in parts), line


@pytest.mark.parametrize("content", [b"", b"no archive", None], ids=["empty", "no archive", "no state dict"])
def test_unreadable_bin_files_are_refused_in_one_line(content, tmp_path):
    def change(folder, _):
        (folder / "model.safetensors").unlink()
        if content is None:
            torch.save({"epoch": 3}, folder / "pytorch_model.bin")
        else:
            (folder / "pytorch_model.bin").write_bytes(content)

    assert "pytorch_model.bin" in broken(tmp_path, change)


def test_bin_files_cannot_run_code(tmp_path):
    def change(folder, tensors):
        (folder / "model.safetensors").unlink()
        torch.save(tensors | {"payload": Path("x")}, folder / "pytorch_model.bin")

    assert "cannot read" in broken(tmp_path, change)


@pytest.mark.parametrize(
    ("index", "part"),
    [
        (
            {"weight_map": {"model.norm.weight": "gone.bin"}},
            "lacks files that pytorch_model.bin.index.json lists: gone.bin",
        ),
        ({}, "has no weight_map"),
    ],
    ids=["missing shard", "no weight_map"],
)
def test_an_index_must_lead_to_files(index, part, tmp_path):
    def change(folder, _):
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))

    assert part in broken(tmp_path, change)


def test_sources_that_cannot_be_reached_are_refused_in_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"neither a folder nor a hub id"):
        load_official(tmp_path / "nowhere")
    program = """
from moepp.errors import UsageError
from moepp.models.official import load_official
try:
    load_official("owner/name")
except UsageError as error:
    print(error)
"""
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}  # nobody answers there
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("owner/name is no folder here and cannot be fetched from the hub: ")
    assert done.stdout.count("\n") == 1
