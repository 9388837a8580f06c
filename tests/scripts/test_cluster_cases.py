import re
import subprocess
import sys
from pathlib import Path

import pytest

from moepp.records import RunRecord

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import cluster_cases  # noqa: E402

SCRIPT = ROOT / "scripts" / "clusters.sh"


def test_the_script_is_one_that_bash_can_read():
    assert subprocess.run(["bash", "-n", SCRIPT], capture_output=True).returncode == 0


def test_every_group_that_the_script_starts_something_for_has_cases():
    groups = re.search(r"GROUPS_ASKED=\((slurm [a-z ]+)\)", SCRIPT.read_text())[1].split()
    assert {group for group, *_ in cluster_cases.CASES} == set(groups)


def test_rows_are_told_apart_by_what_was_done_and_fit_the_table():
    rows = [(group, done) for group, done, *_ in cluster_cases.CASES]
    assert len(set(rows)) == len(rows) and not any(
        "|" in done + expected for _, done, expected, _ in cluster_cases.CASES
    )


@pytest.fixture
def bench(tmp_path):
    bench = cluster_cases.Bench(tmp_path / "case")
    record = RunRecord(tmp_path / "case" / "runs" / "trial-smoke" / "0123456789ab")
    record.path.mkdir(parents=True)
    (record.path / "config.yaml").write_text("seed: 0\n")
    for step in range(1, cluster_cases.STEPS + 1):
        record.log(step, {"train/loss": 1.0})
    return bench, record


def test_a_trial_is_whole_when_it_is_done_and_has_each_step_once(bench):
    case, record = bench
    with pytest.raises(cluster_cases.Unexpected, match="0123456789ab is started"):
        case.whole()
    record.log(cluster_cases.STEPS, {"final/val_loss": 1.0})
    record.finish()
    assert case.whole() == "1 of 1 whole"
    record.log(cluster_cases.STEPS, {"train/loss": 1.0})
    with pytest.raises(cluster_cases.Unexpected, match="has steps"):
        case.whole()


def test_a_case_without_trials_is_not_whole(tmp_path):
    with pytest.raises(cluster_cases.Unexpected, match="no trial"):
        cluster_cases.Bench(tmp_path / "case").whole()


def test_what_is_seen_otherwise_is_a_row_and_counts(tmp_path, monkeypatch, capsys):
    def fails(bench):
        raise cluster_cases.Unexpected(f"{bench.folder}/x is not there")

    monkeypatch.setattr(cluster_cases, "CASES", [("ray", "one", "two", fails), ("slurm", "other", "two", fails)])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert cluster_cases.main("ray", tmp_path) == 1
    assert (tmp_path / "table.md").read_text() == "| one | two | **otherwise**: FOLDER/ray/fails/x is not there |\n"
    assert len(capsys.readouterr().out.splitlines()) == 1
