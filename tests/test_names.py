import os
import stat
import tempfile
from dataclasses import replace

import pytest

from moepp import names
from moepp.config import compose
from moepp.errors import UsageError
from moepp.models.weight_files import find_weights
from moepp.sweeps.allocations import own_share
from moepp.sweeps.launchers.slurm import SlurmLauncher
from moepp.sweeps.reading import read_sweep
from moepp.training.settings import RunConfig

PATHS = ["a/b", "../x", "/abs", "..", ".hidden"]
BAD = [*PATHS, "", "t\nid > F #", "a b", "$(id)", "`id`", "<b>", "a|b", "x" * 121, "-rf"]
SWEEP = """
name: {name}
question: q
base: [size=smoke]
scales: {{{scale}: {{set: []}}}}
baseline: a
arms: {{a: [], {arm}: [optim.lr=1e-2]}}
"""


@pytest.mark.parametrize("name", ["a", "7", "zero+copy", "lr=0.001,tau=0.5", "constant_2.5", "größe", "x" * 120])
def test_letters_digits_and_a_few_signs_make_a_name(name):
    names.check("name", [name])


@pytest.mark.parametrize("name", BAD)
def test_paths_commands_and_markup_are_no_names(name):
    with pytest.raises(ValueError, match=r"(?s)name=.*letters, digits and") as error:
        names.check("name", [name])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("override", ["name=a/b", "name=../x", "tracking.experiment=a b", "tags.a|b=1", "runs=a\nb"])
def test_a_run_is_named_when_its_config_is_read(override):
    with pytest.raises(UsageError, match=override.partition("=")[0].partition("|")[0].removesuffix(".a")):
        compose(RunConfig, [override])


@pytest.mark.parametrize(
    ("changed", "key"), [({"name": "../x"}, "name"), ({"arm": "'b c'"}, "arms"), ({"scale": "'a/b'"}, "scales")]
)
def test_a_sweep_is_named_when_its_file_is_read(tmp_path, changed, key):
    path = tmp_path / "own.yaml"
    path.write_text(SWEEP.format(**{"name": "own", "scale": "smoke", "arm": "b"} | changed))
    with pytest.raises(UsageError, match=rf"own.yaml: {key}="):
        read_sweep(str(path))


@pytest.mark.parametrize(
    "changed", [{"partition": "a\nid"}, {"parameters": {"account": "a\nid"}}, {"parameters": {"wrap id #": "x"}}]
)
def test_no_parameter_adds_a_line_to_a_batch_script(changed):
    with pytest.raises(ValueError, match=r"launcher\.p"):
        replace(SlurmLauncher(), **changed)


def test_an_index_names_no_file_outside_its_folder(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')
    with pytest.raises(UsageError, match=r"names files outside its folder: \.\./other"):
        find_weights(tmp_path)


def test_the_shared_folder_is_private_and_follows_no_links(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder, victim = tmp_path / f"moepp-{os.getuid()}", tmp_path / "victim"
    victim.write_text("kept")
    with own_share([{}]):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (folder / "worker-0").unlink()
    (folder / "worker-0").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic"), own_share([{}]):
        pass
    assert victim.read_text() == "kept"
    (folder / "worker-0").unlink()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(Exception, match="is no folder of this user's"), own_share([{}]):
        pass
