"""Makes a config of plain values, each as its type in the schema takes it.

OmegaConf knows the types, and takes tens of milliseconds for a whole config: a sweep composes a thousand that differ in
a value or two. Each value is therefore converted by itself, and once.
"""

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache, reduce
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf, UnionNode, ValueNode

from moepp.layers.bounds import parts, taken_apart

Schema = TypeVar("Schema")
REFERENCE = re.compile(r"\$\{([\w.]+)\}", re.ASCII)  # to another key
MARKS = ("${", "???")  # of what only a whole config can resolve


class NeedsWhole(Exception):
    """These values are not independent of each other: OmegaConf must see all of them."""


def make(schema: type[Schema], plain: Mapping[str, Any]) -> Schema:
    """What `OmegaConf.to_object` makes of nested mappings merged over the schema. Raises NeedsWhole, what OmegaConf
    raises of a value, and what the dataclasses do.
    """
    return _make(schema, schema, _resolved(plain, plain, schema), ())


def value(schema: type, names: tuple[str, ...], given: Any) -> Any:
    """One value under the key with these names."""
    if isinstance(given, Mapping | list):
        text = json.dumps(given)
        _refuse_references(text)
        return copy.deepcopy(_container(schema, names, text))
    _refuse_references(given)
    return _scalar(schema, names, given)


def _refuse_references(text: Any) -> None:
    if isinstance(text, str) and any(mark in text for mark in MARKS):
        raise NeedsWhole


def _resolved(item: Any, plain: Mapping[str, Any], schema: type) -> Any:
    """With the values of the keys that are referred to, `${model.dim}`, in place of the references."""
    if isinstance(item, Mapping):
        return {name: _resolved(part, plain, schema) for name, part in item.items()}
    found = REFERENCE.fullmatch(item) if isinstance(item, str) else None
    return _resolved(_looked_up(found[1].split("."), plain, schema), plain, schema) if found else item


def _looked_up(names: list[str], plain: Any, schema: type) -> Any:
    for name in names:
        plain = plain.get(name, MISSING) if isinstance(plain, Mapping) else MISSING
    found = _default(schema, tuple(names)) if plain is MISSING else plain
    if isinstance(found, Mapping) or is_dataclass(found):
        raise NeedsWhole
    return found


@lru_cache(maxsize=64)
def _default(schema: type, names: tuple[str, ...]) -> Any:
    return reduce(getattr, names, schema())


def _make(root: type, schema: type, plain: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    given = {}
    for name, item in plain.items():
        part = _part(schema, name)
        inside = part is not None and isinstance(item, Mapping)
        given[name] = _make(root, part, item, (*names, name)) if inside else value(root, (*names, name), item)
    return schema(**given)


@lru_cache(maxsize=256)
def _part(schema: type, name: str) -> type | None:
    """The dataclass of a field whose values lie over that dataclass's own defaults."""
    kind = taken_apart(parts(schema)[name])[0]
    if not is_dataclass(kind):
        return None
    (field,) = (field for field in fields(schema) if field.name == name)
    if field.default_factory is not kind:
        raise NeedsWhole
    return kind


@lru_cache(maxsize=4096, typed=True)
def _scalar(schema: type, names: tuple[str, ...], given: Any) -> Any:
    node = _node(schema, names)
    if isinstance(node, UnionNode):  # which of its types this is, a merge finds out
        return _container(schema, names, json.dumps(given))
    if not isinstance(node, ValueNode) or (given is None and not node._is_optional()):
        raise NeedsWhole
    return None if given is None else node.validate_and_convert(given)


@lru_cache(maxsize=1024)
def _container(schema: type, names: tuple[str, ...], text: str) -> Any:
    nested = json.loads(text)
    for name in reversed(names):
        nested = {name: nested}
    found = OmegaConf.select(OmegaConf.merge(structured(schema), nested), ".".join(names))
    return OmegaConf.to_object(found) if OmegaConf.is_config(found) else found


def _node(schema: type, names: tuple[str, ...]) -> Any:
    node = structured(schema)
    for name in names:
        node = node._get_node(name)
    return node


@lru_cache(maxsize=16)
def structured(schema: type) -> DictConfig:
    """The schema with its defaults, only to be read."""
    return OmegaConf.structured(schema)
