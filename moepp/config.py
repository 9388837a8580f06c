"""Joins the dataclass schema, conf/base.yaml, named fragments and `key=value` overrides into one typed config.

A folder in conf/ is a group and each YAML file in it a fragment: `size=tiny` merges conf/size/tiny.yaml at the root.
Groups merge in the order base.yaml lists them under `fragments`, so a later group refines an earlier one whatever the
order on the command line. A fragment may choose fragments of other groups, for when the command line does not. A
fragment of the same name below ./conf comes before the shipped one; base.yaml is always the shipped one.
"""

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, field, fields, is_dataclass, make_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from moepp import plugins
from moepp.errors import UsageError
from moepp.records import write_text
from moepp.shipped import CONF, first_file, names, overlaid

Schema = TypeVar("Schema")


def compose(schema: type[Schema], arguments: Iterable[str | Mapping[str, Any]], conf: Path = CONF) -> Schema:
    """A `schema` instance from defaults < base.yaml < fragments < overrides.

    `arguments` are `group=fragment` and `dotted.key=value` strings, or mappings shaped like the config (as sweep files
    write them); later ones win. Raises UsageError, in one line, for an unknown key or fragment, a wrong type, or values
    the dataclasses refuse.
    """
    base = _load(conf / "base.yaml")
    folders = overlaid(conf)
    groups = {group.name for folder in folders for group in folder.iterdir() if group.is_dir()}
    defaults, chosen, overrides = dict(base.pop("fragments", {})), {}, []
    for argument in arguments:
        if isinstance(argument, Mapping):
            overrides.append(OmegaConf.create(dict(argument)))
            continue
        key, equals, value = argument.partition("=")
        if not equals or not key:
            raise UsageError(f"'{argument}' is not an override; write key=value, for example model.top_k=2")
        if key in groups:
            chosen[key] = value
        else:
            overrides.append(_dotted(argument))
    fragments = _fragments(folders, defaults, chosen)
    return _join(schema, [OmegaConf.create(base), *fragments, *overrides], groups)


def compose_kind(group: str, kinds: Mapping[str, type], arguments: Iterable[str], conf: Path = CONF) -> Any:
    """An instance of one of `kinds`: what is configured beside the runs, from one fragment and `group.key=value` words.

    The fragment names its kind under `group.kind`; without a word `group=fragment` it is the first kind's own. Raises
    UsageError as `compose`.
    """
    name, overrides = next(iter(kinds)), []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == group:
            name = value
        else:
            overrides.append(_dotted(argument))
    values = _fragment(overlaid(conf), group, name).get(group, {})
    kind = values.pop("kind", None)
    if kind not in kinds:
        raise UsageError(f"{group}={name}: {group}.kind={kind}; choose from {', '.join(kinds)}")
    schema = make_dataclass(group, [(group, kinds[kind], field(default_factory=kinds[kind]))])
    layers = [OmegaConf.create({group: values} if values else {}), *overrides]
    return getattr(_join(schema, layers), group)


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
    kept = {key: value for key, value in _chosen(config, type(config)()) if not _lies_in(key, ignored)}
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
    return dict(_chosen(value, type(value)())) if is_dataclass(value) else value


def differences(saved: Mapping[str, Any], config: Any, ignore: Iterable[str]) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (saved, now)} of every value that a saved config and this one do not share, beside what `ignore`
    lists. A key that the saved one lacks has its default there; one that the schema has lost counts for nothing.
    """
    ignored, defaults = tuple(ignore), flatten(type(config)())
    now, before = flatten(config), defaults | dict(leaves(saved))
    open_ended = tuple(key for key, value in defaults.items() if isinstance(value, Mapping))
    keys = [key for key in before | now if key in now or _lies_in(key, open_ended)]
    pairs = {key: (before.get(key), now.get(key)) for key in keys if not _lies_in(key, ignored)}
    return {key: (old, new) for key, (old, new) in pairs.items() if old != new and {} not in (old, new)}


def _lies_in(key: str, groups: Iterable[str]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def _load(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise UsageError(f"no config file {path}") from None
    except (OSError, YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, DictConfig):
        raise UsageError(f"{path} must hold keys and values")
    return loaded


def _fragments(folders: Sequence[Path], defaults: Mapping[str, str], chosen: Mapping[str, str]) -> list[DictConfig]:
    """The fragments in merge order. A chosen one may itself list `fragments` for groups that were not chosen."""
    loaded = {group: _fragment(folders, group, name) for group, name in chosen.items()}
    implied = {group: name for layer in loaded.values() for group, name in layer.pop("fragments", {}).items()}
    wanted = {**defaults, **implied, **chosen}
    return [loaded[group] if group in loaded else _fragment(folders, group, name) for group, name in wanted.items()]


def _fragment(folders: Sequence[Path], group: str, name: str) -> DictConfig:
    path = first_file(folders, f"{group}/{name}.yaml")
    if path is None:
        known = names(folder / group for folder in folders)
        raise UsageError(f"{group}={name}: no such fragment; choose from {', '.join(known)}{_nearest(name, known)}")
    return _load(path)


def _dotted(argument: str) -> DictConfig:
    try:
        return OmegaConf.from_dotlist([argument])
    except (OmegaConfBaseException, YAMLError) as error:
        raise UsageError(f"cannot read '{argument}': {' '.join(str(error).split())}") from None


def _join(
    schema: type[Schema], layers: Sequence[DictConfig], groups: Iterable[str] = (), folder: Path | None = None
) -> Schema:
    """Merges the layers over the schema's defaults; `groups` are names that a misspelt key may have meant."""
    known, defaults = _defaults(schema)
    try:
        for layer in layers:
            _refuse_unknown_keys(layer, known, groups)
        # Each merge copies its first argument, and a typed config costs twenty times what an untyped one does.
        merged = OmegaConf.merge(defaults, OmegaConf.merge(*layers))
        if "plugin_sources" in known:  # before the names that they register are checked
            plugins.load(merged.plugins, merged.plugin_sources, folder)
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UsageError(f"{getattr(error, 'full_key', None) or 'config'}: {str(error).splitlines()[0]}") from None
    except ValueError as error:  # raised by a dataclass that refuses its values
        raise UsageError(str(error)) from None


@lru_cache(maxsize=16)
def _defaults(schema: type) -> tuple[dict[str, Any], DictConfig]:
    """The schema's flat keys with their defaults, and its typed config; both only to be read."""
    return flatten(schema()), OmegaConf.structured(schema)


def _refuse_unknown_keys(layer: DictConfig, known: Mapping[str, Any], groups: Iterable[str]) -> None:
    for key, _ in leaves(OmegaConf.to_container(layer)):
        inside = [leaf for leaf in known if leaf.startswith(f"{key}.")]
        if inside:
            raise UsageError(f"{key} is a group of keys; set one of {', '.join(inside)}")
        if key not in known and not any(key.startswith(f"{leaf}.") for leaf in known):
            raise UsageError(f"unknown key {key}{_nearest(key, [*known, *groups])}")


def leaves(node: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """(dotted key, value) of everything in nested mappings that is no mapping, or an empty one."""
    if isinstance(node, Mapping) and (node or not prefix):
        for key, value in node.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def _nearest(name: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""
