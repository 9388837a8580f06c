import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_fake_sweep import FAKE_TRIAL, no_preparation, sweep

from moepp.errors import RunError
from moepp.records import RunRecord, read_json
from moepp.sweeps import runner
from moepp.sweeps.runner import run_sweep

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def tokens_are_not_prepared(monkeypatch):
    monkeypatch.setattr("moepp.training.tokens.prepare", no_preparation)


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "runs"


def run(runs, arms=None, extra=(), **options):
    return run_sweep(
        sweep(**(arms or {})), "smoke", extra=[f"runs={runs}", *extra], progress=False, command=FAKE_TRIAL, **options
    )


def attempts(directory: Path) -> dict[str, int]:
    return {path.parent.name: len(path.read_text().splitlines()) for path in directory.glob("*/attempts")}


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def start_runner(runs, seconds_per_step="0.2") -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SECONDS_PER_STEP": seconds_per_step}
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("run_fake_sweep.py")), str(runs)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip


def steps_logged(directory: Path) -> list[int]:
    return [len(RunRecord(path.parent).metrics()) for path in directory.glob("*/metrics.jsonl")]


def test_every_trial_is_run_once_and_described(runs):
    directory = run(runs, workers=2, seeds=[0, 1])
    described = read_json(directory / "sweep.json")
    assert directory == runs / "toy-smoke"
    assert [(t["arm"], t["seed"]) for t in described["trials"]] == [("top1", 0), ("top2", 0), ("top1", 1), ("top2", 1)]
    assert described["baseline"] == "top1" and described["scale"] == "smoke"
    for trial in described["trials"]:
        record = RunRecord(directory / trial["path"])
        config = record.read("config.yaml")
        assert record.status == "done"
        assert (config["tags"]["arm"], config["seed"]) == (trial["arm"], trial["seed"])
        assert config["data"]["digest"] == "0123456789abcdef"

    run(runs, workers=2, seeds=[0, 1])
    assert list(attempts(directory).values()) == [1, 1, 1, 1]


def test_each_worker_gets_its_share_of_the_cores(runs, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    directory = run(runs, workers=2)
    assert {path.read_text().split()[1] for path in directory.glob("*/attempts")} == {"3"}


def test_a_failing_trial_stops_no_other_and_is_tried_again(runs):
    arms = {"broken": ["model.top_k=2"], "top1": ["model.top_k=1"]}
    with pytest.raises(RunError, match=r"1 of 2 trials failed.*broken s0: exit code 1; expert 3 is on fire") as error:
        run(runs, arms, workers=1)
    assert "\n" not in str(error.value)
    directory = runs / "toy-smoke"
    statuses = {
        t["arm"]: RunRecord(directory / t["path"]).status for t in read_json(directory / "sweep.json")["trials"]
    }
    assert statuses == {"broken": "failed", "top1": "done"}

    (runs.parent / "fixed").touch()
    run(runs, arms, workers=1)
    assert {RunRecord(path.parent).status for path in directory.glob("*/config.yaml")} == {"done"}
    assert sorted(attempts(directory).values()) == [1, 2]


def test_exit_code_zero_without_the_done_marker_is_a_failure(runs):
    with pytest.raises(RunError, match=r"2 of 2 trials failed.*exit code 0; all is well"):
        run_sweep(
            sweep(), "smoke", 1, [f"runs={runs}"], progress=False,
            command=[sys.executable, "-c", "print('all is well')"],
        )  # fmt: skip


def test_a_killed_runner_takes_its_trials_along_and_the_next_call_completes(runs):
    directory = runs / "toy-smoke"
    first = start_runner(runs)
    wait_until(lambda: len(steps_logged(directory)) == 2 and min(steps_logged(directory)) >= 2)
    children = [int(path.read_text().split()[0]) for path in directory.glob("*/attempts")]
    assert all(alive(pid) for pid in children)
    first.kill()
    first.wait()
    wait_until(lambda: not any(alive(pid) for pid in children), seconds=5)

    assert start_runner(runs, seconds_per_step="0").wait() == 0
    for path in directory.glob("*/config.yaml"):
        steps = [line["step"] for line in RunRecord(path.parent).metrics() if "train/loss" in line]
        assert steps == list(range(1, 21))
    assert list(attempts(directory).values()) == [2, 2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_runner_stops_its_trials_and_says_how_to_go_on(runs, number):
    directory = runs / "toy-smoke"
    process = start_runner(runs)
    wait_until(lambda: len(steps_logged(directory)) == 2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "0 of 2 trials are finished; the same command continues" in output
    assert not any(alive(int(path.read_text().split()[0])) for path in directory.glob("*/attempts"))
    assert {RunRecord(path.parent).status for path in directory.glob("*/config.yaml")} == {"started"}


def test_a_trial_that_ignores_the_request_to_stop_is_killed(runs, monkeypatch):
    monkeypatch.setattr(runner, "SECONDS_TO_STOP", 0.5)
    script = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    deaf = runner._Job(sweep().trials("smoke", [f"runs={runs}"])[0])
    deaf.start([sys.executable, "-c", script], {})
    wait_until(lambda: "deaf" in (deaf.record.path / "log.txt").read_text())
    runner._Runner([deaf], [], (), progress=False)._stop([deaf])
    assert deaf.process.returncode == -signal.SIGKILL


def test_two_runners_never_share_a_sweep(runs):
    first = start_runner(runs)
    wait_until(lambda: len(steps_logged(runs / "toy-smoke")) == 2)
    with pytest.raises(RunError, match=f"toy-smoke is in use by process {first.pid}"):
        run(runs)
    first.kill()
    first.communicate()


def test_an_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(RunError, match=r"cannot write .*runs"):
        run(tmp_path / "runs")


def test_progress_counts_steps_finished_earlier(runs, capsys):
    directory = run(runs)
    first = next(directory.glob("*/done"))
    first.unlink()
    metrics = first.with_name("metrics.jsonl")
    metrics.write_text(json.dumps({"step": 3, "time": 0, "train/loss": 0.25}) + "\n")
    run_sweep(sweep(), "smoke", 1, [f"runs={runs}"], command=FAKE_TRIAL)
    bar = capsys.readouterr().err
    assert "| 7/8 [" in bar and "| 8/8 [" in bar
    assert "/2 top" in bar
