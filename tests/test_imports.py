"""Arrows point downward only: each package alone loads nothing above it, and nothing imports in a circle."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "moepp"
ORDER = (  # lowest first; what shares a line does not know each other
    ("addresses", "names", "program"),
    ("shipped", "errors", "locks"),
    ("records", "lfs"),
    ("experiments",),  # finds the files of experiments/, and imports none until it is asked to
    ("plugins", "process"),
    ("layers",),  # plain torch: it stands alone
    ("words", "typed"),
    ("config",),
    ("register",),
    ("keys",),
    ("models",),
    ("retrofit",),
    ("data",),
    ("statistics",),
    ("strategies",),
    ("tracking",),
    ("training",),
    ("sweeps",),
    ("evaluation",),
    ("reports",),
    ("routing",),
    ("benchmarks",),
    ("demo", "grammar"),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
MODULES = {
    ".".join(("moepp", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
    if "_shipped" not in path.parts
}


def imports(module: str) -> set[str]:
    """Modules of moepp that this one names, in functions and for annotations too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moepp"):
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("moepp")}
    return (found & MODULES.keys()) - {module, "moepp"}


def package(module: str) -> str:
    return module.split(".")[1]


GRAPH = {module: imports(module) for module in MODULES if module != "moepp"}


def test_every_package_has_its_place():
    assert {package(module) for module in GRAPH} == set(RANK)


@pytest.mark.parametrize("name", sorted(RANK))
def test_a_package_names_nothing_above_it(name):
    arrows = {(module, used) for module in GRAPH if package(module) == name for used in GRAPH[module]}
    upward = {(a, b) for a, b in arrows if package(b) != name and RANK[package(b)] >= RANK[name]}
    assert not upward


def test_no_modules_import_each_other_in_a_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("name", sorted(RANK.keys() - {"cli"}))
def test_a_package_alone_loads_nothing_above_it(name):
    """In a fresh interpreter, with every module of the package that no extra is needed for."""
    modules = [module for module in GRAPH if package(module) == name]
    script = (
        "import sys, importlib\n"
        f"for name in {modules}:\n"
        "    try: importlib.import_module(name)\n"
        "    except ImportError as error:\n"
        "        if (error.name or '').startswith('moepp'): raise\n"
        "print(*{name.split('.')[1] for name in sys.modules if name.startswith('moepp.')})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    assert not [other for other in done.stdout.split() if other != name and RANK[other] >= RANK[name]]
