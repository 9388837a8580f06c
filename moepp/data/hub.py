"""Datasets of the Hugging Face hub, and folders in the forms that `datasets` reads."""

import glob
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moepp.data.files import BadRows, file_texts, refuse_bad_bytes, row_text, sha256
from moepp.data.settings import HubConfig
from moepp.errors import UsageError
from moepp.lfs import refuse_pointer
from moepp.records import read_json, write_json

COMMITS = "commits.json"  # in the cache: what each revision was when the hub was last asked
ROWS = 1024  # of a Parquet file, read at a time
ROW_SUFFIXES = (".parquet", ".arrow", ".jsonl", ".ndjson", ".csv", ".tsv")  # of files that are hardly notes


def fingerprint(hub: HubConfig, column: str, cache: Path) -> dict[str, Any]:
    """What decides the documents: hashes of a folder's data files, or the dataset's commit."""
    hub = _found(hub)
    if Path(hub.id).is_dir():
        source = [sha256(path) for path in _data_files(hub, cache)]
    else:
        source = [hub.id, commit(hub, cache)]
    return {"hub": source, "choice": [hub.config, hub.split, column, hub.max_documents]}


def _found(hub: HubConfig) -> HubConfig:
    """With the folder of the user, if it is named. Raises UsageError for a file."""
    path = Path(hub.id).expanduser()
    if path.is_file():
        raise UsageError(f"data.hub.id={hub.id} is a file; name a folder, in which all files of one form are read")
    return replace(hub, id=str(path)) if path.is_dir() else hub


def commit(hub: HubConfig, cache: Path) -> str:
    """The commit of the revision: the hub's, or where it cannot be reached the one it had when it last was."""
    if re.fullmatch("[0-9a-f]{40}", hub.revision):
        return hub.revision
    path, key = cache / COMMITS, f"{hub.id}@{hub.revision}"
    known = read_json(path) or {}
    try:
        found = _look_up(hub)
    except UsageError as error:
        if key not in known or not _is_away(error.__cause__):
            raise
        print(f"{hub.id}: the hub cannot be asked; going on with commit {known[key]}, its last", file=sys.stderr)
        return known[key]
    if known.get(key) != found:
        write_json(path, {**known, key: found})
    return found


def _look_up(hub: HubConfig) -> str:
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(hub.id, revision=hub.revision, timeout=30).sha
    except Exception as error:  # includes the classes of whichever HTTP library the client uses
        raise UsageError(
            f"cannot look up '{hub.id}' on the Hugging Face hub ({' '.join(str(error).split())}); check data.hub.id "
            "and the network, or use a local folder as data.hub.id or prepared tokens (data.corpus=tokens)"
        ) from error


def _is_away(error: BaseException | None) -> bool:
    """Whether nobody answered: what the hub says of a dataset that is gone or closed is an answer."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status is None or status >= 500


def hub_texts(hub: HubConfig, column: str, cache: Path, bad: BadRows) -> Iterator[str]:
    """The documents in order. JSON and CSV files of a folder are read as data=text reads them."""
    hub, files = _found(hub), []
    if Path(hub.id).is_dir():
        _tell_of_others(hub, cache)
        files = _row_files(hub, cache)
    found = file_texts(files, "", column, bad) if files else _row_texts(hub, column, cache, bad)
    for number, text in enumerate(found, start=1):
        yield text
        if number == hub.max_documents:
            return


def _row_texts(hub: HubConfig, column: str, cache: Path, bad: BadRows) -> Iterator[str]:
    for number, row in enumerate(_rows(hub, column, cache), start=1):
        if column not in row:
            raise UsageError(
                f"data.hub.id={hub.id} has no column '{column}'; set data.text_column to one of {', '.join(row)}"
            )
        if not isinstance(row[column], str | None):
            raise UsageError(f"data.text_column={column} of {hub.id} holds {type(row[column]).__name__}, not text")
        yield from row_text(row, column, f"{hub.id} row {number}", bad)


def _rows(hub: HubConfig, column: str, cache: Path) -> Iterator[dict[str, Any]]:
    """Raises UsageError for whatever the library and the readers below it raise, at the start or in between."""
    from datasets import load_dataset

    local = Path(hub.id).is_dir()
    revision, reading = (None, _only(column, hub, cache)) if local else (commit(hub, cache), {})
    chosen = {"name": hub.config or None, "split": hub.split, "revision": revision, "streaming": hub.streaming}
    read = 0
    try:
        rows = load_dataset(hub.id, **chosen, **reading, cache_dir=str(cache))
        for row in rows:
            yield row
            read += 1
    except Exception as error:
        while error.__cause__ is not None:  # it wraps what a file was wrong with
            error = error.__cause__
        if local and isinstance(error, UnicodeDecodeError):
            refuse_bad_bytes(_data_files(hub, cache))
        where = f" after row {read}" if read else ""
        said = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"cannot load data.hub.id={hub.id}{where}: {said}") from error


def _only(column: str, hub: HubConfig, cache: Path) -> dict[str, Any]:
    """Makes the library read one column of a folder's files: the others need not be alike in all of them."""
    from datasets.packaged_modules.parquet.parquet import Parquet
    from pyarrow.parquet import read_schema

    if not isinstance(_builder(hub, cache), Parquet):
        return {}
    for file in _data_files(hub, cache):
        if column not in (names := read_schema(file).names):
            raise UsageError(f"{file} has no column '{column}' (data.text_column); it has {', '.join(names)}")
    return {"columns": [column], "batch_size": ROWS}  # a size of its own fails at a file without rows


def _builder(hub: HubConfig, cache: Path) -> Any:
    from datasets import load_dataset_builder

    try:
        return load_dataset_builder(hub.id, name=hub.config or None, cache_dir=str(cache))
    except Exception as error:  # as in _rows
        raise UsageError(f"cannot load data.hub.id={hub.id}: {' '.join(str(error).split())}") from error


def _data_files(hub: HubConfig, cache: Path) -> list[Path]:
    """The files of a folder that `datasets` reads, of all splits: a note beside them is none of the data. Raises
    UsageError for one that is not whole.
    """
    by_split = _builder(hub, cache).config.data_files or {}
    files = sorted({Path(name) for names in by_split.values() for name in names})
    for file in files:
        refuse_pointer(file)
        if file.suffix.lower() == ".parquet" and not _ends_as_parquet(file):
            raise UsageError(f"{file} is no whole Parquet file: it does not end as one")
    return files


def _tell_of_others(hub: HubConfig, cache: Path) -> None:
    """`datasets` reads a folder in the form of most of its files, without a word about the others."""
    read = {path.resolve() for path in _data_files(hub, cache)}
    found = sorted(glob.glob("**/*", root_dir=hub.id, recursive=True))
    rows = (name for name in found if any(suffix.lower() in ROW_SUFFIXES for suffix in Path(name).suffixes[-2:]))
    others = [name for name in rows if Path(hub.id, name).resolve() not in read]
    if others and not hub.config:  # which may choose among them
        shown = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        tqdm.write(f"{hub.id}: {len(read)} files are read, all of one form; left out: {shown}", file=sys.stderr)


def _ends_as_parquet(file: Path) -> bool:
    with open(file, "rb") as content:
        content.seek(-min(4, file.stat().st_size), os.SEEK_END)
        return content.read() == b"PAR1"


def _row_files(hub: HubConfig, cache: Path) -> list[Path]:
    """Those of the split, where all are JSON or CSV; none for a part of a split of JSON, which `datasets` takes.
    Raises UsageError for a part of one of CSV: it would cut or shift rows with too many fields.
    """
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.json.json import Json

    builder = _builder(hub, cache)
    by_split = {str(split): names for split, names in (builder.config.data_files or {}).items()}
    if isinstance(builder, Csv) and hub.split not in by_split:
        raise UsageError(f"data.hub.split={hub.split}: of the CSV files in {hub.id} choose from {', '.join(by_split)}")
    return [Path(name) for name in by_split.get(hub.split, [])] if isinstance(builder, Json | Csv) else []
