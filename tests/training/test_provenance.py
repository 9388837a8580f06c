import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from moepp.training import provenance


def run_git(root, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "moepp").mkdir()
    (tmp_path / "moepp" / "__init__.py").write_text("")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "table.csv").write_text("")
    run_git(tmp_path, "init")
    run_git(tmp_path, "add", ".")
    run_git(tmp_path, "commit", "-m", "first")
    return tmp_path


def test_it_is_plain_json_with_what_a_reader_asks_for():
    found = json.loads(json.dumps(provenance.collect({"digest": "0123456789abcdef", "corpus": "speeches"})))
    assert found["data"]["digest"] == "0123456789abcdef"
    assert found["versions"].keys() >= {"moepp", "omegaconf"} and found["versions"]["python"].startswith("3.")
    assert found["hardware"]["cores"] >= 1 and found["hardware"]["memory_gib"] > 0 and found["hardware"]["cpu"]
    assert datetime.fromisoformat(found["started"]).utcoffset().total_seconds() == 0


def test_a_cpu_is_told_from_another_of_its_model_by_what_it_multiplies(monkeypatch):
    monkeypatch.setattr(provenance, "_cpu_model", lambda: "A CPU")
    for known, said in ((["AVX2", "AVX512"], "A CPU (AVX2, AVX512)"), (["AVX2"], "A CPU (AVX2)"), ([], "A CPU")):
        monkeypatch.setattr(provenance, "features", lambda known=known: known)
        assert provenance.collect({})["hardware"]["cpu"] == said


def test_a_continued_run_keeps_each_other_attempt_once():
    def attempt(sha, host="here"):
        return {"started": "then", "command": "run.py", "host": host, "git": {"sha": sha}}

    first = provenance.continued({}, attempt("a"))
    assert first == attempt("a")
    same = provenance.continued(first, attempt("a"))
    assert "earlier" not in same
    moved = provenance.continued(same, attempt("a", "there"))
    updated = provenance.continued(moved, attempt("b", "there"))
    updated = provenance.continued(updated, attempt("b", "there"))
    assert updated["git"] == {"sha": "b"}
    assert [(e["host"], e["git"]["sha"]) for e in updated["earlier"]] == [("here", "a"), ("there", "a")]
    back = provenance.continued(updated, attempt("a"))
    assert [(e["host"], e["git"]["sha"]) for e in back["earlier"]] == [("there", "a"), ("there", "b")]


def test_commit_and_changes_are_told(checkout):
    clean = provenance.git(checkout)
    assert len(clean["sha"]) == 40 and clean["dirty"] is False
    (checkout / "runs").mkdir()
    (checkout / "runs" / "log.txt").write_text("an untracked file changes no code")
    assert provenance.git(checkout)["dirty"] is False
    (checkout / "results" / "table.csv").write_text("a new result changes no code")
    assert provenance.git(checkout)["dirty"] is False
    (checkout / "moepp" / "__init__.py").write_text("x = 1\n")
    assert provenance.git(checkout) == {"sha": clean["sha"], "dirty": True}


def test_a_repository_that_does_not_track_moepp_is_not_its_origin(checkout):
    installed = checkout / "venv" / "site-packages"
    (installed / "moepp").mkdir(parents=True)
    (installed / "moepp" / "__init__.py").write_text("")
    assert provenance.git(installed) == {}


def test_no_git_is_fine(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git(tmp_path) == {}


def test_the_command_holds_no_private_path(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", [f"{Path.cwd()}/run.py", "train", f"data.path={Path.cwd()}/a.txt", f"{Path.home()}/b"]
    )
    assert provenance.collect({})["command"] in (
        "python run.py train data.path=a.txt ~/b", "python run.py train data.path=a.txt b",
    )  # fmt: skip


def test_torch_is_not_imported_for_it():
    script = "import sys; from moepp.training.provenance import collect; collect({}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
