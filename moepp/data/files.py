"""Files to documents: plain, JSON or CSV, compressed or not, and what of them cannot be read as text."""

import bz2
import csv
import gzip
import hashlib
import io
import itertools
import json
import lzma
import re
import warnings
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from moepp.errors import UsageError
from moepp.lfs import refuse_pointer

BLOCK = 2**24  # characters read at a time
LONGEST_DOCUMENT = 2**28  # characters; a document is held in memory
NOT_TEXT = {b"PAR1": "a Parquet file", b"PK\x03\x04": "a zip archive", b"ARROW1": "an Arrow file", b"%PDF": "a PDF"}
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson", ".jsonlines")
DELIMITERS = {".csv": ",", ".tsv": "\t"}


def _open_zstandard(path: Path, mode: str, encoding: str, errors: str) -> TextIO:
    """As gzip.open. Reads all frames, of which tools with several threads write many, and tells of a cut one."""
    from pyarrow import input_stream

    return io.TextIOWrapper(input_stream(path, compression="zstd"), encoding=encoding, errors=errors)


# What a file begins with, whatever it is called. A frame of Zstandard may be one to skip.
OPENERS = {
    b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open,
    b"\x28\xb5\x2f\xfd": _open_zstandard, b"\x50\x2a\x4d\x18": _open_zstandard,
}  # fmt: skip


@dataclass
class BadRows:
    """What cannot be read as a document: refused as soon as it is met, or left out and counted."""

    skip: bool
    count: int = 0

    def add(self, where: str, what: str) -> None:
        """Raises UsageError where nothing may be left out."""
        self.count += 1
        if not self.skip:
            raise UsageError(f"{where}: {what}; mend it, or set data.bad_rows=skip to leave out and count what is bad")


def is_json(path: Path) -> bool:
    return any(suffix.lower() in JSON_SUFFIXES for suffix in path.suffixes[-2:])


def delimiter(path: Path) -> str:
    """What stands between the fields of a CSV file; "" for other files."""
    return next(filter(None, (DELIMITERS.get(suffix.lower()) for suffix in path.suffixes[-2:])), "")


def file_texts(paths: Iterable[Path], separator: str, column: str, bad: BadRows) -> Iterator[str]:
    """The documents of files, in order. Raises UsageError for what cannot be opened or is of another kind, and for a
    separator that is nowhere.
    """
    pattern, separated = separator_pattern(separator), False
    for path in paths:
        try:
            with _open(path) as file:
                if is_json(path):
                    yield from _json_texts(file, path, column, bad)
                elif delimiter(path):
                    yield from _csv_texts(file, path, column, bad)
                else:
                    _refuse_rows(path, column)
                    separated |= yield from _pieces(file, path, pattern, bad)
        except UsageError:
            raise
        except Exception as error:  # each way to compress has errors of its own
            raise UsageError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if separator and not separated:
        raise UsageError(
            f"data.separator={separator!r} stands nowhere in the plain text of data.path, whose line ends are read as"
            " \\n; mend it, or leave it out"
        )


def _refuse_rows(path: Path, column: str) -> None:
    """JSON rows under another name would be taken for text, braces and all."""
    with suppress(ValueError, RecursionError):
        row = json.loads(_first_line(path))
        if isinstance(row, dict) and column in row:
            raise UsageError(f"{path} holds JSON rows with '{column}'; rename it to end in .jsonl, to be read as such")


def _first_line(path: Path) -> str:
    """The first that is not blank, or the beginning of a long one. Not every file that is open can be read again."""
    with _open(path) as file:
        return next((line for line in iter(lambda: file.readline(BLOCK), "") if line.strip()), "")


def sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def refuse_bad_bytes(paths: Iterable[Path]) -> None:
    """Raises UsageError for the first byte that is no text, with file and line."""
    for path in paths:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if found := _bad_byte(line):
                    raise UsageError(f"{path} line {number}: {found[1]}")


def _open(path: Path) -> TextIO:
    """UTF-8 text, a byte-order mark left out, line ends as "\\n"; other bytes become lone surrogates, which UTF-8 text
    never holds.
    """
    refuse_pointer(path)
    with open(path, "rb") as file:
        begin = file.read(8)
    for mark, kind in NOT_TEXT.items():
        if begin.startswith(mark):
            raise UsageError(f"{path} is {kind}, not text: data=hub data.hub.id=FOLDER reads the forms of datasets")
    if begin.startswith(UTF_16):
        raise UsageError(f"{path} is UTF-16, not UTF-8; make another of it: iconv -f UTF-16 -t UTF-8")
    opened = next((opener for mark, opener in OPENERS.items() if begin.startswith(mark)), open)
    return opened(path, mode="rt", encoding="utf-8-sig", errors="surrogateescape")


def separator_pattern(pattern: str) -> re.Pattern[str]:
    """Raises UsageError for what separates nothing, or something else than it seems to say."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of forms that a later Python may read otherwise
            separator = re.compile(pattern or r"(?!)")  # the latter never matches: one file, one document
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(
            f"data.separator={pattern!r} is not a regular expression: {error}; for the text itself write"
            f" {re.escape(pattern)}"
        ) from None
    if separator.match(""):
        raise UsageError(f"data.separator={pattern!r} matches the empty string")
    if meaning := _other_meaning(pattern):
        literal = re.sub(r"([][|.()])", r"\\\1", pattern)
        raise UsageError(
            f"data.separator={pattern!r} is a pattern in which {meaning}; for the text itself write {literal}"
        )
    return separator


def _other_meaning(pattern: str) -> str:
    """What a pattern means of which the words look as if they stood for themselves: <|endoftext|>, [SEP], ..."""
    alternatives = [re.sub(r"^\(+(\?:)?|\)+$", "", part) for part in re.split(r"(?<!\\)\|", pattern)]
    if len(alternatives) > 1 and any(len(part) == 1 and not part.isspace() for part in alternatives):
        return "| stands between alternatives, one of them a single character"
    if re.search(r"(?<!\\)\[[A-Za-z_/ ]{2,}\](?![*+?{])", pattern):
        return "[...] is any one of the characters in it"
    return ". is any character" if pattern.strip(".") == "" and pattern else ""


def _bad_byte(text: str) -> tuple[int, str] | None:
    """Where in `text` the first byte is that no UTF-8 text has, and what to say of it; None for text."""
    found = re.search("[\0\udc80-\udcff]", text)  # NUL: a tape archive, UTF-16, a hole in the file
    if not found:
        return None
    begin = text.rfind("\n", 0, found.start()) + 1
    place = len(text[begin : found.start()].encode("utf-8", "surrogateescape")) + 1
    return found.start(), f"byte {place} (0x{ord(found[0]) & 0xFF:02X}) is not UTF-8 text"


def _pieces(file: TextIO, path: Path, separator: re.Pattern[str], bad: BadRows) -> Generator[str, None, bool]:
    """The text between separators, holding one block and one document in memory. Returns whether there was one."""
    rest, line, dropping, separated = "", 1, False, False
    while True:
        block = file.read(BLOCK)
        rest += block
        start = 0
        for match in separator.finditer(rest):
            if block and match.end() == len(rest):
                break  # the separator may go on in the next block
            if not dropping:
                yield from _whole(rest[start : match.start()], path, line, bad)
            line += rest.count("\n", start, match.end())
            start, dropping, separated = match.end(), False, True
        rest = rest[start:]
        if len(rest) > LONGEST_DOCUMENT and not dropping:
            what = f"a document of more than {LONGEST_DOCUMENT:,} characters; split it with data.separator"
            bad.add(f"{path} line {line}", what)
            dropping = True
        if dropping:  # a separator may have begun at its end
            line += rest.count("\n", 0, -BLOCK)
            rest = rest[-BLOCK:]
        if not block:
            if not dropping:
                yield from _whole(rest, path, line, bad)
            return separated


def _whole(text: str, path: Path, line: int, bad: BadRows) -> Iterator[str]:
    """The text, unless a byte of it is none; `line` is where it begins."""
    if found := _bad_byte(text):
        place, what = found
        bad.add(f"{path} line {line + text.count(chr(10), 0, place)}", what)
    else:
        yield text


def _json_texts(file: TextIO, path: Path, column: str, bad: BadRows) -> Iterator[str]:
    if _first_line(path).lstrip().startswith("["):
        yield from _array_texts(file.read(), path, column, bad)
        return
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        if found := _bad_byte(line):
            bad.add(where, found[1])
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            bad.add(where, "is no JSON object; a file holds one a line, or an array of them")
            continue
        yield from row_text(row, column, where, bad)


def _array_texts(content: str, path: Path, column: str, bad: BadRows) -> Iterator[str]:
    if found := _bad_byte(content):
        raise UsageError(f"{path} line {1 + content.count(chr(10), 0, found[0])}: {found[1]}")
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no JSON array: {error}") from None
    for number, row in enumerate(rows, start=1):
        yield from row_text(row, column, f"{path} row {number}", bad)


def _csv_texts(file: TextIO, path: Path, column: str, bad: BadRows) -> Iterator[str]:
    """The first line names the columns. Raises UsageError for quotes that do not match: they hide where rows end."""
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_DOCUMENT))  # of the process, which may have raised it
    rows = csv.reader(file, delimiter=delimiter(path), strict=True)
    try:
        names = next(rows, [])
        for cells in filter(None, rows):  # a blank line is no row
            where = f"{path} line {rows.line_num}"
            row = dict(zip(names, cells, strict=False))
            if len(cells) != len(names):
                bad.add(where, f"has {len(cells)} fields, where the first line names {len(names)}")
            elif found := _bad_byte(row.get(column, "")):
                bad.add(where, found[1])
            else:
                yield from row_text(row, column, where, bad)
    except csv.Error as error:
        raise UsageError(f"{path} line {rows.line_num}: {error}") from None


def row_text(row: Any, column: str, where: str, bad: BadRows) -> Iterator[str]:
    """The text in a row's column, unless it is none."""
    text = row.get(column) if isinstance(row, dict) else None
    if isinstance(text, str) and len(text) > LONGEST_DOCUMENT:
        bad.add(where, f"holds a text of {len(text):,} characters, more than {LONGEST_DOCUMENT:,}")
    elif isinstance(text, str) and not re.search("[\ud800-\udfff]", text):  # JSON can spell half a surrogate pair
        yield text
    elif not isinstance(row, dict):
        bad.add(where, f"is a JSON {type(row).__name__}, not an object with text in '{column}' (data.text_column)")
    elif column not in row:
        names = ", ".join(name[:40] for name in itertools.islice(row, 20)) or "nothing"
        bad.add(where, f"has no column '{column}' (data.text_column); it has {names}")
    else:
        kind = "half a character" if isinstance(text, str) else json.dumps(text, default=str)[:40]
        bad.add(where, f"has no text in '{column}' (data.text_column) but {kind}")
