"""Gathers what a GPU's machine without a network lacks. Two packs of the same things are equal in every byte."""

import hashlib
import json
import lzma
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moepp.config import CONF
from moepp.data import corpora
from moepp.data.documents import store
from moepp.data.settings import DataConfig
from moepp.data.tokenizer import train_bpe
from moepp.errors import RunError, UsageError
from moepp.records import write_json
from moepp.training.provenance import git

ROOT = CONF.parent
WHEELS = ("omegaconf",)  # pure Python; everything else that a run needs lies on a machine made for PyTorch
VOCABULARIES = (8192, 16384)
VAL_SHARE = 0.02
CORPUS = "corpus.jsonl.xz"
WIKIPEDIA = ROOT.parent / "shared" / "data" / "corpus" / "enwik8_prose.txt.xz"
LICENCES = {WIKIPEDIA.name: "English Wikipedia of 2006 (enwik8) without its markup; GFDL and CC BY-SA"}
TEXT_BYTES = 40 * 2**20  # 10.7 MiB once packed
LIMIT = 12 * 2**20  # bytes of the whole folder
DENSEST = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "dict_size": 2**26}]


def pack(to: Path, text: Path | None = None) -> str:
    """Replaces the folder `to`; returns what it holds, in a line.

    The text is `text`, or Wikipedia's where it lies beside the checkout, or the embedded corpus. Raises UsageError for
    a text that cannot be read or a folder that would be too large, RunError where pip finds no wheel.
    """
    text = text or (WIKIPEDIA if WIKIPEDIA.exists() else None)
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}-") as scratch:
        made = Path(scratch, "pack")
        made.mkdir()
        _download(made)
        about = _write_corpus(text, made / CORPUS, Path(scratch))
        _train_tokenizers(made, Path(scratch))
        files = sorted(made.iterdir())
        digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        commit = git(ROOT)  # a copy of the checkout may have no repository
        write_json(made / "manifest.json", {"commit": commit.get("sha", ""), "files": digests, "text": about})
        if (size := sum(file.stat().st_size for file in made.iterdir())) > LIMIT:
            raise UsageError(
                f"the pack would have {size / 2**20:.1f} MiB, more than {LIMIT / 2**20:.0f}; give less text"
            )
        shutil.rmtree(to, ignore_errors=True)
        made.rename(to)
    wheels = ", ".join(file.name for file in files if file.suffix == ".whl")
    return f"{to}: {size / 2**20:.1f} MiB, {about['documents']:,} documents of {about['from']}; {wheels}"


def _download(folder: Path) -> None:
    pinned = (ROOT / "constraints.txt").read_text().split()
    wanted = [line for line in pinned if line.partition("==")[0] in WHEELS]
    command = ["pip", "download", "--quiet", "--only-binary=:all:", "--no-deps", "--dest", str(folder), *wanted]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"pip has not downloaded {', '.join(wanted)}: {(done.stderr.strip() or '?').splitlines()[-1]}")
    for wheel in folder.glob("*.whl"):
        if not wheel.stem.endswith("-none-any"):
            raise RunError(f"{wheel.name} is made for one kind of machine; only pure Python can be packed")


def _write_corpus(text: Path | None, path: Path, scratch: Path) -> dict[str, Any]:
    """The first documents, up to TEXT_BYTES, one JSON object a line. Returns what the manifest says of them."""
    if text and not text.is_file():
        raise UsageError(f"--text {text}: no such file")
    separated = DataConfig(corpus="text", path=str(text), separator=r"\n\s*\n")
    config = separated if text else DataConfig(corpus="sotu")
    found = store(corpora.corpus_of(config), scratch / "text", progress=False)
    documents = list(_first(found.all_texts(found.highest + 1, held_out=True)))
    lines = "".join(json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in documents).encode()
    path.write_bytes(lzma.compress(lines, format=lzma.FORMAT_XZ, filters=DENSEST))
    licence = LICENCES.get(text.name, "as its owner states") if text else corpora.corpus_of(config).origin()
    size = sum(len(document.encode()) for document in documents)
    counts = {"documents": len(documents), "of_documents": found.count, "bytes": size}
    return {"from": text.name if text else "the embedded corpus", "licence": licence, **counts}


def _first(documents: Iterator[str]) -> Iterator[str]:
    size = 0
    for document in documents:
        size += len(document.encode())
        if size > TEXT_BYTES:
            return
        yield document


def _train_tokenizers(folder: Path, scratch: Path) -> None:
    """On the training side alone, of the split that the node will make."""
    config = DataConfig(corpus="text", path=str(folder / CORPUS))
    found = store(corpora.corpus_of(config), scratch / "packed", progress=False)
    below = found.held_out_below(VAL_SHARE)
    for vocabulary in VOCABULARIES:
        tokenizer = train_bpe(found.all_texts(below, held_out=False), vocabulary)
        tokenizer.save(str(folder / f"tokenizer-{vocabulary}.json"), pretty=False)
