"""What is needed to score text: a decoder, its tokenizer, its context and the precision it computes in."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moepp.errors import UsageError
from moepp.models.decoder import Decoder
from moepp.models.official import load_official
from moepp.models.weight_files import read_json
from moepp.training.run import autocast_of, load_decoder
from moepp.training.tokens import prepare


class TextTokenizer(Protocol):
    """Text to ids and back, without adding special tokens."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class Checkpoint:
    """`prefix` stands before a text that has nothing before it, `end_of_text` ends one; `context` is in tokens."""

    source: Path
    model: Decoder
    tokenizer: TextTokenizer
    prefix: int
    end_of_text: int
    context: int
    precision: Callable[[], AbstractContextManager]
    device: torch.device

    @torch.inference_mode()
    def logits(self, ids_BS: Tensor) -> Tensor:
        """Logits [B, S, V] of ids on `device`."""
        with self.precision():
            return self.model(ids_BS).logits


def load_checkpoint(
    source: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> Checkpoint:
    """A run directory, one of its checkpoint files, or a folder in the released layout with its tokenizer.

    `device`: the first GPU where there is one. `dtype` of the weights: as saved for a run, which computes in the
    precision of its training; bfloat16 on a GPU and float32 on a CPU for a released checkpoint. Raises UsageError for
    anything else, and for a checkpoint without a tokenizer.
    """
    source = Path(source).expanduser()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if source.suffix == ".ckpt" or (source / "config.yaml").exists():
        return _load_run(source, device, dtype)
    if (source / "config.json").exists():
        return _load_released(source, device, dtype)
    raise UsageError(
        f"{source} is no run directory (config.yaml), no checkpoint file (*.ckpt) and no folder of a released "
        "checkpoint (config.json)"
    )


def _load_run(source: Path, device: torch.device, dtype: torch.dtype | None) -> Checkpoint:
    model, config = load_decoder(source)
    tokens = prepare(config.data, progress=False)
    file = tokens.path / "tokenizer.json"
    if not file.exists():
        raise UsageError(f"{source} was trained on tokens without text: {file} is missing, so no task can be read")
    end = tokens.header.end_of_text
    precision = autocast_of(config, device) if dtype is None else nullcontext
    model = model.to(device, dtype)
    return Checkpoint(source, model, JsonTokenizer(file), end, end, config.data.seq_len, precision, device)


def _load_released(source: Path, device: torch.device, dtype: torch.dtype | None) -> Checkpoint:
    keys = read_json(source / "config.json")
    tokenizer = _released_tokenizer(source)  # before the weights, which may take minutes
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    model = load_official(source, dtype, device, attention="fused").eval()
    prefix, end = keys.get("bos_token_id", 1), keys.get("eos_token_id", 2)  # defaults of the released config class
    context = keys.get("max_position_embeddings", 2048)
    return Checkpoint(source, model, tokenizer, prefix, end, context, nullcontext, device)


def _released_tokenizer(folder: Path) -> TextTokenizer:
    if (folder / "tokenizer.json").exists():
        return JsonTokenizer(folder / "tokenizer.json")
    file = folder / "tokenizer.model"
    if not file.exists():
        raise UsageError(f"{folder} has no tokenizer.json and no tokenizer.model; copy the release's tokenizer there")
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise UsageError(f"{file} needs the package sentencepiece: pip install sentencepiece") from None
    return SentencePieceProcessor(model_file=str(file))


class JsonTokenizer:
    """A tokenizer.json of Hugging Face `tokenizers`. The name of a special token inside a text is text."""

    def __init__(self, file: Path):
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)
