"""What a reader of the source meets: one meaning for a name, parts of a config, short files for a paper's tables."""

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

import moepp
from moepp.experiments import discover
from moepp.shipped import EXPERIMENTS, SHIPPED

PACKAGE = Path(moepp.__file__).parent
SOURCES = {str(p.relative_to(PACKAGE)): p for p in sorted(PACKAGE.rglob("*.py")) if "_shipped" not in p.parts}
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
AGAIN = {  # where a name may stand a second time, and why
    "cli.py": "a command is called as what it runs",
    "sweeps/commands.py": "so are the actions of `sweep`",
    "layers/kernels/": "backends fulfil one interface",
    "pretrain/": "an adapter for each framework, with one face",
    "retrofit/folders.py": "retrofit has a face of its own: retrofit.load",
    "retrofit/modeling_decoder.py": "goes into folders that work without this package",
}


@cache
def trees():
    return {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}


def of_others(name):
    return not any(name.startswith(place) for place in AGAIN)


def public_names(tree):
    """Classes, functions and types that a module defines for others."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | FUNCTIONS):
            yield node.name
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript | ast.BinOp):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name) and _is_type(target.id))


def _is_type(name):
    return name[0].isupper() and not name.isupper()


def test_a_public_name_is_defined_once():
    found = defaultdict(set)
    for module, tree in trees().items():
        for name in public_names(tree):
            if not name.startswith("_") and name != "main" and of_others(module):
                found[name].add(module)
    assert not {name: modules for name, modules in found.items() if len(modules) > 1}


def parts_used(function, argument):
    """The attributes of an argument that a function reads; None where it hands on the whole of it."""
    read = [node for node in ast.walk(function) if isinstance(node, ast.Name) and node.id == argument]
    through = [n for n in ast.walk(function) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
    parts = {node.attr for node in through if node.value.id == argument}
    return parts if len(read) == sum(node.value.id == argument for node in through) else None


def test_a_function_takes_its_part_of_a_runs_config():
    whole = [
        f"{module}: {function.name}"
        for module, tree in trees().items()
        for function in ast.walk(tree)
        if isinstance(function, FUNCTIONS)
        for argument in function.args.args
        if argument.annotation is not None
        and ast.unparse(argument.annotation).strip("'") == "RunConfig"
        and (parts := parts_used(function, argument.arg)) is not None
        and len(parts) <= 1
    ]
    assert not whole


def test_inner_parts_of_lightning_are_touched_in_one_module():
    private = ("_signal_connector", "_logger_connector", "_broadcast_sigterm_tensor", "_should_accumulate")
    touching = {name for name, path in SOURCES.items() if any(part in path.read_text() for part in private)}
    assert touching == {"training/recorded_trainer.py"}


@pytest.mark.parametrize("name", sorted(discover()))
def test_a_table_of_the_paper_beside_a_sweep_is_at_most_40_lines(name):
    source = (SHIPPED / EXPERIMENTS / f"{name}.py").read_text()
    of_the_paper = discover()[name].reference and "of_sweep(" in source
    assert not of_the_paper or len(source.splitlines()) <= 40


def test_no_two_files_of_tests_share_a_name():
    """Without packages pytest takes the second for the first, but only where both are collected."""
    names = sorted(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert len(names) == len(set(names))
