import shlex

import pytest

from moepp.shipped import SWEEPS
from moepp.sweeps.commands import status
from moepp.sweeps.hints import sweep_command
from moepp.sweeps.launchers.call import SweepCall
from moepp.sweeps.reading import read_sweep
from moepp.sweeps.spec import Sweep

OWN = "name: mine\nquestion: Which?\nscales: {smoke: {set: []}}\nbaseline: a\narms: {a: [], b: [seed=1]}\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my sweeps").mkdir()
    (tmp_path / "my sweeps" / "m.yaml").write_text(OWN)
    return tmp_path


def test_a_sweep_in_a_file_of_ones_own_is_named_by_its_path(folder):
    typed = sweep_command("retry", read_sweep("my sweeps/m.yaml"), "smoke", ["trainer.steps=4", "runs=my runs"])
    words = shlex.split(typed)[-6:]
    assert words == ["sweep", "retry", "my sweeps/m.yaml", "--scale", "smoke", "runs=my runs"]
    assert read_sweep(words[2]).name == "mine"


@pytest.mark.parametrize("typed", ["tau", str(SWEEPS / "tau.yaml")])
def test_a_shipped_sweep_is_named_as_people_name_it(folder, typed):
    assert sweep_command("status", read_sweep(typed), "laptop", []).endswith(" sweep status tau --scale laptop")


def test_a_sweep_that_was_read_nowhere_has_its_name():
    assert sweep_command("retry", Sweep(name="toy"), "smoke", []).endswith(" sweep retry toy --scale smoke")


def test_a_sweep_that_was_not_begun_is_begun_by_the_command_that_is_printed(folder):
    with pytest.raises(Exception, match=r"`.* sweep run 'my sweeps/m\.yaml' --scale smoke runs=there` begins one"):
        status(SweepCall("my sweeps/m.yaml", "smoke", overrides=["runs=there"]))
