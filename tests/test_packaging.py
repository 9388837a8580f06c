"""The package as a stranger has it: a wheel made from the source distribution, used from an empty folder."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from moepp.shipped import SHIPPED

FOLDERS = ("conf", "sweeps", "experiments")


def run(*command, **options):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    run("-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=SHIPPED)
    [archive] = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run("-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index", "-w", folder, sdist)
    [archive] = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The environment of a process that imports the wheel's moepp, and this environment's libraries."""
    site = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(site)
    return os.environ | {"PYTHONPATH": str(site)}


def names(wheel):
    return set(zipfile.ZipFile(wheel).namelist())


def test_a_wheel_has_one_package_and_in_it_everything_that_is_shipped(wheel):
    found = names(wheel)
    assert {name.split("/")[0].partition("-")[0] for name in found} == {"moepp"}
    assert {f"moepp/_shipped/{path.relative_to(SHIPPED)}" for folder in FOLDERS for path in _files(folder)} == {
        name for name in found if name.startswith("moepp/_shipped/")
    }
    assert {str(path.relative_to(SHIPPED)) for path in _files("moepp")} <= found


def _files(folder):
    return [path for path in (SHIPPED / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"]


def test_the_source_distribution_makes_the_wheel_of_the_checkout(wheel, tmp_path):
    run("-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=SHIPPED)
    [archive] = tmp_path.iterdir()
    assert names(archive) == names(wheel)


def test_the_source_distribution_holds_no_results_and_no_tests(sdist):
    with tarfile.open(sdist) as archive:
        tops = {Path(name).parts[1] for name in archive.getnames()}
    assert tops >= {"moepp", *FOLDERS} and not tops & {"results", "tests", "scripts", ".gpu_window", "runs"}


def test_an_installed_package_knows_its_sweeps_and_experiments(installed, tmp_path):
    script = (
        "import json, moepp; from moepp.experiments import discover; from moepp.sweeps.reading import read_sweep;"
        "print(json.dumps([moepp.__file__, read_sweep('routers').name, sorted(discover())]))"
    )
    file, sweep, experiments = json.loads(run("-c", script, env=installed, cwd=tmp_path))
    assert Path(file).is_relative_to(installed["PYTHONPATH"]) and sweep == "routers" and "table5" in experiments


def test_an_installed_package_trains_in_an_empty_folder_and_needs_neither_mlflow_nor_datasets(
    installed, token_folder, tmp_path
):
    # torchmetrics imports transformers where it is installed, and that needs tokenizers
    absent = ["mlflow", "datasets"] + ["tokenizers"] * (find_spec("transformers") is None)
    words = [
        "train", "size=smoke", "tracking=jsonl", "data=tokens", f"data.path={token_folder}", "trainer.steps=2",
        "trainer.accelerator=cpu",
    ]  # fmt: skip
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({absent}));"  # importing them fails
        f"from moepp.cli import main; sys.exit(main({words}))"
    )
    out = run("-c", script, env=installed, cwd=tmp_path)
    [record] = tmp_path.glob("runs/train/*/done")
    assert str(record.parent.relative_to(tmp_path)) in out and "val_bits_per_byte" in out
    assert json.loads((record.parent / "provenance.json").read_text())["git"] == {}
