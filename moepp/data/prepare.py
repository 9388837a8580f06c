"""A corpus to token files: found in the cache, or made by one process while others wait."""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from moepp import register
from moepp.data.settings import DataConfig
from moepp.data.token_files import DTYPES, FORMAT, Counts, Header, TokenFiles
from moepp.errors import RunError, UsageError
from moepp.locks import locked
from moepp.records import TOKENIZER, read_json, write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from moepp.data.documents import Documents


def token_digest(config: DataConfig) -> str:
    """The digest of the tokens `config` asks for, without making them; hashes the corpus, a second per gigabyte."""
    if config.corpus == "tokens":
        return _open_prepared(config).header.digest
    from moepp.data import corpora

    trained = config.tokenizer == "bpe"
    if trained:  # before the corpus is read, which may take hours
        from moepp.data.tokenizer import refuse_too_few_ids

        refuse_too_few_ids(config.vocab_size)
    decides = {
        "format": FORMAT,
        "corpus": corpora.text_fingerprint(config),
        "tokenizer": config.vocab_size if trained else _tokenizer_hash(config),
        "split": [config.val_share, config.split_seed],
        **({"bad_rows": config.bad_rows} if config.bad_rows != "refuse" else {}),
        **({"end_of_text": config.end_of_text} if config.end_of_text else {}),
    }
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]


def _tokenizer_hash(config: DataConfig) -> str:
    from moepp.data.tokenizer import MADE_BY_TRANSFORMERS

    path = Path(config.tokenizer).expanduser()
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        said = f"data.tokenizer={config.tokenizer} is neither 'bpe' nor a readable file: {error.strerror}"
    if (path / TOKENIZER).is_file():
        raise UsageError(f"{said}; name the file in it, {path / TOKENIZER}")
    if path.is_dir():
        raise UsageError(f"{said}, and has no {TOKENIZER}; {MADE_BY_TRANSFORMERS}")
    raise UsageError(f"{said}; of a model on the hub take its file: hf download {path} {TOKENIZER} --local-dir .")


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
    _refuse_too_many_ids(files.header.vocab_size, files.path, config.vocab_size)
    for split, counts in (("training", files.header.train), ("held-out", files.header.val)):
        if counts.tokens < config.seq_len + 1:
            raise UsageError(
                f"the {split} split has {counts.tokens} tokens, fewer than data.seq_len + 1 = {config.seq_len + 1}; "
                "give more text or a smaller data.seq_len"
            )
    return files


def _refuse_too_many_ids(ids: int, tokenizer: Path, vocab_size: int) -> None:
    if ids > vocab_size:
        raise UsageError(
            f"the tokenizer of {tokenizer} has {ids} ids, more than data.vocab_size={vocab_size}; set"
            f" model.vocab_size={ids}"
        )


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
        with _only_builder(folder, progress) as alone:
            if not folder.is_dir():
                _build(config, folder, progress, alone)
    return folder


@contextmanager
def _only_builder(folder: Path, progress: bool) -> Iterator[bool]:
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
        try:
            alone = locked(fcntl.flock, lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                print(f"{folder}: another process makes these tokens; waiting for it", file=sys.stderr)
            alone = locked(fcntl.flock, lock, fcntl.LOCK_EX)
        yield alone


def _build(config: DataConfig, folder: Path, progress: bool, alone: bool) -> None:
    """Makes everything beside `folder` and renames it there at the end: `folder` exists whole or not at all. Who is
    alone goes on where a builder before was killed.
    """
    if alone:
        scratch = folder.with_name(f".{folder.name}")
    else:
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _discard_of_others(scratch)
        os.rename(_tokens(config, scratch, folder.name, progress), folder)
        shutil.rmtree(scratch)
    except OSError as error:
        if register.failed(error):  # what somebody's corpus meets where it reads
            raise
        if alone or not folder.is_dir():
            raise RunError(f"cannot write tokens to {folder.parent}: {error}") from error
    except UsageError:  # it would be the same again
        shutil.rmtree(scratch)
        raise
    finally:
        if not alone:
            shutil.rmtree(scratch, ignore_errors=True)


def _discard_of_others(scratch: Path) -> None:
    """What other versions have begun is begun anew: they may cut elsewhere."""
    from moepp.data.documents import SHARD_BYTES

    made_by = {"shard_bytes": SHARD_BYTES, "tokenizers": importlib.metadata.version("tokenizers")}
    if read_json(scratch / "made_by.json") != made_by:
        shutil.rmtree(scratch, ignore_errors=True)
        write_json(scratch / "made_by.json", made_by)


def _tokens(config: DataConfig, scratch: Path, digest: str, progress: bool) -> Path:
    """A folder of token files in `scratch`, which may hold what was finished before."""
    from moepp.data import corpora, documents, shards

    _refuse_unfit_tokenizer(config)
    corpus = corpora.corpus_of(config)
    found = documents.store(corpus, scratch / shards.DOCUMENTS, progress)
    if token_digest(config) != digest:  # of what it was before: a download may go on, a branch of the hub move
        raise UsageError("the corpus changed while it was read; the same command reads it anew")
    below = found.held_out_below(config.val_share)
    tokenizer = _tokenizer(config, found, below, scratch / TOKENIZER, progress)
    vocab_size, end = _ids_and_end(tokenizer, config)
    job = shards.TokenJob(end, DTYPES[vocab_size > 2**16], below)
    write_json(scratch / shards.JOB, asdict(job))
    # The held-out texts first: they are few, and tell whether the tokenizer is one for this text.
    val = shards.tokenise(scratch, "val", progress)
    val.refuse_loss(config.tokenizer)
    train = shards.tokenise(scratch, "train", progress)
    vanished = found.count - train.documents - val.documents
    documents.refuse_most_lost("have not one token", vanished, found.count)
    header = Header(
        format=FORMAT,
        digest=digest,
        dtype=job.dtype,
        vocab_size=vocab_size,
        end_of_text=end,
        corpus=corpus.origin(),
        train=Counts(train.documents, train.tokens, train.bytes),
        val=Counts(val.documents, val.tokens, val.bytes),
        bad_rows=found.bad_rows,
        without_tokens=vanished,
        lost_characters=val.lost,
    )
    return _joined(scratch, header)


def _refuse_unfit_tokenizer(config: DataConfig) -> None:
    """Raises UsageError before the corpus is read, which may take hours."""
    from moepp.data.tokenizer import END_OF_TEXT, load_tokenizer

    if config.tokenizer == "bpe":
        if config.end_of_text not in ("", END_OF_TEXT[0]):
            raise UsageError(
                f"data.end_of_text={config.end_of_text} is no token of the tokenizer that is trained, which has"
                f" {END_OF_TEXT[0]}; leave it out, or name a data.tokenizer that has it"
            )
    else:
        path = Path(config.tokenizer).expanduser()
        ids, _ = _ids_and_end(load_tokenizer(path), config)
        _refuse_too_many_ids(ids, path, config.vocab_size)


def _ids_and_end(tokenizer: "Tokenizer", config: DataConfig) -> tuple[int, int]:
    """How many ids it has, and the one that ends a document. Raises UsageError where nothing tells the latter."""
    from moepp.data.tokenizer import end_of_text

    folder = None if config.tokenizer == "bpe" else Path(config.tokenizer).expanduser().parent
    return max(tokenizer.get_vocab().values()) + 1, end_of_text(tokenizer, folder, config.end_of_text)


def _tokenizer(config: DataConfig, found: "Documents", below: int, path: Path, progress: bool) -> "Tokenizer":
    """The one in the file, which is trained or copied there first."""
    from tqdm import tqdm

    from moepp.data.tokenizer import load_tokenizer, train_bpe

    if not path.is_file():
        if config.tokenizer == "bpe":
            texts = found.all_texts(below, held_out=False)
            with tqdm(texts, desc="training the tokenizer", unit=" documents", disable=not progress) as shown:
                made = train_bpe(shown, config.vocab_size)
        else:
            made = load_tokenizer(Path(config.tokenizer).expanduser())
        made.save(str(path.with_suffix(".part")))
        os.replace(path.with_suffix(".part"), path)
    return load_tokenizer(path)


def _joined(scratch: Path, header: Header) -> Path:
    from moepp.data import shards

    result = scratch / "tokens"
    result.mkdir(exist_ok=True)
    shutil.copy(scratch / TOKENIZER, result)
    shards.join_shards(scratch, "train", shards.IDS, result / "train.bin")
    shards.join_shards(scratch, "val", shards.IDS, result / "val.bin")
    shards.join_shards(scratch, "val", shards.LENGTHS, result / "val.lengths.bin")
    write_json(result / "header.json", asdict(header))
    return result
