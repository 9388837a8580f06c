import sys

import pytest

from moepp import experiments
from moepp.errors import UsageError


@pytest.fixture
def own(monkeypatch, tmp_path):
    """A user's ./experiments, in front of the shipped one, which holds two."""
    shipped, own = tmp_path / "shipped", tmp_path / "experiments"
    for folder in (shipped, own):
        folder.mkdir()
    (shipped / "first.py").write_text("EXPERIMENT = object()\n")
    (shipped / "second.py").write_text("from .first import EXPERIMENT as FIRST\n\nEXPERIMENT = [FIRST]\n")
    monkeypatch.setattr(experiments, "__path__", [str(own), str(shipped)])
    for name in ("first", "second", "mine"):
        monkeypatch.delitem(sys.modules, f"moepp.experiments.{name}", raising=False)
    return own


def test_they_go_by_the_names_of_their_files(own):
    found = experiments.discover()
    assert found.keys() == {"first", "second"} and found["second"] == [found["first"]]


def test_one_of_ones_own_may_build_on_a_shipped_one(own):
    (own / "mine.py").write_text("from moepp.experiments.first import EXPERIMENT as FIRST\n\nEXPERIMENT = FIRST\n")
    found = experiments.discover()
    assert found["mine"] is found["first"]


def test_one_of_ones_own_comes_before_the_shipped_one_of_its_name(own):
    (own / "second.py").write_text("EXPERIMENT = 2\n")
    assert experiments.discover()["second"] == 2


def test_other_programs_beside_it_are_not_run(own):
    (own / "train.py").write_text("raise SystemExit('must not run')")
    assert experiments.discover().keys() == {"first", "second"}


def test_one_that_fails_is_named_in_a_line(own):
    (own / "broken.py").write_text("import nothing_of_that_name\n\nEXPERIMENT = None\n")
    with pytest.raises(UsageError, match=r"broken\.py: ModuleNotFoundError: No module named 'nothing_of_that_name'"):
        experiments.discover()
