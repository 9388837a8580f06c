import os
import subprocess
import sys
import time
from pathlib import Path

from mirrored import log, make_sweep, run_of, steps_in_store
from registered import forgotten

from moepp import register
from moepp.records import RunRecord
from moepp.tracking.follower import Follower
from moepp.tracking.mirror import Mirror, follow, sync_all
from moepp.tracking.settings import TrackingConfig


def test_following_mirrors_to_the_end_and_marks_what_was_cut_short(record, runs):
    with follow(Mirror(record, TrackingConfig(), runs)):
        log(record, 1, 3)
    assert steps_in_store(record, runs) == [1, 2, 3]
    assert run_of(record, runs).info.status == "KILLED"


def test_a_run_with_a_logger_of_ones_own_is_mirrored_by_a_process_that_does_not_know_it(record, runs):
    with forgotten():
        register.logger("mine")(lambda record, file="mine.jsonl": None)
        tracking = TrackingConfig(loggers=["mine"], logger_options={"mine": {"file": "other.jsonl"}})
        follower = Follower(record.path, tracking, runs)
    log(record, 1, 2)
    follower.end()
    follower._process.wait()
    assert steps_in_store(record, runs) == [1, 2]


TRAIN_AND_HANG = """
import sys, time
from pathlib import Path
from moepp.records import RunRecord
from moepp.tracking.follower import followed
from moepp.tracking.settings import TrackingConfig
record, runs = sys.argv[1:]
with followed(Path(record), TrackingConfig(), runs):
    for step in (1, 2, 3):
        RunRecord(record).log(step, {"train/loss": 1.0 / step})
    print("logged", flush=True)
    time.sleep(600)
"""


def test_the_follower_of_a_killed_run_mirrors_its_last_steps_and_says_that_it_ended(record, runs):
    command = [sys.executable, "-c", TRAIN_AND_HANG, record.path, runs]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout.readline() == b"logged\n"
    run.kill()
    run.communicate()  # returns when the follower, which shares the pipe of errors, has left
    assert steps_in_store(record, runs) == [1, 2, 3]
    assert run_of(record, runs).info.status == "KILLED"


RUN_SWEEP = """
import sys
runs, tests = sys.argv[1:]
sys.path.insert(0, tests)
from run_fake_sweep import FAKE_TRIAL, no_preparation, preparation, run_sweep, sweep
from moepp.tracking import mirror as tracking
from moepp.sweeps import runner
def start(*arguments, real=runner.Follower, **options):
    follower = real(*arguments, **options)
    print("followed", flush=True)
    return follower
runner.Follower, preparation.prepare, tracking.SECONDS_BETWEEN_PASSES = start, no_preparation, 0.1
options = [f"runs={runs}", "trainer.steps=5000", "tracking=mlflow"]
run_sweep(sweep(), "smoke", 2, options, progress=False, command=FAKE_TRIAL)
"""


def test_the_runs_of_a_killed_worker_of_a_sweep_are_killed_in_mlflow(runs):
    """With the worker die its trials, by the kernel's hand; what mirrors them lives on to say so."""
    tests = Path(__file__).parents[1] / "sweeps"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "SECONDS_PER_STEP": "0.05"}
    command = [sys.executable, "-c", RUN_SWEEP, runs, tests]
    worker = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    directory = runs / "toy-smoke"
    try:
        assert worker.stdout.readline() == b"followed\n"
        while len(list(directory.glob("*/metrics.jsonl"))) < 2 and worker.poll() is None:
            time.sleep(0.02)
    finally:
        worker.kill()
    worker.communicate()  # returns when the follower, which shares the pipe of errors, has left
    trials = [RunRecord(path.parent) for path in directory.glob("*/metrics.jsonl")]
    assert [run_of(record, runs).info.status for record in (*trials, RunRecord(directory))] == ["KILLED"] * 3
    for record in trials:
        assert steps_in_store(record, runs) == [line["step"] for line in record.metrics()]


LET_GO_AND_STAY = """
import time
from moepp.tracking.follower import let_go_of_errors
let_go_of_errors(0.1)
time.sleep(20)
"""


def test_a_pipe_ends_although_the_follower_of_a_run_is_not_done_yet(record, runs):
    """As of `train 2>&1 | tee log`, with a tracker that is slow."""
    follower = Follower(record.path, TrackingConfig(), runs)
    assert Path(f"/proc/{follower._process.pid}/fd/1").readlink() == Path(os.devnull)
    follower.end()
    command = [sys.executable, "-c", LET_GO_AND_STAY]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    slow = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    assert slow.stderr.read() == b"" and slow.poll() is None
    slow.kill()
    slow.wait()


def test_a_follower_takes_the_word_of_its_end_and_leaves_a_sweep_with_true_statuses(runs):
    directory = make_sweep(runs, "sweep-followed")
    (directory / "bbbb" / "done").unlink()
    with RunRecord(directory / "bbbb").lock():  # another worker's
        follower = Follower(directory, TrackingConfig(), runs, folder=True)
        follower.end()
        while not follower.gone:  # on a busy machine it goes on by itself
            time.sleep(0.1)
    statuses = [run_of(RunRecord(directory / name), runs).info.status for name in ("", "aaaa", "bbbb")]
    assert statuses == ["RUNNING", "FINISHED", "RUNNING"]


def test_sync_tells_runs_that_are_trained_from_those_that_were_left(tmp_path):
    directory = make_sweep(tmp_path, "sweep")
    for trial in ("aaaa", "bbbb"):
        (directory / trial / "done").unlink()

    def statuses():
        sync_all(tmp_path, TrackingConfig())
        return [run_of(RunRecord(directory / name), tmp_path).info.status for name in ("", "aaaa", "bbbb")]

    with RunRecord(directory / "bbbb").lock():
        assert statuses() == ["RUNNING", "KILLED", "RUNNING"]
    assert statuses() == ["KILLED", "KILLED", "KILLED"]


def test_a_follower_leaves_the_cores_to_training():
    script = (
        "import os\nfrom pathlib import Path\nfrom moepp.tracking import follower\nfollower._yield_cores()\n"
        "group = Path('/proc/self/autogroup')\n"
        "print(os.nice(0), group.read_text().split()[-1] if group.exists() else follower.NICE)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, env=environment, start_new_session=True, check=True, stdout=subprocess.PIPE)
    assert found.stdout.split() == [b"10", b"10"]
