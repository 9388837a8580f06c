"""A trained model with what is needed to feed it text: a run's, or a folder's in the released layout or in that of
transformers.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from moepp.data.settings import DataConfig
from moepp.data.tokenizer import end_of_text, load_tokenizer
from moepp.errors import UsageError
from moepp.layers.kernels.cpu import multiplies_bfloat16
from moepp.models.attention import KeyValueCache
from moepp.models.decoder import Decoder
from moepp.models.official import RELEASED, load_official
from moepp.models.weight_files import find_weights, read_json_object
from moepp.records import TOKENIZER, digest_of
from moepp.training.initial import checkpoint_file
from moepp.training.loading import load_run
from moepp.training.throughput import autocast_of

DECIDING = ("config.json", TOKENIZER, "tokenizer_config.json", "generation_config.json")  # what end of text is, too


@dataclass(frozen=True)
class Checkpoint:
    """`context` is the longest input in tokens: what the model was trained on. `prefix` is the token before a text that
    has nothing before it. `data` is a run's own.
    """

    model: nn.Module  # called and cached as a Decoder
    end_of_text: int
    prefix: int
    context: int
    tokenizer: Tokenizer | None  # in a text, the name of a special token is text
    autocast: Callable[[], AbstractContextManager]
    data: DataConfig | None = None
    begin: tuple[int, ...] = ()  # before every text, as a released tokenizer's template says; no run was trained so

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UsageError("this checkpoint has no tokenizer.json, so it cannot read text")
        return self.tokenizer

    def caches(self) -> list[KeyValueCache]:
        """Empty ones, of every layer."""
        if not isinstance(self.model, Decoder):
            return self.model.caches()
        return [KeyValueCache() for _ in self.model.blocks]

    @torch.inference_mode()
    def logits(
        self, ids_BS: Tensor, at: tuple[Tensor, Tensor] | None = None, caches: list[KeyValueCache] | None = None
    ) -> Tensor:
        """Logits [B, S, V] of ids on the model's device, or [Q, V] `at` those rows and positions alone; the ids follow
        those in `caches`.
        """
        with self.autocast():
            return self.model(ids_BS, caches, at=at).logits


def load_checkpoint(path: Path, device: str | None = None, dtype: torch.dtype | None = None) -> Checkpoint:
    """A finished run's directory, one of a run's checkpoint files, or a folder in the released layout or one that
    transformers could load, as `export` writes them.

    `device`: a GPU where there is one. `dtype` of the weights: a run's as saved, computing in the precision of its
    training; a folder's too, or float32 on a CPU that does not multiply bfloat16 itself. Raises
    UsageError or RunError in one line for what cannot be loaded.
    """
    path, device = path.expanduser(), torch.device(device) if device else default_device()
    return (_run if is_run(path) else _folder)(path, device, dtype)


def is_run(path: Path) -> bool:
    """Whether a checkpoint is a run's; otherwise it is a folder with a config.json. Raises UsageError for neither."""
    if path.suffix == ".ckpt" or (path / "config.yaml").is_file():
        return True
    if (path / "config.json").is_file():
        return False
    raise UsageError(
        f"{path} is no run directory (config.yaml), no checkpoint file (*.ckpt) and no folder of a released or exported"
        " checkpoint (config.json)"
    )


def answering_files(path: Path) -> list[Path]:
    """The files that decide what a checkpoint answers: its weights first, then what says how text is read and what
    the weights mean. Raises UsageError or RunError where there are no weights.
    """
    if not is_run(path):
        return [*find_weights(path), *_those_of(path, DECIDING)]
    weights = checkpoint_file(path)
    return [weights, *_those_of(weights.resolve().parent.parent, ("config.yaml", TOKENIZER))]


def _those_of(folder: Path, names: Sequence[str]) -> list[Path]:
    return [folder / name for name in names if (folder / name).is_file()]


def released_dtype(device: torch.device) -> torch.dtype | None:
    """In which a folder's checkpoint computes, unless another type is asked for; None for the type of its files, which
    are mostly bfloat16.
    """
    return None if device.type == "cuda" or multiplies_bfloat16() else torch.float32


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _run(path: Path, device: torch.device, dtype: torch.dtype | None) -> Checkpoint:
    run = load_run(path)
    file, end, data = run.path / TOKENIZER, run.end_of_text, run.config.data
    tokenizer = _tokenizer(file, digest_of(file)) if file.is_file() else None
    autocast = autocast_of(run.config.trainer.precision, device) if dtype is None else nullcontext
    return Checkpoint(run.model.to(device, dtype), end, end, data.seq_len, tokenizer, autocast, data)


def _folder(path: Path, device: torch.device, dtype: torch.dtype | None) -> Checkpoint:
    file = path / TOKENIZER
    if not file.is_file():
        raise UsageError(
            f"{path} has no {TOKENIZER}; save one there with transformers:"
            " AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    tokenizer = _tokenizer(file, digest_of(file))  # before the weights, which may take minutes
    keys, end = read_json_object(path / "config.json"), end_of_text(tokenizer, path)
    context, begin = _context(path, keys), _begin(file)
    model = _model(path, keys, dtype or released_dtype(device), device)
    first = keys.get("bos_token_id")
    return Checkpoint(model, end, end if first is None else first, context, tokenizer, nullcontext, begin=begin)


def _model(path: Path, keys: Mapping[str, Any], dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    if keys.get("model_type", RELEASED) == RELEASED:
        return load_official(path, dtype, device, attention="fused").eval()
    from moepp.retrofit.reader import read_folder  # needs transformers

    return read_folder(path, dtype, device)


def _context(path: Path, keys: Mapping[str, Any]) -> int:
    context = keys.get("max_position_embeddings")
    if type(context) is not int or context < 1:
        raise UsageError(f"{path / 'config.json'}: max_position_embeddings={context} must be a positive whole number")
    return context


def _begin(file: Path) -> tuple[int, ...]:
    """What the tokenizer's own template puts before a text."""
    encoding = load_tokenizer(file).encode("a")
    marks = encoding.special_tokens_mask
    return tuple(encoding.ids[: marks.index(0)]) if 0 in marks else ()


@lru_cache(maxsize=4)
def _tokenizer(file: Path, digest: str) -> Tokenizer:
    """One for all checkpoints that share the file, so that they share what it has encoded."""
    tokenizer = load_tokenizer(file)
    tokenizer.encode_special_tokens = True
    return tokenizer
