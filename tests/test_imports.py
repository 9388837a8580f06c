"""Arrows point downward only: each package alone loads nothing above it, and nothing imports in a circle."""

import ast
import json
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "moepp"
ORDER = (  # lowest first; what shares a line does not know each other
    ("addresses", "names", "program", "ranges", "terminal"),
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
    ("pretrain",),
    ("sweeps",),
    ("evaluation",),
    ("reports",),
    ("routing",),
    ("benchmarks",),
    ("demo", "grammar"),
    ("options",),
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


@cache
def graph() -> dict[str, set[str]]:
    return {module: imports(module) for module in MODULES if module != "moepp"}


def test_every_package_has_its_place():
    assert {package(module) for module in graph()} == set(RANK)


@pytest.mark.parametrize("name", sorted(RANK))
def test_a_package_names_nothing_above_it(name):
    arrows = {(module, used) for module, names in graph().items() if package(module) == name for used in names}
    upward = {(a, b) for a, b in arrows if package(b) != name and RANK[package(b)] >= RANK[name]}
    assert not upward


def test_no_modules_import_each_other_in_a_circle():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


ALONE = """
import importlib, json, os, sys
import lightning.pytorch, matplotlib.pyplot, mlflow, torch  # shared by the forks; of moepp nothing is loaded
def loaded(modules):
    for module in modules:
        try: importlib.import_module(module)
        except ImportError as error:  # of an extra that is not installed
            if (error.name or "").startswith("moepp"): raise
    return sorted({name.split(".")[1] for name in sys.modules if name.startswith("moepp.")})
for name, modules in json.load(sys.stdin).items():
    if not os.fork():
        print(json.dumps([name, loaded(modules)]), flush=True)
        os._exit(0)
    if os.wait()[1]: sys.exit(f"{name} does not import")
"""


@pytest.fixture(scope="module")
def alone():
    """By package: what of moepp is loaded once all its modules are, in an interpreter that knew nothing of moepp."""
    modules = {name: [module for module in graph() if package(module) == name] for name in RANK}
    done = subprocess.run(
        [sys.executable, "-c", ALONE], input=json.dumps(modules), capture_output=True, text=True, cwd=ROOT.parent
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", sorted(RANK.keys() - {"cli"}))
def test_a_package_alone_loads_nothing_above_it(alone, name):
    assert name in alone[name]
    assert not [other for other in alone[name] if other != name and RANK[other] >= RANK[name]]
