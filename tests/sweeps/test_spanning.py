import os
import signal
import stat
import sys
from types import SimpleNamespace

import pytest

from moepp.errors import UsageError
from moepp.sweeps.allocations import allocate
from moepp.sweeps.spanning import is_far_from_worker, refuse_too_many_nodes, start_step
from moepp.training.settings import TrainerConfig

# A step of one task: it passes SIGUSR2 on and kills its task at SIGTERM, as Slurm's srun does.
SRUN = """#!{python}
import os, signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("-"):
    words.pop(0)
task = subprocess.Popen(words)
signal.signal(signal.SIGUSR2, lambda number, _: task.send_signal(number))
signal.signal(signal.SIGTERM, lambda *_: task.kill())
open("srun.txt", "w").write(" ".join(sys.argv[1:]))
code = task.wait()
sys.exit(code if code >= 0 else 128 - code)
"""
TASK = """
import os, signal, sys, time
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(130))
print("parent", os.environ.get("MOEPP_PARENT_PID"), "trial", os.environ["TRIAL"], sys.argv[1], flush=True)
time.sleep(60)
"""


def trial(nodes):
    return SimpleNamespace(arm="wide", config=SimpleNamespace(trainer=TrainerConfig(num_nodes=nodes)))


@pytest.mark.parametrize(("job", "nodes"), [(None, None), ("1", None), (None, 1), ("4", 1)])
def test_a_trial_over_two_nodes_needs_a_job_of_two(monkeypatch, job, nodes):
    monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)
    if job:
        monkeypatch.setenv("SLURM_JOB_NUM_NODES", job)
    with pytest.raises(UsageError, match=r"trainer\.num_nodes=2 \(arm wide\): .* job of 2 nodes; add launcher=slurm"):
        refuse_too_many_nodes([trial(1), trial(2)], nodes)
    refuse_too_many_nodes([trial(1)], nodes)


@pytest.mark.parametrize(("job", "nodes"), [("2", None), (None, 8)])
def test_in_such_a_job_or_for_one_it_is_let_through(monkeypatch, job, nodes):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", job or "1")
    refuse_too_many_nodes([trial(2)], nodes)


def test_a_trial_over_several_nodes_has_all_of_its_job(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    trainer = TrainerConfig(num_nodes=2, devices=2, accelerator="cpu")
    assert [allocation["OMP_NUM_THREADS"] for allocation in allocate(3, trainer)] == ["4"]


@pytest.mark.parametrize(
    ("variables", "far"),
    [
        ({}, False),
        ({"SLURM_NODEID": "1"}, False),  # of the worker itself, which somebody started on several nodes
        ({"SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "4"}, False),
        ({"SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "4"}, True),
    ],
)
def test_beats_are_watched_where_they_are_seen_in_time(monkeypatch, variables, far):
    for name in ("SLURM_NODEID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_far_from_worker() == far


@pytest.fixture
def step(tmp_path, monkeypatch):
    srun = tmp_path / "srun"
    srun.write_text(SRUN.format(python=sys.executable))
    srun.chmod(srun.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "task.py").write_text(TASK)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    trainer = TrainerConfig(num_nodes=2, devices=3, accelerator="cpu")
    command = [sys.executable, "task.py"]
    process = start_step(command, trainer, tmp_path / "config.yaml", tmp_path / "log.txt", {"TRIAL": "here"})
    while "config.yaml" not in (tmp_path / "log.txt").read_text():
        assert process.poll() is None
    yield process, tmp_path
    process.kill()
    process.wait()


def test_a_step_has_a_task_for_each_device_which_is_no_child_of_the_worker(step):
    _, folder = step
    asked = (folder / "srun.txt").read_text()
    assert all(word in asked for word in ("--overlap", "--nodes=2", "--ntasks=6", "--ntasks-per-node=3"))
    assert (folder / "log.txt").read_text() == f"parent None trial here {folder / 'config.yaml'}\n"


def test_tasks_that_are_asked_to_stop_may_save_and_leave(step):
    process, _ = step
    process.terminate()
    assert process.wait(20) == process.returncode == 130


def test_tasks_are_killed_through_srun(step):
    process, _ = step
    process.kill()
    assert process.wait(20) == 128 + signal.SIGKILL
