import os
import signal
import stat
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import run_fake_sweep

from moepp.config import compose_kind
from moepp.errors import Interrupted, RunError, UsageError
from moepp.records import RunRecord, read_json
from moepp.sweeps.launchers import LAUNCHERS, launch, split
from moepp.sweeps.launchers.call import SweepCall
from moepp.sweeps.launchers.ray import RayLauncher
from moepp.sweeps.launchers.slurm import SlurmPool, Worker, _queue
from moepp.sweeps.launchers.worker_pool import begin_elsewhere, wait

SUBMITIT = "the extra `slurm` is not installed"
LOCAL_JOBS = ["launcher=slurm", "launcher.cluster=local"]
EACH_STEP = list(range(1, 21))


@pytest.fixture
def call(tmp_path, monkeypatch):
    """A sweep of two fake trials of 20 steps; its workers are those of run_fake_sweep."""
    monkeypatch.setattr("moepp.data.prepare.prepare", run_fake_sweep.no_preparation)
    monkeypatch.setattr("moepp.sweeps.reading.read_sweep", lambda name: run_fake_sweep.sweep())
    monkeypatch.setattr("moepp.sweeps.launchers.worker_pool.LOOK_SECONDS", 0.1)
    monkeypatch.setenv("SECONDS_PER_STEP", "0.05")
    worker = [sys.executable, str(Path(run_fake_sweep.__file__)), str(tmp_path / "runs"), '{"one_share": true}']
    monkeypatch.setattr(SweepCall, "work", lambda self: worker)
    return SweepCall("toy", "smoke", overrides=[f"runs={tmp_path / 'runs'}", "trainer.steps=20"])


def each_step_once(directory):
    records = [RunRecord(directory / trial["path"]) for trial in read_json(directory / "sweep.json")["trials"]]
    steps = [[line["step"] for line in record.metrics() if "train/loss" in line] for record in records]
    return {record.status for record in records} == {"done"} and steps == [EACH_STEP] * len(records)


def attempts(directory):
    return sorted(len(path.read_text().splitlines()) for path in directory.glob("*/attempts"))


def in_the_background(action, condition, seconds=40):
    """Waits for the condition and acts, beside the launcher that occupies the main thread."""

    def act():
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
        action()

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def logged_some(directory):
    return any(len(RunRecord(path.parent).metrics()) > 1 for path in directory.glob("*/metrics.jsonl"))


def children(process):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == process:
                found.append(int(path.parent.name))
        except OSError:  # it has ended
            continue
    return found


def test_words_for_the_launcher_stand_anywhere_and_reach_no_run():
    words = ["model.top_k=1", "launcher.gpus=2", "launcher=slurm", "launcher.parameters.account=me", "size=tiny"]
    chosen, rest = split(words)
    assert rest == ["model.top_k=1", "size=tiny"]
    launcher = compose_kind("launcher", LAUNCHERS, chosen)
    assert (launcher.gpus, launcher.parameters, launcher.minutes) == (2, {"account": "me"}, 240)
    assert type(compose_kind("launcher", LAUNCHERS, [])) is LAUNCHERS["local"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launcher=slrum"], "no such fragment; choose from local, ray, slurm; did you mean slurm"),
        (["launcher=slurm", "launcher.partitoin=gpu"], r"unknown key launcher\.partitoin; did you mean launcher\.part"),
        (["launcher=ray", "launcher.partition=gpu"], r"unknown key launcher\.partition"),
        (["launcher.cpus=2"], r"launcher\.cpus"),
        (["launcher=slurm", "launcher.minutes=soon"], r"launcher\.minutes=soon must be a whole number"),
        (["launcher=slurm", "launcher.minutes=0"], r"launcher\.minutes=0 must be at least 1"),
        (["launcher=slurm", "launcher.gpus=-1"], r"launcher\.gpus=-1 must not be negative"),
        (["launcher=ray", "launcher.cpus=0"], r"launcher\.cpus=0 must be at least 1"),
    ],
)
def test_a_word_that_no_launcher_knows_is_one_line(call, words, message):
    with pytest.raises(UsageError, match=message) as error:
        launch(call, words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("launcher", "package"), [("slurm", "submitit"), ("ray", "ray")])
def test_a_missing_extra_is_named(call, launcher, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=f"pip install {package}"):
        launch(call, [f"launcher={launcher}"])


class FakePool:
    name, left = "pool", 0

    def __init__(self, logs, looks):
        self.logs, self.looks, self.dismissed = logs, looks, False

    def alive(self):
        self.looks -= 1
        return max(0, self.looks)

    def dismiss(self):
        self.dismissed = True

    def leave(self):
        return "it goes on"


def test_workers_that_end_early_are_reported_with_their_logs(call):
    directory, _, left = begin_elsewhere(call)
    assert left == 2
    pool = FakePool(directory / "logs", looks=2)
    with pytest.raises(RunError, match=r"pool ended with 2 trials unfinished; see .*logs; the same command"):
        wait(call, directory, pool)


def test_failed_trials_end_the_call_as_on_this_machine(call):
    directory, _, _ = begin_elsewhere(call)
    for trial in read_json(directory / "sweep.json")["trials"]:
        record = RunRecord(directory / trial["path"])
        for _ in range(2):  # once more than it is tried again
            record.crash("no memory")
        record.fail("no memory")
    pool = FakePool(directory, looks=3)
    with pytest.raises(RunError, match=r"2 of 2 trials failed; .*sweep retry toy.*top1 s0: no memory"):
        wait(call, directory, pool)
    assert pool.dismissed


def test_stopping_to_wait_says_what_becomes_of_the_workers(call):
    directory, _, _ = begin_elsewhere(call)
    timer = threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGTERM])
    timer.start()
    with pytest.raises(Interrupted, match="0 of 2 trials are finished; it goes on; the same command continues"):
        wait(call, directory, FakePool(directory, looks=10**6))


def test_jobs_run_a_sweep_and_one_that_is_preempted_is_queued_again(call, tmp_path):
    pytest.importorskip("submitit", reason=SUBMITIT)
    directory = tmp_path / "runs" / "toy-smoke"

    def preempt():
        (job,) = read_json(directory / "slurm" / "jobs.json")["local"]
        (task,) = children(int(job))
        os.kill(task, signal.SIGUSR2)

    thread = in_the_background(preempt, lambda: logged_some(directory))
    assert launch(SweepCall("toy", "smoke", 1, call.overrides), [*LOCAL_JOBS, "launcher.gpus=0"]) == directory
    thread.join()
    assert each_step_once(directory)
    assert attempts(directory) == [1, 2]  # the trial that was stopped went on, and neither began anew
    assert not list(directory.glob("*/crashes.json"))
    assert "Requeued job" in "".join(path.read_text() for path in (directory / "slurm").glob("*_log.out"))
    logs = sorted((directory / "slurm").glob("*_log.out"))
    assert launch(call, LOCAL_JOBS) == directory
    assert sorted((directory / "slurm").glob("*_log.out")) == logs  # nothing is left, so no job is started


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder of programs that stand in for Slurm's; `submitted` lists the scripts that its sbatch was given."""
    folder = tmp_path / "slurm"
    folder.mkdir()

    def program(name, script):
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    program("srun", "exit 1")
    program("sbatch", f'cp "$1" {folder}/submitted-$(ls {folder} | wc -l); echo Submitted batch job 77')
    program("sacct", r"printf 'JobID|State|NodeList\n77_[0-1]|PENDING|none\n'")
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder, program


def test_slurm_is_asked_for_an_array_of_workers_once(call, slurm, capsys):
    pytest.importorskip("submitit", reason=SUBMITIT)
    folder, _ = slurm
    words = ["launcher=slurm", "launcher.wait=false", "launcher.partition=gpus", "launcher.parameters.account=me"]
    words += ["launcher.minutes=90", "launcher.cpus=6"]
    two_devices = SweepCall("toy", "smoke", overrides=[*call.overrides, "strategy=ddp", "trainer.devices=2"])
    for _ in range(2):
        assert launch(two_devices, words) is None
    out = capsys.readouterr().out
    shows = f"`python run.py sweep status toy --scale smoke {call.overrides[0]}`"
    assert out == f"job 77: 2 workers queued or running; {shows} shows\n" * 2
    (script,) = folder.glob("submitted-*")  # the second call found the jobs of the first
    for asked in (
        "array=0-1%2", "signal=USR2@150", "partition=gpus", "account=me", "time=90", "cpus-per-task=6",
        "gpus-per-node=2", "ntasks-per-node=1", "nodes=1", "requeue", "job-name=toy-smoke",
    ):  # fmt: skip
        assert f"#SBATCH --{asked}\n" in script.read_text()


def test_what_sbatch_refuses_is_one_line(call, slurm):
    pytest.importorskip("submitit", reason=SUBMITIT)
    slurm[1]("sbatch", "echo 'sbatch: error: invalid partition specified: gpus' >&2; exit 1")
    with pytest.raises(RunError, match=r"sbatch refused the workers: .*invalid partition specified: gpus") as error:
        launch(call, ["launcher=slurm"])
    assert "\n" not in str(error.value)


def test_a_cluster_without_gpus_hears_of_the_key(call, slurm):
    pytest.importorskip("submitit", reason=SUBMITIT)
    slurm[1]("sbatch", "echo 'sbatch: error: Invalid generic resource (gres) specification' >&2; exit 1")
    with pytest.raises(RunError, match=r"\(gres\) specification; on a cluster without GPUs set launcher\.gpus=0$"):
        launch(call, ["launcher=slurm", "launcher.gpus=1"])
    with pytest.raises(RunError, match=r"\(gres\) specification$"):
        launch(call, ["launcher=slurm", "launcher.gpus=0"])
    slurm[1]("sbatch", f'cp "$1" {slurm[0]}/submitted; echo Submitted batch job 77')
    launch(call, ["launcher=slurm", "launcher.gpus=0", "launcher.wait=false"])
    assert "--gpus" not in (slurm[0] / "submitted").read_text()  # which such a cluster refuses even with 0


def test_a_trial_over_two_nodes_has_a_job_of_two_in_which_the_worker_takes_no_room(call, slurm):
    pytest.importorskip("submitit", reason=SUBMITIT)
    two_nodes = [*call.overrides, "strategy=ddp", "trainer.num_nodes=2", "trainer.devices=2"]
    launch(SweepCall("toy", "smoke", overrides=two_nodes), ["launcher=slurm", "launcher.wait=false"])
    (script,) = slurm[0].glob("submitted-*")
    assert "#SBATCH --nodes=2\n" in script.read_text()
    assert "--nodes=1 --ntasks=1 --overlap" in script.read_text()


@pytest.mark.parametrize(
    ("code", "state", "asked"),
    [
        (130, "RUNNING", True),  # the worker has saved
        (143, "RUNNING", True),  # the signal came before Python
        (140, "RUNNING", True),
        (130, "COMPLETING", False),  # scancel, or Slurm itself queues it again
        (137, "RUNNING", False),
        (1, "RUNNING", False),
        (0, "RUNNING", False),
    ],
)
def test_a_job_that_is_asked_to_stop_has_itself_queued_again(call, slurm, code, state, asked):
    pytest.importorskip("submitit", reason=SUBMITIT)
    folder, program = slurm
    launch(call, ["launcher=slurm", "launcher.gpus=0", "launcher.wait=false"])
    (script,) = folder.glob("submitted-*")
    program("srun", f"exit {code}")
    program("squeue", f"echo {state}")
    program("scontrol", f'echo "$@" > {folder}/asked')
    for place, job in (
        ({}, "78"),
        ({"SLURM_ARRAY_JOB_ID": "78", "SLURM_ARRAY_TASK_ID": "1"}, "78_1"),  # the last of an array has its number
    ):
        ended = subprocess.run(["bash", script], env=os.environ | {"SLURM_JOB_ID": "78"} | place)
        assert ended.returncode == code and (folder / "asked").exists() == asked
        assert not asked or (folder / "asked").read_text() == f"requeue {job}\n"


@pytest.mark.parametrize(
    ("code", "left_with"), [(130, 130), (-signal.SIGTERM, 130), (-signal.SIGKILL, None), (1, None)]
)
def test_a_worker_tells_its_job_that_it_was_stopped(code, left_with, monkeypatch, tmp_path):
    submitit = pytest.importorskip("submitit", reason=SUBMITIT)
    monkeypatch.chdir(tmp_path)
    here = SimpleNamespace(paths=SimpleNamespace(folder=tmp_path), job_id="78_0")
    monkeypatch.setattr(submitit, "JobEnvironment", lambda: here)
    worker = Worker([sys.executable, "-c", f"import os, sys; {ending(code)}"], tmp_path, 1.0)
    if left_with is None:
        assert worker() == code
    else:
        with pytest.raises(SystemExit) as left:
            worker()
        assert left.value.code == left_with


def ending(code):
    return f"os.kill(os.getpid(), {-code})" if code < 0 else f"sys.exit({code})"


def test_jobs_that_were_just_submitted_are_looked_for_in_the_queue_of_now(call, slurm, capsys):
    pytest.importorskip("submitit", reason=SUBMITIT)
    folder, program = slurm
    program("squeue", f"ls {folder}/submitted-* > /dev/null 2>&1 && printf '77_0 RUNNING\\n77_1 PENDING\\n'; exit 0")
    launch(call, ["launcher=slurm", "launcher.gpus=0", "launcher.wait=false"])
    assert capsys.readouterr().out.startswith("job 77: 1 workers running, 1 queued; ")


def test_filters_that_people_set_for_squeue_hide_no_job(call, slurm, monkeypatch):
    slurm[1]("squeue", '[ -z "$SQUEUE_STATES" ] && echo 77_0 PENDING; exit 0')
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    assert _queue() == {"77_0": "PENDING"}


@pytest.mark.parametrize(
    ("sacct", "squeue", "alive"),
    [
        ("echo 'Slurm accounting storage is disabled' >&2; exit 1", "echo 77_1 RUNNING", 1),  # the other was cancelled
        ("printf 'JobID|State|NodeList\\n77_[0-1]|RUNNING|n1\\n'", "", 0),  # stale
        ("printf 'JobID|State|NodeList\\n77_0|CANCELLED|n1\\n77_1|RUNNING|n1\\n'", "exit 1", 1),
        ("exit 1", "exit 1", 2),  # nobody knows
    ],
)
def test_the_queue_says_which_jobs_are_left(call, slurm, sacct, squeue, alive, capfd):
    pytest.importorskip("submitit", reason=SUBMITIT)
    from submitit import SlurmJob

    SlurmJob.watcher.clear()
    launch(call, ["launcher=slurm", "launcher.gpus=0", "launcher.wait=false"])
    capfd.readouterr()
    slurm[1]("sacct", sacct)
    slurm[1]("squeue", squeue)
    assert SlurmPool(call.load().folder("smoke", call.overrides), "slurm").alive() == alive
    assert "sacct" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("words", "overrides", "message"),
    [
        (["launcher.minutes=3"], [], r"launcher\.minutes=3: .* 150 s before its end .* set it to 4 at least"),
        (["launcher.minutes=240"], ["trainer.stop_s=20000"], r"minutes=240: .*stop_s=20000 .* set it to 335 at least"),
        (
            ["launcher.cluster=local"],
            ["strategy=ddp", "trainer.num_nodes=2"],
            r"trainer\.num_nodes=2 \(arm \w+\): .*needs a Slurm job of 2 nodes",
        ),
    ],
)
def test_jobs_that_could_not_train_are_not_submitted(call, slurm, words, overrides, message):
    pytest.importorskip("submitit", reason=SUBMITIT)
    with pytest.raises(UsageError, match=message):
        launch(SweepCall("toy", "smoke", overrides=[*call.overrides, *overrides]), ["launcher=slurm", *words])
    assert not list(slurm[0].glob("submitted-*"))


def test_trials_that_run_are_counted_in_place_of_jobs_that_wait(call, capsys):
    directory, _, _ = begin_elsewhere(call)
    with pytest.raises(RunError, match="pool ended"):
        wait(call, directory, FakePool(directory, looks=3))
    assert "0/2 trials, 0 running" in capsys.readouterr().err


def test_a_machine_without_slurm_says_so(call, monkeypatch):
    pytest.importorskip("submitit", reason=SUBMITIT)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="there is no sbatch on the PATH"):
        launch(call, ["launcher=slurm"])


def test_ray_runs_a_sweep_and_starts_a_lost_worker_again(call, tmp_path):
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    directory = tmp_path / "runs" / "toy-smoke"
    log = directory / "ray" / "worker-0.txt"

    def lose_the_node():
        (worker,) = [p for p in children_of_ray() if any(str(directory.parent) in command(c) for c in children(p))]
        os.kill(worker, signal.SIGKILL)

    thread = in_the_background(lose_the_node, lambda: logged_some(directory))
    assert launch(SweepCall("toy", "smoke", 1, call.overrides), ["launcher=ray", "launcher.address=local"]) == directory
    thread.join()
    assert each_step_once(directory) and attempts(directory) == [1, 2] and log.exists()
    assert not ray.is_initialized()


def children_of_ray():
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if command(int(path.name)).startswith("ray::")]


def command(process):
    try:
        return Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def test_a_ray_cluster_that_is_not_there_is_one_line(call):
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    with pytest.raises(UsageError, match=r"no Ray cluster answers at 127\.0\.0\.1:1") as error:
        launch(call, ["launcher=ray", "launcher.address=127.0.0.1:1"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("host", "address", "mode"),
    [
        ("127.0.0.1", "127.0.0.1", "token"),
        ("[::1]", "::1", "token"),
        ("head", "10.0.0.1", "token"),
        ("far", "10.0.0.2", None),
    ],
)
def test_a_ray_head_on_this_machine_is_shown_its_token(monkeypatch, tmp_path, host, address, mode):
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "")  # remembered, so that what the launcher sets is undone
    monkeypatch.delenv("RAY_AUTH_MODE")
    own = address if mode else "10.0.0.1"
    connection = SimpleNamespace(getsockname=lambda: (own, 1), getpeername=lambda: (address, 6379))
    asked = []
    monkeypatch.setattr("socket.create_connection", lambda place, _: asked.append(place) or nullcontext(connection))
    seen = []
    ray = SimpleNamespace(init=lambda *_, **__: seen.append(os.environ.get("RAY_AUTH_MODE")), shutdown=lambda: None)
    with RayLauncher(address=f"{host}:6379")._connected(ray):
        assert seen == [mode] and asked == [(host.strip("[]"), 6379)]


def test_a_job_that_is_preempted_gives_its_worker_its_time():
    waited = []

    class Stopping:
        def terminate(self):
            waited.append("asked")

        def wait(self, seconds):
            waited.append(seconds)

    worker = Worker(["work"], Path("here"), 135.0)
    worker._process = Stopping()
    again = worker.checkpoint().function
    assert waited == ["asked", 135.0]
    assert (again.command, again.folder, again.seconds_to_stop) == (["work"], Path("here"), 135.0)
