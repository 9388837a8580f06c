"""A corpus to token files: found in the cache, or made by one process while others wait."""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from moepp import register
from moepp.data.settings import DataConfig
from moepp.data.token_files import DTYPES, FORMAT, Header, TokenFiles
from moepp.errors import RunError, UsageError
from moepp.locks import locked


def token_digest(config: DataConfig) -> str:
    """The digest of the tokens `config` asks for, without making them; hashes the corpus, a second per gigabyte."""
    if config.corpus == "tokens":
        return _open_prepared(config).header.digest
    from moepp.data import corpora

    trained = config.tokenizer == "bpe"
    decides = {
        "format": FORMAT,
        "corpus": corpora.corpus_of(config).fingerprint(),
        "tokenizer": config.vocab_size if trained else _tokenizer_hash(config),
        "split": [config.val_share, config.split_seed],
        **({"bad_rows": config.bad_rows} if config.bad_rows != "refuse" else {}),
        **({"end_of_text": config.end_of_text} if config.end_of_text else {}),
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


@register.corpus("tokens")
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
    from moepp.data import corpora
    from moepp.data.tokenizer import LossCount, end_of_text, load_tokenizer, train_bpe, write_split

    for abandoned in folder.parent.glob(f".{folder.name}-*") if alone else ():  # by a builder that was killed
        shutil.rmtree(abandoned)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        documents, skipped = corpora.load_documents(config, scratch / "documents", progress)
        val = corpora.held_out(documents, config.val_share)
        trained = config.tokenizer == "bpe"
        if trained:
            tokenizer = train_bpe(corpora.texts(documents, ~val, "training the tokenizer", progress), config.vocab_size)
        else:
            tokenizer = load_tokenizer(Path(config.tokenizer).expanduser())
        folder_of_tokenizer = None if trained else Path(config.tokenizer).expanduser().parent
        end = end_of_text(tokenizer, folder_of_tokenizer, config.end_of_text)
        result = scratch / "tokens"
        result.mkdir()
        tokenizer.save(str(result / "tokenizer.json"))
        vocab_size = max(tokenizer.get_vocab().values()) + 1
        dtype = DTYPES[vocab_size > 2**16]
        train_texts, val_texts = (corpora.texts(documents, side, "tokenising", progress) for side in (~val, val))
        loss = None if trained else LossCount(tokenizer)  # a byte-level BPE loses nothing
        # The held-out texts first: they are few, and tell whether the tokenizer is one for this text.
        held_out = write_split(tokenizer, end, val_texts, dtype, result / "val.bin", result / "val.lengths.bin", loss)
        if loss:
            loss.refuse(config.tokenizer)
        kept = write_split(tokenizer, end, train_texts, dtype, result / "train.bin")
        vanished = len(documents) - kept.documents - held_out.documents
        corpora.refuse_most_lost("have not one token", vanished, len(documents))
        header = Header(
            format=FORMAT,
            digest=folder.name,
            dtype=dtype,
            vocab_size=vocab_size,
            end_of_text=end,
            corpus=corpora.corpus_of(config).origin(),
            train=kept,
            val=held_out,
            bad_rows=skipped,
            without_tokens=vanished,
            lost_characters=loss.lost if loss else 0,
        )
        (result / "header.json").write_text(json.dumps(asdict(header), indent=1) + "\n")
        os.rename(result, folder)
    except OSError as error:
        if alone or not folder.is_dir():
            raise RunError(f"cannot write tokens to {folder.parent}: {error}") from error
    finally:
        shutil.rmtree(scratch)
