import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from run_fake_sweep import FAKE_TRIAL, arms, no_preparation, sweep

from moepp import process
from moepp.errors import DiskFull, Interrupted, RunError, UsageError
from moepp.records import RunRecord, read_json, write_json
from moepp.sweeps import allocations, runner
from moepp.sweeps.job import Job
from moepp.sweeps.leases import Heartbeat
from moepp.sweeps.plan import read_plan
from moepp.sweeps.runner import run_sweep
from moepp.sweeps.status import read_status

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def tokens_are_not_prepared(monkeypatch):
    monkeypatch.setattr("moepp.data.prepare.prepare", no_preparation)


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "runs"


def run(runs, arms=None, extra=(), retries=1, **options):
    toy = sweep(retries, **(arms or {}))
    return run_sweep(toy, "smoke", extra=[f"runs={runs}", *extra], progress=False, command=FAKE_TRIAL, **options)


def python(code: str):
    """What a job starts in place of a trial."""
    return lambda config, log, environment: process.start([sys.executable, "-c", code], log, environment)


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


def start_runner(runs, seconds_per_step="0.2", **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SECONDS_PER_STEP": seconds_per_step}
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("run_fake_sweep.py")), str(runs), json.dumps(options)],
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
    assert described["overrides"] == [f"runs={runs}"] and described["file_seeds"] == [0]
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
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(6))
    directory = run(runs, workers=2)
    assert {path.read_text().split()[1] for path in directory.glob("*/attempts")} == {"3"}


def test_workers_that_are_started_one_by_one_take_gpus_of_their_own(runs, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(runs.parent))
    monkeypatch.setattr(allocations, "_gpus", lambda: ["0", "1"])
    with allocations.own_share([{}]):  # as another worker on this machine has it
        directory = run(runs, one_share=True)
    assert {path.read_text().split()[2] for path in directory.glob("*/attempts")} == {"1"}


def test_a_failing_trial_stops_no_other_and_is_retried_as_often_as_stated(runs):
    arms = {"broken": ["model.top_k=2"], "top1": ["model.top_k=1"]}
    message = r"1 of 2 trials failed; .*sweep retry toy --scale smoke.*broken s0: exit code 1; expert 3 is on fire"
    with pytest.raises(RunError, match=message) as error:
        run(runs, arms, workers=1, retries=2)
    assert "\n" not in str(error.value)
    directory = runs / "toy-smoke"
    records = {t["arm"]: RunRecord(directory / t["path"]) for t in read_json(directory / "sweep.json")["trials"]}
    assert {arm: record.status for arm, record in records.items()} == {"broken": "failed", "top1": "done"}
    assert records["broken"].read("failed.json")["log"][-2:] == ["the router is cold", "expert 3 is on fire"]
    assert len(records["broken"].crashes) == 3
    assert sorted(attempts(directory).values()) == [1, 3]

    (runs.parent / "fixed").touch()
    with pytest.raises(RunError, match="1 of 2 trials failed"):  # a failure stands until it is forgiven
        run(runs, arms, workers=1, retries=2)
    records["broken"].forgive()
    run(runs, arms, workers=1, retries=2)
    assert {record.status for record in records.values()} == {"done"}
    assert sorted(attempts(directory).values()) == [1, 4]


def test_a_trial_that_crashes_once_is_retried_and_finishes(runs, capfd):
    directory = run(runs, {"flaky": ["model.top_k=2"]}, workers=1)
    record = RunRecord(next(directory.glob("*/done")).parent)
    assert [crash["reason"] for crash in record.crashes] == ["a cosmic ray"]
    assert "warning: flaky s0 is tried again: a cosmic ray" in capfd.readouterr().err
    assert not (record.path / "failed.json").exists()


def test_a_failure_is_final_once_its_attempts_are_used_up(runs):
    job = Job(sweep().trials("smoke", [f"runs={runs}"])[0], retries=1, heartbeat=Heartbeat())
    job.record.fail("no memory")  # as the trial's process leaves it, before its worker has counted the crash
    for _ in range(2):
        assert not job.settled
        job.record.crash("no memory")
    assert job.settled and job.failure == "no memory"


def test_no_trial_begins_that_would_not_end_in_time_and_the_same_call_continues(runs, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Job, "seconds", 3600.0)
        with pytest.raises(Interrupted, match="out of time: 1 of 3 trials are finished; the same command continues"):
            run(runs, arms(3), workers=1, minutes=10)
        with pytest.raises(Interrupted, match="1 of 3"):  # by what an earlier call has learnt
            run(runs, arms(3), workers=1, minutes=10)
    assert len(attempts(run(runs, arms(3), workers=1, minutes=10))) == 3


def test_a_finished_trial_knows_how_long_it_took(runs, monkeypatch):
    monkeypatch.setenv("SECONDS_PER_STEP", "0.1")
    run(runs, arms(1))
    job = Job(sweep(**arms(1)).trials("smoke", [f"runs={runs}"])[0], retries=1, heartbeat=Heartbeat())
    job.record.path = next((runs / "toy-smoke").glob("*/done")).parent
    assert 0.4 <= job.seconds < 60


def test_a_trial_that_runs_when_the_time_is_over_is_stopped_and_continued(runs, monkeypatch):
    monkeypatch.setenv("SECONDS_PER_STEP", "0.2")
    long = {"arms": arms(1), "workers": 1, "extra": ["trainer.steps=400"]}
    with pytest.raises(Interrupted, match="out of time: 0 of 1 trials are finished"):
        run(runs, minutes=4 / 60, **long)
    [begun] = (runs / "toy-smoke").glob("*/metrics.jsonl")
    assert 0 < len(begun.read_text().splitlines()) < 400
    monkeypatch.setenv("SECONDS_PER_STEP", "0")
    run(runs, **long)
    assert len(RunRecord(begun.parent).metrics()) == 401 and list(attempts(runs / "toy-smoke").values()) == [2]


def dead_worker(job):
    """A worker claims and starts the trial and is gone, and the trial with it."""
    assert job.claim()
    job.start(python(""), {})
    job.process.wait()
    os.close(job.lease._descriptor)  # as the kernel does


def test_a_trial_that_takes_its_workers_along_ends_as_failed(runs):
    job = Job(sweep().trials("smoke", [f"runs={runs}"])[0], retries=1, heartbeat=Heartbeat())
    for _ in range(3 * 2):  # three count as a crash, of which the second is final
        dead_worker(job)
    assert not job.claim() and job.settled
    assert job.failure == "it was stopped or its worker died 6 times before it reached another checkpoint"
    job.record.forgive()
    assert job.claim()


def test_a_trial_that_is_asked_to_stop_has_not_crashed_unless_it_never_gets_any_further(runs):
    job = Job(sweep().trials("smoke", [f"runs={runs}"])[0], retries=0, heartbeat=Heartbeat())
    for end in ("raise SystemExit(130)", "import os; os.kill(os.getpid(), 15)", "raise SystemExit(130)"):
        assert job.claim() and not job.record.crashes
        job.start(python(end), {})
        job.process.wait()
        job.settle()
    assert job.failure == "it was stopped or its worker died 3 times before it reached another checkpoint"


def test_a_full_disk_ends_the_worker_and_counts_against_no_trial(runs):
    full = [sys.executable, "-c", f"raise SystemExit({DiskFull.exit_code})"]
    with pytest.raises(
        RunError, match=r"cannot write .*toy-smoke/\w+, for the disk is full; the same command continues"
    ):
        run_sweep(sweep(), "smoke", 1, [f"runs={runs}"], progress=False, command=full)
    assert len(list(runs.glob("*/*/log.txt"))) == 1 and not list(runs.glob("*/*/crashes.json"))
    assert run(runs) == runs / "toy-smoke"


def test_a_machine_with_no_room_for_another_process_is_one_line(runs, monkeypatch):
    def refuse(*_, **__):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(RunError, match=r"^cannot start .*python.*: Resource temporarily unavailable$"):
        run(runs)


def test_workers_that_die_between_checkpoints_cost_nothing(runs):
    job = Job(sweep().trials("smoke", [f"runs={runs}"])[0], retries=0, heartbeat=Heartbeat())
    job.record.checkpoints.mkdir(parents=True)
    for step in range(1, 4):
        dead_worker(job)
        dead_worker(job)
        (job.record.checkpoints / f"step-{step:08d}.ckpt").touch()
    assert job.claim() and not job.record.crashes


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
    monkeypatch.setattr(runner, "MARGIN_SECONDS", 0.0)
    script = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    deaf = Job(sweep().trials("smoke", [f"runs={runs}", "trainer.stop_s=0.5"])[0], retries=0, heartbeat=Heartbeat())
    assert deaf.claim()
    deaf.start(python(script), {})
    wait_until(lambda: "deaf" in (deaf.record.path / "log.txt").read_text())
    loop = runner._Runner([], (), Job, progress=False, search=None)
    loop.running = [deaf]
    loop._stop()
    assert deaf.process.returncode == -signal.SIGKILL


def each_step_once(directory) -> bool:
    records = [RunRecord(path.parent) for path in directory.glob("*/config.yaml")]
    steps = [[line["step"] for line in record.metrics() if "train/loss" in line] for record in records]
    return all(found == list(range(1, 21)) for found in steps)


def test_runners_share_a_sweep_and_run_each_trial_once(runs):
    runners = [start_runner(runs, "0.05", arms=5, one_share=True) for _ in range(3)]
    assert [process.wait(timeout=60) for process in runners] == [0, 0, 0]
    directory = runs / "toy-smoke"
    assert list(attempts(directory).values()) == [1] * 5
    assert each_step_once(directory)


def test_the_trial_of_a_stopped_runner_ends_itself_and_goes_on_elsewhere(runs):
    directory = runs / "toy-smoke"
    stopped = start_runner(runs, arms=1, stale=2)
    wait_until(lambda: steps_logged(directory) and steps_logged(directory)[0] >= 2)
    stopped.send_signal(signal.SIGSTOP)
    try:
        assert start_runner(runs, "0.01", arms=1, stale=2).wait(timeout=30) == 0
        assert list(attempts(directory).values()) == [2]
        assert each_step_once(directory)
    finally:
        stopped.send_signal(signal.SIGCONT)
    assert stopped.wait(timeout=10) == 0  # it finds the trial done, and counts no crash
    assert not list(directory.glob("*/crashes.json"))


def test_a_worker_that_lost_its_lease_stops_the_trial(runs, capfd):
    job = Job(sweep().trials("smoke", [f"runs={runs}"])[0], retries=0, heartbeat=Heartbeat())
    assert job.claim()
    job.start(python("import time; time.sleep(60)"), {})
    assert not job.ended()
    (job.lease.path.parent / "2").touch()
    assert job.ended() and job.process.returncode == -signal.SIGKILL
    job.settle()
    assert job.record.status == "waiting" and not job.record.crashes
    assert "top1 s0 was taken over by another worker" in capfd.readouterr().err


def test_seeds_and_arms_may_be_added(runs):
    run(runs)
    run(runs, {"top1": ["model.top_k=1"], "top3": ["model.top_k=3"]}, seeds=[0, 1])
    directory = runs / "toy-smoke"
    trials = {(t["arm"], t["seed"]) for t in read_json(directory / "sweep.json")["trials"]}
    assert trials == {("top1", 0), ("top2", 0), ("top1", 1), ("top3", 0), ("top3", 1)}
    assert list(attempts(directory).values()) == [1] * 5


def test_what_the_newest_call_leaves_out_is_waited_for_no_longer(runs):
    arms = {"top1": ["model.top_k=1"], "broken": ["model.top_k=2"]}
    with pytest.raises(RunError):
        run(runs, arms, seeds=[0, 1])
    directory = runs / "toy-smoke"

    def look():
        status = read_status(directory, read_plan(directory))
        return [(trial.label, trial.state) for trial in status.trials], status.left

    renamed = {"top1": arms["top1"], "top2": ["model.top_k=2", "optim.lr=0.1"]}
    run(runs, renamed, seeds=[0])
    written = (directory / "sweep.json").read_text()
    assert look() == ([("top1 s0", "done"), ("top2 s0", "done"), ("top1 s1", "done")], 0)
    run(runs, renamed, seeds=[0])  # as every worker of the same call
    assert (directory / "sweep.json").read_text() == written
    (directory.parent.parent / "fixed").touch()
    with pytest.raises(RunError, match="2 of 4 trials failed"):  # wanted again, they are as they were
        run(runs, arms, seeds=[0, 1])
    assert {("broken s0", "failed"), ("top2 s0", "done")} < set(look()[0])


def test_other_settings_under_the_same_name_are_refused(runs):
    directory = run(runs)
    before = (directory / "sweep.json").read_text()
    message = r"other settings of arm top1 \(trainer.steps: 4 then, 5 now\); start afresh under another name"
    with pytest.raises(UsageError, match=message) as error:
        run(runs, extra=["trainer.steps=5", "trainer.threads=2"])
    assert "\n" not in str(error.value)
    assert (directory / "sweep.json").read_text() == before and list(attempts(directory).values()) == [1, 1]


def test_every_key_of_other_settings_is_named(runs):
    run(runs)
    message = r"\(optim.lr: 0.003 then, 0.1 now; optim.beta1: 0.9 then, 0.8 now; trainer.steps: 4 then, 5 now\)"
    with pytest.raises(UsageError, match=message):
        run(runs, extra=["trainer.steps=5", "optim.lr=0.1", "optim.beta1=0.8"])


def test_trials_that_were_begun_before_a_default_changed_are_refused(runs):
    """A key at its default is no part of an identity, so that these are still found under it."""
    directory = run(runs)
    plan, configs = directory / "sweep.json", list(directory.glob("*/config.yaml"))
    for config in configs:
        config.write_text(config.read_text().replace("beta2: 0.95", "beta2: 0.99"))
    run(runs)  # with the same defaults as ever, nobody looks
    write_json(plan, read_json(plan) | {"defaults": "others"})
    with pytest.raises(UsageError, match=r"other settings of arm top1 \(optim.beta2: 0.99 then, 0.95 now\)"):
        run(runs)
    for config in configs:
        config.write_text(config.read_text().replace("beta2: 0.99", "beta2: 0.95"))
    run(runs)  # a default that these runs do not share with the schema's of before
    assert read_json(plan)["defaults"] != "others" and list(attempts(directory).values()) == [1, 1]


def test_a_damaged_plan_is_one_line(runs):
    directory = run(runs)
    (directory / "sweep.json").write_text('{"trials": [')
    with pytest.raises(UsageError, match=r"sweep\.json is damaged; remove it"):
        run(runs)


def test_arms_that_break_the_match_are_refused_before_anything_runs(runs):
    wider = {"top1": ["model.top_k=1"], "wide": ["model.top_k=1", "model.hidden=64"]}
    with pytest.raises(UsageError, match=r"differ by .*% in total_params \([\d.]+k of top1 to [\d.]+k of wide\)"):
        run_sweep(sweep(match="total_params", **wider), "smoke", extra=[f"runs={runs}"], command=FAKE_TRIAL)
    assert not runs.exists()


def test_one_runner_at_a_time_mirrors_the_sweep(runs, monkeypatch):
    events = []

    class Recorder:
        def __init__(self, *_, **__):
            self.name, self.gone = f"follower {len(events)}", False
            events.append(f"{self.name} starts")

        def end(self):
            events.append(f"{self.name} ends")

    monkeypatch.setattr(runner, "Follower", Recorder)
    config = sweep().trials("smoke", [f"runs={runs}"])[0].config
    first, second = (
        runner._SharedMirror(runs / "toy", config.tracking, config.runs, Heartbeat(), 60) for _ in range(2)
    )
    for mirror in (first, second, first):
        mirror.sync()
    assert events == ["follower 0 starts"]
    first._follower.gone = True  # killed, say
    first.sync()
    first.sync(ended=True)
    second.sync()
    assert events[1:] == ["follower 1 starts", "follower 1 ends", "follower 3 starts"]


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
    assert "88% |" in bar and "2/2 top" in bar and "100% |" in bar
