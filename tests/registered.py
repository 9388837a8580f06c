"""Plugins of a test, and what it registers kept from the next."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent

from moepp import plugins, register
from moepp.layers.registry import Registry

REGISTRIES = [registry for registry in vars(register).values() if isinstance(registry, Registry)]


@contextmanager
def forgotten() -> Iterator[None]:
    before = [dict(registry._parts) for registry in REGISTRIES]
    modules, loaded = set(sys.modules), dict(plugins._loaded)
    plugins._loaded.clear()
    try:
        yield
    finally:
        for registry, parts in zip(REGISTRIES, before, strict=True):
            registry._parts = {
                name: part for name, part in registry._parts.items() if name in {*registry.defined, *parts}
            }
        plugins._loaded.clear()
        plugins._loaded.update(loaded)
        plugins.load_installed.cache_clear()
        for name in [name for name in set(sys.modules) - modules if name.startswith("moepp_plugin_")]:
            del sys.modules[name]


def plugin(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.py"
    path.write_text(dedent(text))
    return str(path)
