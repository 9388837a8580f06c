"""Every key of a config, as `run.py keys` lists them: read off the schema, the registries, and the schema's comments.

What a key means stands beside its field: behind it on its lines, and in lines of their own after or before it.
"""

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import lru_cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from moepp import register
from moepp.config import flatten, fragment_names, lies_in, nearest
from moepp.errors import UsageError
from moepp.layers.bounds import FINITE, parts, taken_apart

WIDTH = 80
WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text", Any: "anything"}


@dataclass(frozen=True)
class Key:
    """A key of the config. `default` is the schema's, and `meaning` may be empty."""

    name: str
    kind: str  # its type in words, with what is allowed
    default: Any
    meaning: str
    choices: tuple[str, ...] = ()  # names of registered parts


def describe_keys(config: Any, prefix: str = "", width: int = WIDTH) -> list[str]:
    """Lines on the keys of a config's schema below `prefix`, or whose last component it is, with their values in
    `config`, after the fragments of that name. Raises UsageError where there is none.
    """
    known, values = {key.name: key for key in keys(type(config))}, flatten(config)
    groups = {group: names for group, names in fragment_names().items() if prefix in ("", group)}
    found = [name for name in known if not prefix or lies_in(name, [prefix])]
    found = found or [name for name in known if name.rpartition(".")[2] == prefix]
    if not found and not groups:
        raise UsageError(f"unknown key {prefix}{nearest(prefix, [*known, *fragment_names()])}")
    lines = [line for group, names in groups.items() for line in _choice(group, names, width)]
    return lines + [
        line for name in found for line in _lines(known[name], values.get(name, known[name].default), width)
    ]


def _choice(group: str, names: Sequence[str], width: int) -> Iterator[str]:
    yield f"{group}=FRAGMENT"
    yield from _indented(f"values of conf/{group}/, or of a file: one of {', '.join(names)}", width)


def _lines(key: Key, value: Any, width: int) -> Iterator[str]:
    own = "" if value == key.default else f" (the schema's default: {as_typed(key.default)})"
    yield f"{key.name}={as_typed(value)}{own}"
    choices = f"; one of {', '.join(key.choices)}" if key.choices else ""
    for part in filter(None, (f"{key.kind}{choices}", key.meaning)):
        yield from _indented(part, width)


def _indented(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent="    ", subsequent_indent="    ")


def as_typed(value: Any) -> str:
    """A value as a command line takes it."""
    words = {"None": "null", "True": "true", "False": "false", "": "''"}
    return words.get(str(value), str(value))


def keys(schema: type, prefix: str = "") -> Iterator[Key]:
    """All keys of a dataclass and of those inside it, in the order of their fields."""
    said = meanings(schema)
    for field in fields(schema):
        kind, name = parts(schema)[field.name], f"{prefix}{field.name}"
        inner, _, _ = taken_apart(kind)
        if is_dataclass(inner):
            yield from keys(inner, f"{name}.")
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        named = {other.name for other in fields(schema)} if get_origin(inner) is dict else set()  # by keys beside it
        choices = tuple(choice for choice in _choices(name) if choice not in named)
        yield Key(name, in_words(kind), default, said.get(field.name, ""), choices)
        if get_origin(inner) is dict and is_dataclass(get_args(inner)[1]):
            yield from keys(get_args(inner)[1], f"{name}.NAME.")


def in_words(kind: Any) -> str:
    """A field's type and range."""
    kind, allowed, optional = taken_apart(kind)
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Literal:
        said = f"one of {', '.join(str(choice) or repr(choice) for choice in inside)}"
    elif origin is list:
        said = f"list of: {in_words(inside[0])}"
    elif origin is dict:
        said = f"mapping of names to: {'groups of keys' if is_dataclass(inside[1]) else in_words(inside[1])}"
    elif origin in (Union, UnionType):
        said = ", or ".join(in_words(choice) for choice in inside if choice is not type(None))
    else:
        said = WORDS[kind]
    limits = "" if allowed == FINITE else f"; {allowed}"
    return f"{said}{limits}{'; or null' if optional else ''}"


def _choices(name: str) -> tuple[str, ...]:
    """What may be named there, parts of plugins among it."""
    for registry in register.ALL:
        if name in (registry.key, f"model.{registry.key}"):
            registry.find_more()
            return tuple(registry.names())
    return ()


@lru_cache
def meanings(schema: type) -> Mapping[str, str]:
    """What the comments say of each field, inherited ones included.

    Comments in lines of their own belong to the field above, unless the one below has no other.
    """
    source = textwrap.dedent(inspect.getsource(schema))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}

    def within(first: int, last: int) -> list[str]:
        return [comments[line] for line in range(first, last + 1) if line in comments]

    said = {name: text for base in schema.__bases__ if is_dataclass(base) for name, text in meanings(base).items()}
    above, end = "", 0
    for node in ast.parse(source).body[0].body:
        name = node.target.id if isinstance(node, ast.AnnAssign) else ""
        loose, own = within(end + 1, node.lineno - 1), within(node.lineno, node.end_lineno)
        if name and not own:
            own, loose = loose, []
        for field, texts in ((above, loose), (name, own)):
            if field and texts:
                said[field] = " ".join([said.get(field, ""), *texts]).strip()
        above, end = name, node.end_lineno
    return said
