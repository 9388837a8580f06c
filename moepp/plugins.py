"""Plugins: modules of other people that register parts, by their name, by the path of a file, or installed.

A run keeps a copy of its plugins' sources beside its config, and their digests in it: what it was made with is part of
what it is. Every plugin is imported where a config that names it is read.
"""

import hashlib
import importlib
import importlib.util
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from moepp.errors import UsageError

GROUP = "moepp.plugins"  # of entry points: an installed package's plugins are found without being named
FOLDER = "plugins"  # of the copies, beside a run's config.yaml
_loaded: dict[str, "Plugin"] = {}  # by the name that a config gives


@dataclass(frozen=True)
class Plugin:
    """A plugin that this process has imported."""

    name: str  # as configs write it: a module's name, or the path of a file
    module: str  # its name in sys.modules
    source: Path  # a file, or the folder of a package
    digest: str

    @property
    def copy(self) -> Path:
        """Where its source is kept, below the folder of a run."""
        return Path(FOLDER, self.digest, self.source.name)


def import_plugins(
    names: str | Iterable[str], digests: Mapping[str, str] | None = None, folder: Path | None = None
) -> None:
    """Imports the plugins of those names, each once as long as its source does not change.

    Of a run, `digests` says what their sources were: where another stands there now, the copy in `folder` is imported.
    Raises UsageError for what cannot be found or imported.
    """
    for name in listed(names):
        wanted = (digests or {}).get(label(name))
        plugin = _find(name) if wanted is None else _find_again(name, wanted, folder)
        if name not in _loaded or _loaded[name].digest != plugin.digest:
            _import(plugin)


def listed(names: str | Iterable[str]) -> list[str]:
    """A config may name one plugin or several."""
    return [names] if isinstance(names, str) else list(names)


def label(name: str) -> str:
    """A plugin's name without where its file lies, which makes no other run."""
    return Path(name).stem if name.endswith(".py") else name


def digests(names: Iterable[str]) -> dict[str, str]:
    """16 hex digits of the source of each by its label, as it was imported."""
    import_plugins(name for name in names if name not in _loaded)
    return {label(name): _loaded[name].digest for name in names}


def sources() -> dict[str, str]:
    """As `digests`, of all plugins that this process has imported."""
    return digests(_loaded)


def keep(names: Iterable[str], folder: Path) -> None:
    """Copies their sources into `folder`, whence `load` takes them once they are gone or others."""
    for plugin in (_loaded[name] for name in names):
        target = folder / plugin.copy
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if plugin.source.is_dir():
            shutil.copytree(plugin.source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        else:
            shutil.copyfile(plugin.source, target)


def of_module(module: str) -> Plugin | None:
    """The plugin that a module is, or is a part of."""
    return next((p for p in _loaded.values() if module == p.module or module.startswith(f"{p.module}.")), None)


def owner(module: str) -> str:
    """The name of the plugin that a registered part's module belongs to.

    That is the module itself where it was imported by other means. Raises UsageError where a run could not find it.
    """
    if plugin := of_module(module):
        return plugin.name
    if module == "__main__" or getattr(sys.modules[module], "__file__", None) is None:
        raise UsageError(f"what {module} registers is lost with this process; put it into a file, and set plugins=FILE")
    return module


@cache
def load_installed() -> None:
    """Imports what installed packages name in the entry-point group."""
    import_plugins(point.value for point in entry_points(group=GROUP))


def _find(name: str) -> Plugin:
    if name.endswith(".py"):
        path = Path(name).expanduser().absolute()
        if not path.is_file():
            raise UsageError(f"plugins={name}: no such file")
        return Plugin(name, f"moepp_plugin_{path.stem}", path, _digest(path))
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # as `python -m` does, and an installed command does not
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        found = None
    if found is None or not found.has_location:  # Python's own parts have no source that a record could keep
        raise UsageError(f"plugins={name}: no module of that name can be imported; a file ends in .py")
    source = Path(found.origin)
    source = source.parent if source.name == "__init__.py" else source
    return Plugin(name, name, source, _digest(source))


def _find_again(name: str, digest: str, folder: Path | None) -> Plugin:
    if name in _loaded and _loaded[name].digest == digest:
        return _loaded[name]
    try:
        plugin = _find(name)
    except UsageError:
        plugin = None
    if plugin is not None and plugin.digest == digest:
        return plugin
    for source in (folder / FOLDER / digest).glob("*") if folder else ():
        if _digest(source) == digest:
            return Plugin(name, f"moepp_plugin_{source.stem}" if name.endswith(".py") else name, source, digest)
    raise UsageError(f"plugins={name} is gone or another than the run was made with ({digest}), and no copy is kept")


def _import(plugin: Plugin) -> None:
    init = plugin.source / "__init__.py" if plugin.source.is_dir() else plugin.source
    if plugin.name not in _loaded and getattr(sys.modules.get(plugin.module), "__file__", None) == str(init):
        _loaded[plugin.name] = plugin  # somebody has imported it
        return
    within = [str(plugin.source)] if plugin.source.is_dir() else None
    spec = importlib.util.spec_from_file_location(plugin.module, init, submodule_search_locations=within)
    module = importlib.util.module_from_spec(spec)
    for old in [m for m in sys.modules if m == plugin.module or m.startswith(f"{plugin.module}.")]:
        del sys.modules[old]
    sys.modules[plugin.module] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever somebody's module raises
        del sys.modules[plugin.module]
        reason = " ".join(str(error).split())
        raise UsageError(f"plugins={plugin.name}: cannot import {init}: {type(error).__name__}: {reason}") from error
    _loaded[plugin.name] = plugin


def _digest(source: Path) -> str:
    files = sorted(source.rglob("*.py")) if source.is_dir() else [source]
    found = hashlib.sha256()
    for file in files:
        name = str(file.relative_to(source)) if source.is_dir() else ""
        found.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()[:16]
