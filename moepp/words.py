"""YAML between a person and a schema: where the schema says str, the word is the value, whatever it looks like.

Scalars are YAML 1.2's, so `no`, `12:30`, `007` and dates are words. What stands without quotes keeps its spelling until
the schema says what it is: a commit `4e10293` and a version `3.10` are themselves where they belong into a str.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from functools import partial
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

import yaml
from yaml.constructor import ConstructorError

from moepp.errors import UsageError
from moepp.layers.bounds import parts, taken_apart

TAG = "tag:yaml.org,2002:"
LONGEST_SHOWN = 200  # characters of a value that is refused
DEEPEST = 50  # of lists in lists, and mappings
# More than ${another.key}: what could read the environment or run code, and what becomes a reference once it is saved.
RESOLVER = re.compile(r"\$\{[^}]*(:|\$\{)|\\\$\{")


@dataclass(frozen=True)
class Plain:
    """A scalar without quotes that YAML takes for something else than a string."""

    word: str
    value: Any


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Its mappings have strings for keys, each of them once."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        self._check_keys(node)
        self.flatten_mapping(node)  # merge keys: <<: *anchor
        return super().construct_mapping(node, deep)

    def _check_keys(self, node: yaml.MappingNode) -> None:
        names = [key for key, _ in node.value if key.tag != f"{TAG}merge"]
        for number, key in enumerate(names):
            if key.tag != f"{TAG}str":
                name = key.value if isinstance(key, yaml.ScalarNode) else "[...]"
                raise ConstructorError(None, None, f"the name {name} is no string; write it in quotes", key.start_mark)
            if any(key.value == other.value for other in names[:number]):
                raise ConstructorError(None, None, f"{key.value} stands there twice", key.start_mark)


SCALARS: tuple[tuple[str, str, str, Callable[[str], Any]], ...] = (
    ("null", r"~|null|Null|NULL|", "~nN", lambda word: None),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF", lambda word: word[0] in "tT"),
    ("int", r"[-+]?(?:0|[1-9][0-9]{0,200}(?:_[0-9]{1,9})*)", "-+0123456789", int),
    ("int", r"0x[0-9a-fA-F]{1,200}", "0", partial(int, base=16)),
    (
        "float",
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
        lambda word: float(re.sub(r"\.(?=[iInN])", "", word)),
    ),
)


def _construct(loader: _Loader, node: yaml.ScalarNode) -> Any:
    for tag, pattern, _, value in SCALARS:
        if node.tag == f"{TAG}{tag}" and re.fullmatch(pattern, node.value):
            return Plain(node.value, value(node.value))
    raise ConstructorError(None, None, f"{node.value} is no {node.tag.removeprefix(TAG)}", node.start_mark)


for _tag, _pattern, _first, _ in SCALARS:
    _Loader.add_implicit_resolver(f"{TAG}{_tag}", re.compile(rf"(?:{_pattern})$"), [*_first, ""])
    _Loader.add_constructor(f"{TAG}{_tag}", _construct)
_Loader.add_implicit_resolver(f"{TAG}merge", re.compile("<<$"), ["<"])


def read(text: str | bytes) -> Any:
    """YAML as mappings, lists, strings and `Plain`. Raises UsageError, in one line that says where."""
    try:
        _refuse_depth(text)
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else loader.construct_object(node, deep=True)  # deep: no anchor within itself
    except yaml.reader.ReaderError as error:
        begin = text[: error.position] if isinstance(error.position, int) else text[:0]
        line = 1 + begin.count("\n" if isinstance(begin, str) else b"\n")
        raise UsageError(f"line {line}: {' '.join(str(error.reason).split())}") from None
    except (yaml.YAMLError, ValueError, UnicodeDecodeError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        where = f"line {mark.line + 1}: " if mark else ""
        raise UsageError(where + " ".join(problem.split())) from None


def _refuse_depth(text: str | bytes) -> None:
    """libyaml follows nesting down the stack, and beyond its end."""
    depth = 0
    for event in yaml.parse(text, _Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ConstructorError(None, None, f"nested more than {DEEPEST} deep", event.start_mark)


def layer(key: str, word: str, schema: type) -> dict[str, Any]:
    """What `key=word` sets, as nested mappings. Raises UsageError as `read`."""
    names, kind = _path(key, schema)
    try:
        return _nest(names, _as_typed(word, kind))
    except UsageError as error:
        raise UsageError(f"cannot read '{key}={word}': {error}") from None


def meant(value: Any, kind: Any, key: str = "") -> Any:
    """What was read, as the schema takes it; dotted keys of a config are mappings in mappings.

    Raises UsageError for what asks for more than another key's value.
    """
    kind, _, optional = taken_apart(kind)
    _refuse_other_shape(value, kind, optional, key)
    if isinstance(value, Mapping):
        if is_dataclass(kind):
            found: dict[str, Any] = {}
            for name, item in value.items():
                names, part = _path(name, kind)
                found = merged(found, _nest(names, meant(item, part, f"{key}.{name}".lstrip("."))))
            return found
        part = get_args(kind)[1] if get_origin(kind) is dict else Any
        return {name: meant(item, part, f"{key}.{name}".lstrip(".")) for name, item in value.items()}
    if isinstance(value, list):
        return [meant(item, _item(kind), key) for item in value]
    if isinstance(value, Plain):
        is_word = _is_text(kind) and not (optional and value.value is None)
        value = value.word if is_word else value.value
    if kind is str and isinstance(value, bool | float):
        raise UsageError(f"{key}={value} is no string; write it in quotes")
    if value == "???":
        raise UsageError(f"{key}=??? stands for a value that is missing; give one")
    if isinstance(value, str) and RESOLVER.search(value):
        raise UsageError(f"{key}={value}: a value may refer to another key, as ${{model.dim}}, and to nothing else")
    return value


def _refuse_other_shape(value: Any, kind: Any, optional: bool, key: str) -> None:
    """A list where there must be a mapping, and the like; a reference to another key may be anything."""
    shape = {list: "a list, as [a, b]", dict: "keys and values, as {a: 1}"}.get(get_origin(kind))
    empty = isinstance(value, Plain) and value.value is None
    refers = isinstance(value, str) and value.startswith("${")
    if shape and not (isinstance(value, get_origin(kind)) or refers or (optional and (empty or value is None))):
        raise UsageError(f"{key}={_shown(value)} must be {shape}")
    if is_dataclass(kind) and not (isinstance(value, Mapping) or (optional and (empty or value is None))):
        raise UsageError(f"{key} is a group of keys; set one of {', '.join(f'{key}.{name}' for name in parts(kind))}")
    if kind in (str, int, float, bool) and isinstance(value, Mapping | list):
        raise UsageError(f"{key}={_shown(value)} must be a single {kind.__name__}")


def _shown(value: Any) -> str:
    """As it was written, as far as that helps."""
    text = str(meant(value, Any))
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def allowed(schema: type, key: str) -> str:
    """What a single value under the key may be, in words; empty where that is not known."""
    kind, _, optional = taken_apart(_path(key, schema)[1])
    said = _in_words(kind)
    return f"{said}, or null" if said and optional else said


def _in_words(kind: Any) -> str:
    kind = taken_apart(kind)[0]
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_in_words(choice) for choice in get_args(kind) if choice is not NoneType)
    if get_origin(kind) is list:
        return f"a list, each {_in_words(get_args(kind)[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, "")


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings over others; whatever else stands above replaces what stands below."""
    both = {
        name: merged(below[name], item)
        for name, item in above.items()
        if isinstance(item, Mapping) and isinstance(below.get(name), Mapping)
    }
    return {**below, **above, **both}


def _path(key: str, kind: Any) -> tuple[list[str], Any]:
    """The names of a dotted key, and the type of what it names; a single name where it is no key."""
    names, rest = [], key
    while rest:
        kind = taken_apart(kind)[0]
        single = get_origin(kind) is dict and get_args(kind)[1] is not Any and not is_dataclass(get_args(kind)[1])
        name, _, rest = (rest, "", "") if single else rest.partition(".")
        names.append(name)
        inside = get_args(kind)[1] if get_origin(kind) is dict else Any
        kind = parts(kind).get(name, Any) if is_dataclass(kind) else inside
    return (names, kind) if ".".join(names) == key else ([key], Any)


def _nest(names: list[str], value: Any) -> dict[str, Any]:
    for name in reversed(names):
        value = {name: value}
    return value


def _as_typed(word: str, kind: Any) -> Any:
    """What a word of the command line is where a value of that type belongs."""
    kind, _, optional = taken_apart(kind)
    if not _is_text(kind):
        return read(word)
    if _item(kind) is not Any and word.startswith("["):
        with suppress(UsageError):
            return found if isinstance(found := read(word), list) else word
    return None if optional and word in ("null", "~", "") else word


def _is_text(kind: Any) -> bool:
    """Whether a word stands for itself: str, str among others, a choice."""
    among = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return str in among or (get_origin(kind) is Literal and isinstance(get_args(kind)[0], str))


def _item(kind: Any) -> Any:
    """The type of a list's items, also of a list among others."""
    lists = [choice for choice in (kind, *get_args(kind)) if get_origin(choice) is list]
    return get_args(lists[0])[0] if lists else Any
