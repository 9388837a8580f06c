"""conf/, sweeps/ and experiments/: those that moepp ships, and a user's own in the current directory, which come first.

A checkout keeps the shipped ones at its top level, a wheel inside the package (pyproject.toml).
"""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
SHIPPED = next(folder for folder in (PACKAGE / "_shipped", PACKAGE.parent) if folder.is_dir())
YAML = (".yaml", ".yml")
CONF, SWEEPS, EXPERIMENTS = (SHIPPED / name for name in ("conf", "sweeps", "experiments"))


def overlaid(shipped: Path) -> list[Path]:
    """`shipped`, after the user's folder of that name where the current directory has another."""
    own = Path(shipped.name)
    return [own, shipped] if own.is_dir() and not own.samefile(shipped) else [shipped]


def first_file(folders: Iterable[Path], *names: str) -> Path | None:
    """The file of one of these names in the first folder that has one."""
    return next((path for folder in folders for name in names if (path := folder / name).is_file()), None)


def first_yaml(folders: Iterable[Path], name: str) -> Path | None:
    return first_file(folders, *(name + ending for ending in YAML))


def names(folders: Iterable[Path]) -> list[str]:
    """What can be asked for by name: the YAML files of all folders, each once."""
    return sorted({name for folder in folders if folder.is_dir() for name in _names(folder, folder.stat().st_mtime_ns)})


@lru_cache(maxsize=256)
def _names(folder: Path, changed: int) -> list[str]:
    """As the folder is now; each of a thousand trials asks for them."""
    return [path.stem for ending in YAML for path in folder.glob(f"*{ending}")]
