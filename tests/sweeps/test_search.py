import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_fake_sweep import FAKE_TRIAL, no_preparation, sweep

from moepp.errors import RunError, UsageError
from moepp.records import RunRecord, read_json, write_json
from moepp.sweeps import commands
from moepp.sweeps import search as searching
from moepp.sweeps.launchers.call import SweepCall
from moepp.sweeps.runner import run_sweep
from moepp.sweeps.status import read_status

optuna = pytest.importorskip("optuna", reason="optuna is not installed (pip install optuna)")

SPACE = {"tpe": {"n": 4, "keys": {"optim.lr": {"float": [1e-4, 1e-2], "log": True}, "model.top_k": {"int": [1, 2]}}}}
ARMS = {"vanilla": ["model=vanilla"], "moepp": ["model=moepp"]}


@pytest.fixture(autouse=True)
def tokens_are_not_prepared(monkeypatch):
    monkeypatch.setattr("moepp.data.prepare.prepare", no_preparation)


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "runs"


def toy(n=3, **changes):
    found = sweep(**ARMS)
    found.space = {"tpe": SPACE["tpe"] | {"n": n}}
    for key, value in changes.items():
        setattr(found, key, value)
    return found


def run(runs, toy, workers=2, **options):
    return run_sweep(toy, "smoke", workers, [f"runs={runs}"], progress=False, command=FAKE_TRIAL, **options)


def proposals(directory, arm="vanilla"):
    return [trial for trial in read_json(directory / "sweep.json")["trials"] if trial["group"] == arm]


def study(directory, arm="vanilla"):
    backend = optuna.storages.journal.JournalFileBackend(str(directory / searching.JOURNAL))
    return optuna.load_study(study_name=f"{directory.name}/{arm}", storage=optuna.storages.JournalStorage(backend))


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_every_arm_gets_its_proposals_and_the_study_their_outcomes(runs, monkeypatch, capsys):
    directory = run(runs, toy())
    assert len(list(directory.glob("*/done"))) == 6
    for arm in ARMS:
        trials = proposals(directory, arm)
        assert [trial["arm"] for trial in trials] == [f"{arm}_{k:03d}" for k in range(3)]
        rates = [trial["point"]["optim.lr"] for trial in trials]
        assert len(set(rates)) == 3 and all(1e-4 <= rate <= 1e-2 for rate in rates)
        for trial, asked in zip(trials, study(directory, arm).trials, strict=True):
            config = RunRecord(directory / trial["path"]).read("config.yaml")
            assert config["optim"]["lr"] == trial["point"]["optim.lr"]
            assert trial["point"]["optim.lr"] == pytest.approx(asked.params["optim.lr"], rel=1e-3)
            assert config["tags"]["arm"] == trial["arm"] and config["tags"]["search"] == arm
    before = (directory / "sweep.json").read_text()
    run(runs, toy())
    assert (directory / "sweep.json").read_text() == before  # nothing is asked for anew
    assert all(len(path.read_text().splitlines()) == 1 for path in directory.glob("*/attempts"))
    write_json(directory / "sweep.json", json.loads(before) | {"planned": 8})
    monkeypatch.setattr("moepp.sweeps.reading.read_sweep", lambda name: toy())
    commands.status(SweepCall("toy", "smoke", 0, [f"runs={runs}"], None))
    assert (
        capsys.readouterr().out
        == "toy-smoke: 6 done, 0 running, 0 failed, 0 waiting, 2 to be proposed\nfinal metrics: n = 6: all\n"
    )
    run(runs, toy(n=4), workers=1)
    assert len(proposals(directory)) == 4
    assert [trial.value for trial in study(directory).trials[:3]] == [0.5] * 3


def test_a_proposal_runs_at_every_seed_and_the_study_sees_the_mean(runs):
    directory = run(runs, toy(n=1, arms={"vanilla": ["model=vanilla"]}), seeds=[3, 4])
    paths = [directory / trial["path"] for trial in proposals(directory)]
    assert [trial["seed"] for trial in proposals(directory)] == [3, 4] and len(set(paths)) == 2
    RunRecord(paths[0]).log(4, {"final/val_loss": 1.5})
    run(runs, toy(n=2, arms={"vanilla": ["model=vanilla"]}), seeds=[3, 4])
    assert study(directory).trials[0].value == 1.0


def test_a_proposal_whose_worker_died_before_it_was_written_down_is_used(runs, monkeypatch):
    class Died(BaseException):
        pass

    def die(directory, sweep, scale, trials, overrides, about):
        if trials:
            raise Died
        promise(directory, sweep, scale, trials, overrides, about)

    with monkeypatch.context() as broken:
        promise = searching.promise
        broken.setattr(searching, "promise", die)
        with pytest.raises(Died):
            run(runs, toy(n=2))
    directory = runs / "toy-smoke"
    asked = study(directory).trials[0].params
    run(runs, toy(n=2))
    assert proposals(directory)[0]["point"]["optim.lr"] == pytest.approx(asked["optim.lr"], rel=1e-3)
    assert len(study(directory).trials) == 2


def test_a_point_that_is_proposed_again_is_trained_once(runs):
    one_key = {"tpe": {"n": 3, "keys": {"model.top_k": {"int": [1, 2]}}}}
    directory = run(runs, toy(arms={"vanilla": ["model=vanilla"]}, space=one_key))
    paths = {trial["path"] for trial in proposals(directory)}
    assert len(proposals(directory)) == 3 and {path.parent.name for path in directory.glob("*/done")} == paths
    assert len(paths) < 3 and all(len(path.read_text().splitlines()) == 1 for path in directory.glob("*/ends"))


def test_a_lost_journal_is_made_again_from_the_records(runs):
    directory = run(runs, toy(n=2))
    (directory / searching.JOURNAL).unlink()
    run(runs, toy(n=3))
    first = study(directory).trials
    assert len(first) == len(proposals(directory)) == 3
    assert [trial.state.name for trial in first[:2]] == ["COMPLETE"] * 2


def test_a_damaged_journal_is_one_line(runs):
    directory = run(runs, toy(n=1))
    (directory / searching.JOURNAL).write_text("{not json\n{}\n")
    with pytest.raises(RunError, match=r"cannot use its storage .*search\.journal .*may be removed") as error:
        run(runs, toy(n=2))
    assert "\n" not in str(error.value)


def test_workers_killed_at_any_time_lose_and_repeat_nothing(runs):
    script = Path(__file__).with_name("run_fake_search.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "SECONDS_PER_STEP": "0.02"}

    def start() -> subprocess.Popen:
        return subprocess.Popen([sys.executable, str(script), str(runs)], env=environment)

    workers = [start(), start()]
    try:
        for trained, victim in enumerate((0, 1)):
            # Half a minute later Optuna takes the lock from one that was killed with it.
            wait_until(lambda n=trained: len(list(runs.glob("*/*/attempts"))) > n, seconds=60)
            workers[victim].kill()
            workers[victim].wait()
            workers[victim] = start()
        assert [worker.wait(timeout=90) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    directory = runs / "toy-smoke"
    trials = proposals(directory) + proposals(directory, "moepp")
    assert len(trials) == 6 and len({trial["path"] for trial in trials}) == 6
    assert {RunRecord(directory / trial["path"]).status for trial in trials} == {"done"}
    assert all(len(path.read_text().splitlines()) == 1 for path in directory.glob("*/ends"))
    assert [len(study(directory, arm).trials) for arm in ARMS] == [3, 3]


def test_another_space_or_other_seeds_are_refused(runs):
    run(runs, toy(n=1))
    other = toy(n=1, space={"tpe": {"n": 1, "keys": {"optim.lr": {"float": [1e-5, 1e-2], "log": True}}}})
    for changed, seeds in ((other, None), (toy(n=1), [7])):
        with pytest.raises(UsageError, match="another space or at other seeds"):
            run(runs, changed, seeds=seeds)


def test_an_arm_of_a_search_may_be_renamed(runs):
    directory = run(runs, toy(n=1))
    (directory / proposals(directory, "moepp")[0]["path"] / "done").unlink()
    run(runs, toy(n=1, arms={"vanilla": ARMS["vanilla"], "plus": ARMS["moepp"]}))
    assert [trial.get("left_out") for trial in read_json(directory / "sweep.json")["trials"]] == [None, True, None]
    assert [len(proposals(directory, arm)) for arm in ("vanilla", "plus")] == [1, 1]
    status = read_status(directory, read_json(directory / "sweep.json"))
    assert (status.count("done"), status.left, status.unproposed) == (2, 0, 0)


@pytest.mark.parametrize(
    ("objective", "nearest"),
    [("final/val_los", "final/val_loss, "), ("val_bits_per_byte", "val/bits_per_byte, final/val_bits_per_byte"),
     ("final/averaged_val_loss", ".*final/val_loss")],
)  # fmt: skip
def test_an_unknown_objective_is_refused_before_anything_runs(runs, monkeypatch, objective, nearest):
    """The last is one of runs that average their late weights."""
    monkeypatch.setattr("moepp.sweeps.reading.read_sweep", lambda name: toy(objective=objective))
    said = rf"^\S+: objective={objective}: arm vanilla logs no such metric; nearest in spelling are {nearest}"
    with pytest.raises(UsageError, match=said):
        run(runs, toy(objective=objective))
    with pytest.raises(UsageError, match=said):
        commands.plan(SweepCall("toy", "smoke", 0, [f"runs={runs}"], None))
    assert not runs.exists()


def test_callbacks_of_somebody_else_may_log_the_objective(runs, monkeypatch):
    monkeypatch.setattr("moepp.training.settings.TrainerConfig.has_foreign_callbacks", True)
    assert toy(objective="mine/score").trials("smoke", [f"runs={runs}"])


def test_an_objective_that_a_run_has_not_logged_after_all_ends_the_search(runs):
    with pytest.raises(RunError, match=r"has no final/val_bits_per_byte, which the sweep names as its objective"):
        run(runs, toy(objective="final/val_bits_per_byte"))


def test_a_proposal_whose_record_is_damaged_does_not_end_the_search(runs):
    directory = run(runs, toy(n=1))
    (directory / proposals(directory)[0]["path"] / "metrics.jsonl").write_text('{"step": 5, "ti\n{"step": 6}\n')
    (directory / searching.JOURNAL).unlink()
    with pytest.raises(RunError, match="1 of 4 trials failed"):
        run(runs, toy(n=2))
    assert study(directory).trials[0].state.name == "FAIL"
    assert RunRecord(directory / proposals(directory)[1]["path"]).status == "done"  # the next was made all the same


def test_sqlite_is_for_one_worker(runs):
    url = f"sqlite:///{runs.parent}/search.db"
    with pytest.raises(UsageError, match="is for one worker"):
        run(runs, toy(n=1, storage=url))
    run(runs, toy(n=1, storage=url), workers=1)
    assert optuna.load_study(study_name="toy-smoke/vanilla", storage=url).trials


def test_a_space_that_breaks_the_match_or_the_schema_is_refused_before_anything_runs(runs):
    with pytest.raises(UsageError, match=r"in flops_per_token \(63.1k of moepp, model.top_k=1 to 90.6k of vanilla\)"):
        run(runs, toy(match="flops_per_token"))
    still = {"tpe": {"n": 1, "keys": {"seed": {"int": [0, 3]}}}}
    with pytest.raises(UsageError, match=r"arms vanilla, seed=0 and vanilla, seed=3 are the same run"):
        run(runs, toy(space=still))
    unknown = {"tpe": {"n": 1, "keys": {"optim.rate": {"float": [0.1, 1]}}}}
    with pytest.raises(UsageError, match=r"unknown key optim\.rate"):
        run(runs, toy(space=unknown))
    with pytest.raises(UsageError, match=r"optim\.lr is searched in arm vanilla"):
        run_sweep(toy(), "smoke", 1, [f"runs={runs}", "optim.lr=1"], command=FAKE_TRIAL)
    assert not runs.exists()


def test_without_optuna_one_line_says_what_to_install(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match="pip install optuna"):
        run(runs, toy())


def test_a_failed_proposal_is_told_as_failed(runs):
    broken = toy(n=2, arms={"broken": ["model=vanilla"]}, baseline="broken", retries=0)
    with pytest.raises(RunError, match="2 of 2 trials failed"):
        run(runs, broken, workers=1)
    assert [trial.state.name for trial in study(runs / "toy-smoke", "broken").trials] == ["FAIL", "RUNNING"]
