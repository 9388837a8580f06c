import pytest

from moepp.errors import UsageError
from moepp.records import RunRecord, write_json
from moepp.reports.arms import of_sweep
from moepp.reports.experiment import Context
from moepp.reports.proposals import best, importances, read_proposals
from moepp.reports.report import write_report
from moepp.reports.search_report import SearchReport


@pytest.fixture
def searched(tmp_path):
    """Ten proposals whose loss is the distance of the rate from 0.01 in factors of ten; the last two were pruned."""
    trials = []
    for number in range(10):
        rate = 10 ** (-3 + number / 4)
        path = f"{number:012x}"
        point = {"optim.lr": rate, "model.top_k": 1 + number % 2}
        for seed in (0, 1):
            trials.append(
                {"arm": f"a_{number:03d}", "group": "a", "seed": seed, "path": f"{path}{seed}", "point": point}
            )
            record = RunRecord(tmp_path / f"{path}{seed}")
            record.path.mkdir()
            loss = abs(number / 4 - 1) + (0.1 if seed else -0.1)
            record.log(4, {"val/loss": loss + 5})
            if number < 8:
                record.log(8, {"final/val_loss": loss})
                record.finish()
            else:
                record.prune(4, "behind")
    write_json(tmp_path / "sweep.json", {"objective": "final/val_loss", "trials": trials})
    return tmp_path


def test_proposals_are_the_means_of_their_seeds(searched):
    proposals = read_proposals(searched)
    assert [proposal.state for proposal in proposals] == ["done"] * 8 + ["pruned"] * 2
    assert proposals[0].loss == pytest.approx(1.0) and proposals[8].loss == pytest.approx(6.0)
    assert (proposals[0].step, proposals[8].step) == (8, 4)
    assert best(proposals, "a").name == "a_004" and best(proposals, "b") is None


def test_what_matters_is_found(searched):
    pytest.importorskip("optuna", reason="optuna is not installed (pip install optuna)")
    found = importances(read_proposals(searched), "a")
    assert next(iter(found)) == "optim.lr" and sum(found.values()) == pytest.approx(1)
    assert importances(read_proposals(searched)[:7], "a") == {}


def test_the_report_shows_winners_and_history(searched, tmp_path):
    report = SearchReport("hyperparameters")(Context("smoke", {"hyperparameters": searched}))
    arm, name, loss, rate, *_ = report.tables[0].rows[0]
    assert (arm, name, loss, rate) == ("a", "a_004", pytest.approx(0.0, abs=1e-9), pytest.approx(0.01))
    assert report.tables[0].rows[0][-2:] == (10, 2)
    made = {"command": "", "scale": "smoke", "hardware": {}}
    files = write_report(of_sweep("hyperparameters"), report, tmp_path / "out", made)
    assert {"history.csv", "history.svg"} <= {path.name for path in files}


def test_a_sweep_without_proposals_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no search"):
        read_proposals(tmp_path)
