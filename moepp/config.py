"""Joins the dataclass schema, conf/base.yaml, named fragments and `key=value` overrides into one typed config.

A folder in conf/ is a group and each YAML file in it a fragment: `size=tiny` merges conf/size/tiny.yaml at the root,
`size=/any/folder/mine.yaml` that file.
Groups merge in the order base.yaml lists them under `fragments`, so a later group refines an earlier one whatever the
order on the command line. A fragment may choose fragments of other groups, for when the command line does not. A
fragment of the same name below ./conf comes before the shipped one; base.yaml is always the shipped one.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, field, fields, is_dataclass, make_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moepp import plugins, typed, words
from moepp.errors import UsageError, reason
from moepp.layers.bounds import refusals
from moepp.records import write_text
from moepp.shipped import CONF, YAML, first_yaml, names, overlaid

Schema = TypeVar("Schema")


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Names and values that are told as they were written may hold line breaks."""
    try:
        yield
    except UsageError as error:
        raise UsageError(" ".join(str(error).split())) from None


@_in_one_line()
def compose(
    schema: type[Schema], arguments: Iterable[str | Mapping[str, Any]], conf: Path = CONF, base: Path | None = None
) -> Schema:
    """A `schema` instance from defaults < base.yaml < fragments < overrides.

    `arguments` are `group=fragment` and `dotted.key=value` strings, or mappings shaped like the config (as sweep files
    write them); later ones win. `base` is a file in place of base.yaml, such as a run's config. Raises UsageError, in
    one line, for an unknown key or fragment, a wrong type, values the dataclasses refuse, or what the schema's
    `check_new` refuses of a config that is not read from a record.
    """
    begun, folders = _load(base or conf / "base.yaml"), overlaid(conf)
    groups = fragment_names(conf)
    defaults, chosen, overrides = _implied(begun, base or conf / "base.yaml"), {}, []
    for argument in arguments:
        if isinstance(argument, Mapping):
            overrides.append(argument)
            continue
        key, value = _override(argument)
        if key in groups:
            chosen[key] = value
        else:
            overrides.append(words.layer(key, value, schema))
    fragments = _fragments(folders, defaults, chosen)
    config = _join(schema, [begun, *fragments, *overrides], groups, base and base.parent)
    try:
        getattr(config, "check_new", lambda: None)()
    except ValueError as error:
        raise UsageError(str(error)) from None
    return config


def fragment_names(conf: Path = CONF) -> dict[str, list[str]]:
    """The fragments of every group by name."""
    folders = overlaid(conf)
    groups = {group.name for folder in folders for group in folder.iterdir() if group.is_dir()}
    return {group: names(folder / group for folder in folders) for group in sorted(groups)}


@_in_one_line()
def compose_kind(group: str, kinds: Mapping[str, type], arguments: Iterable[str], conf: Path = CONF) -> Any:
    """An instance of one of `kinds`: what is configured beside the runs, from one fragment and `group.key=value` words.

    The fragment names its kind under `group.kind`; without a word `group=fragment` it is the first kind's own. Raises
    UsageError as `compose`.
    """
    overrides = [_override(argument) for argument in arguments]
    name = ([next(iter(kinds))] + [value for key, value in overrides if key == group])[-1]
    values = _mapping(_fragment(overlaid(conf), group, name).get(group, {}), f"{group}={name}: {group}")
    kind = str(values.get("kind"))
    if kind not in kinds:
        raise UsageError(f"{group}={name}: {group}.kind={kind}; choose from {', '.join(kinds)}")
    schema = make_dataclass(group, [(group, kinds[kind], field(default_factory=kinds[kind]))])
    own = {key: value for key, value in values.items() if key != "kind"}
    layers = [words.layer(key, value, schema) for key, value in overrides if key != group]
    return getattr(_join(schema, [{group: own} if own else {}, *layers]), group)


@_in_one_line()
def load(schema: type[Schema], path: Path) -> Schema:
    """The config that `save` froze. Raises UsageError in one line that begins with the path."""
    layer = _load(path)
    try:
        return _join(schema, [layer], folder=path.parent)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def save(config: Any, path: Path) -> None:
    """Writes the resolved config as YAML, and its plugins' sources beside it."""
    plugins.keep(getattr(config, "plugins", ()), path.parent)
    write_text(path, OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True))


def flatten(config: Any) -> dict[str, Any]:
    """`{"model.top_k": 2, ...}`: every leaf of the config by its dotted key."""
    return dict(leaves(asdict(config)))  # a tenth of the time that OmegaConf takes, which counts in a thousand trials


def identity(config: Any, ignore: Iterable[str]) -> str:
    """12 hex digits of everything that can change the result; `ignore` lists dotted keys or prefixes that cannot.

    What equals the schema's default is left out, so that a new key gives no finished run another identity. A default
    that changes does: `differences` tells such a run from the one that is asked for now.
    """
    ignored = tuple(ignore)
    kept = {key: value for key, value in _chosen(config, _default(type(config))) if not lies_in(key, ignored)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _chosen(value: Any, default: Any, key: str = "") -> Iterable[tuple[str, Any]]:
    """(dotted key, value) of what differs from the default; a mapping counts as a whole."""
    if is_dataclass(value) and type(value) is type(default):
        for part in fields(value):
            inside = f"{key}.{part.name}" if key else part.name
            yield from _chosen(getattr(value, part.name), getattr(default, part.name), inside)
    elif value != default:
        yield key, _shortened(value)


def _shortened(value: Any) -> Any:
    """Plain data that says of a dataclass, such as one source of a mixture, only what differs from its defaults."""
    if isinstance(value, Mapping):
        return {name: _shortened(item) for name, item in value.items()}
    return dict(_chosen(value, _default(type(value)))) if is_dataclass(value) else value


def differences(saved: Mapping[str, Any], config: Any, ignore: Iterable[str]) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (saved, now)} of every value that a saved config and this one do not share, beside what `ignore`
    lists. A key that the saved one lacks has its default there; one that the schema has lost counts for nothing.
    """
    ignored, defaults = tuple(ignore), _defaults(type(config))
    now, before = flatten(config), defaults | dict(leaves(saved))
    open_ended = tuple(key for key, value in defaults.items() if isinstance(value, Mapping))
    keys = [key for key in before | now if key in now or lies_in(key, open_ended)]
    pairs = {key: (before.get(key), now.get(key)) for key in keys if not lies_in(key, ignored)}
    return {key: (old, new) for key, (old, new) in pairs.items() if old != new and {} not in (old, new)}


def lies_in(key: str, groups: Iterable[str]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def _load(path: Path) -> dict[str, Any]:
    try:
        stat = path.stat()
        return _mapping(_read(path, stat.st_mtime_ns, stat.st_size), "the file")
    except FileNotFoundError:
        raise UsageError(f"no config file {path}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {reason(error)}") from None
    except UsageError as error:
        raise UsageError(f"cannot read {path}: {error}") from None


@lru_cache(maxsize=64)
def _read(path: Path, changed: int, size: int) -> Any:
    """A file as it is now; a thousand trials read the same few."""
    return words.read(path.read_bytes())


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UsageError(f"{what} must hold keys and values")
    return dict(value)


def _override(argument: Any) -> tuple[str, str]:
    key, equals, value = argument.partition("=") if isinstance(argument, str) else ("", "", "")
    if not equals or not key:
        raise UsageError(f"'{argument}' is not an override; write key=value, for example model.top_k=2")
    return key, value


def _fragments(folders: Sequence[Path], defaults: Mapping[str, str], chosen: Mapping[str, str]) -> list[dict[str, Any]]:
    """The fragments in merge order. A chosen one may itself list `fragments` for groups that were not chosen."""
    loaded = {group: _fragment(folders, group, name) for group, name in chosen.items()}
    implied: dict[str, str] = {}
    for group, layer in loaded.items():
        implied |= _implied(layer, f"{group}={chosen[group]}")
    wanted = {**defaults, **implied, **chosen}
    return [loaded[group] if group in loaded else _fragment(folders, group, name) for group, name in wanted.items()]


def _implied(layer: dict[str, Any], where: Any) -> dict[str, str]:
    """Takes the fragments that a file chooses out of it."""
    return words.meant(_mapping(layer.pop("fragments", {}), f"{where}: fragments"), dict[str, str])


def _fragment(folders: Sequence[Path], group: str, name: str) -> dict[str, Any]:
    if name.endswith(YAML):
        return _load(Path(name).expanduser())
    if name not in (known := names(folder / group for folder in folders)):
        raise UsageError(f"{group}={name}: no such fragment; choose from {', '.join(known)}{nearest(name, known)}")
    return _load(first_yaml(folders, f"{group}/{name}"))


def _join(
    schema: type[Schema],
    layers: Sequence[Mapping[str, Any]],
    groups: Iterable[str] = (),
    folder: Path | None = None,
) -> Schema:
    """Merges the layers over the schema's defaults; `groups` are names that a misspelt key may have meant."""
    known = _defaults(schema)
    plain: dict[str, Any] = {}
    for layer in layers:
        layer = words.meant(layer, schema)
        _refuse_unknown_keys(layer, known, groups)
        plain = words.merged(plain, layer)
    with suppress(Exception):  # that OmegaConf, which sees the whole, says in its own words
        return _made(schema, plain, folder)
    try:
        merged = OmegaConf.merge(typed.structured(schema), OmegaConf.create(plain))
        if "plugin_sources" in known:  # before the names that they register are checked
            plugins.import_plugins(merged.plugins, merged.plugin_sources, folder)
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UsageError(_refused(schema, plain, error)) from None
    except OverflowError:
        raise UsageError("a number of the config is too large") from None
    except ValueError as error:  # raised by a dataclass that refuses its values, by names of its own for the keys
        said = str(error)
        with suppress(OmegaConfBaseException):  # a reference to no key, which is then not what was refused first
            said = next(refusals(schema, OmegaConf.to_container(merged, resolve=True)), said)
        raise UsageError(_with_whole_key(said, known)) from None


def _refused(schema: type, plain: Mapping[str, Any], error: OmegaConfBaseException) -> str:
    """Of a value that is of no use where it stands: key, value and what is allowed."""
    key = getattr(error, "full_key", None) or ""
    said, given = words.allowed(schema, key), dict(leaves(plain))
    if said and key in given and "${" not in str(given[key]):
        return f"{key}={'null' if given[key] is None else given[key]} must be {said}"
    return f"{key or 'config'}: {str(error).splitlines()[0]}"


def _with_whole_key(said: str, known: Iterable[str]) -> str:
    """What a part of the config says of its own key, with the groups that the key lies in, where only one has it."""
    found = re.match(r"[a-z]\w*(?:\.\w+)*(?=[=:])", said)
    if not found or found[0].partition(".")[0] in {key.partition(".")[0] for key in known}:
        return said
    own = [found[0], *(found[0][: dot.start()] for dot in re.finditer(r"\.", found[0]))]  # options lie in what is named
    groups = {key[: -len(name)] for key in known for name in own if key.endswith(f".{name}")}
    return groups.pop() + said if len(groups) == 1 else said


def _made(schema: type[Schema], plain: Mapping[str, Any], folder: Path | None) -> Schema:
    if "plugins" in plain:
        plugins.import_plugins(typed.value(schema, ("plugins",), plain["plugins"]), plain.get("plugin_sources"), folder)
    return typed.make(schema, plain)


@lru_cache(maxsize=16)
def _defaults(schema: type) -> dict[str, Any]:
    """The schema's flat keys with their defaults, only to be read."""
    return flatten(_default(schema))


@lru_cache(maxsize=64)
def _default(schema: type) -> Any:
    """Only to be read, too."""
    return schema()


def _refuse_unknown_keys(layer: Mapping[str, Any], known: Mapping[str, Any], groups: Iterable[str]) -> None:
    for key, _ in leaves(layer):
        if key in groups and key not in known:
            raise UsageError(f"{key} chooses a fragment and is no key: write it as a word of a list, [{key}=NAME]")
        if key not in known and not any(lies_in(key, [leaf]) or lies_in(leaf, [key]) for leaf in known):
            raise UsageError(f"unknown key {key}{nearest(key, [*known, *groups])}")


def leaves(node: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """(dotted key, value) of everything in nested mappings that is no mapping, or an empty one."""
    if isinstance(node, Mapping) and (node or not prefix):
        for key, value in node.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name whose last component is most like this one's; what stands before it decides among equals."""
    own = name.rpartition(".")[2]

    def ratio(*pair: str) -> float:
        return difflib.SequenceMatcher(None, *pair).ratio()

    def likeness(other: str) -> tuple[bool, bool, float]:
        last = other.rpartition(".")[2]
        return last == own, last.startswith(own), ratio(own, last) + (ratio(name, other) if "." in name else 0.5)

    closest = max(known, key=likeness, default="")
    return f"; did you mean {closest}?" if likeness(closest) >= (False, False, 1.1) else ""
