import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moepp.sweeps import nursery
from moepp.sweeps.nursery import Nursery, can_fork
from moepp.sweeps.runner import TRIAL_COMMAND, _starting

SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setattr(
        nursery, "COMMAND", (sys.executable, str(Path(__file__).with_name("fake_nursery.py")), "nursery")
    )


class Trials:
    """Starts Python code as trials, and reads what they print."""

    def __init__(self, folder: Path, nursery: Nursery):
        self.folder, self.nursery, self.logs = folder, nursery, {}

    def __call__(self, code: str, **environment: str) -> nursery.ForkedTrial:
        number = len(self.logs)
        config, log = self.folder / f"{number}.py", self.folder / f"{number}.txt"
        config.write_text(code)
        trial = self.nursery.start(config, log, environment)
        self.logs[trial.number] = log
        return trial

    def printed(self, trial: nursery.ForkedTrial) -> str:
        return self.logs[trial.number].read_text()

    def pid(self, trial: nursery.ForkedTrial) -> int:
        wait_until(lambda: self.printed(trial).endswith("\n"))
        return int(self.printed(trial))


@pytest.fixture
def trials(tmp_path):
    made = Nursery({"OMP_NUM_THREADS": "3"})
    yield Trials(tmp_path, made)
    made.close()


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_trial_has_its_environment_its_log_and_a_session_of_its_own(trials):
    code = (
        "import os, sys; print(*(os.environ[name] for name in ('ARM', 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS')),"
        " os.getsid(0) == os.getpid(),"
        " sys.argv[1:], repr(sys.stdin.read())); print('a warning', file=sys.stderr)"
    )
    first, second = trials(code, ARM="zero"), trials(code, ARM="copy")
    assert (first.wait(20), second.wait(20)) == (0, 0)
    assert trials.printed(first) == f"zero 3 1 True ['trial', '{trials.folder / '0.py'}'] ''\na warning\n"
    assert trials.printed(second).startswith("copy 3 1 True")


def test_all_trials_are_forks_of_one_process(trials):
    parents = [trials("import os; print(os.getppid())") for _ in range(3)]
    assert [trial.wait(20) for trial in parents] == [0, 0, 0]
    assert len({trials.printed(trial) for trial in parents}) == 1


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise SystemExit(130)", 130),
        ("raise ValueError('a bug')", 1),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("import os; os._exit(0)", 0),
    ],
)
def test_a_trial_that_ends_tells_how(trials, code, expected):
    assert trials(code).wait(20) == expected


def test_trials_are_stopped_and_killed_one_by_one(trials):
    stopped, killed, other = (trials(SLEEP) for _ in range(3))
    pids = [trials.pid(trial) for trial in (stopped, killed, other)]
    stopped.terminate()
    killed.kill()
    assert (stopped.wait(20), killed.wait(20), other.poll()) == (-signal.SIGTERM, -signal.SIGKILL, None)
    assert [gone(pid) for pid in pids] == [True, True, False]
    stopped.kill()  # to no effect: its number is nobody else's
    assert other.poll() is None


def test_one_that_does_not_end_in_time_is_no_error_of_the_nursery(trials):
    deaf = trials(f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}")
    trials.pid(deaf)
    deaf.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        deaf.wait(0.2)
    deaf.kill()
    assert deaf.wait(20) == -signal.SIGKILL


def test_a_request_to_stop_while_the_nursery_loads_is_not_lost(trials, monkeypatch):
    monkeypatch.setenv("SECONDS_TO_LOAD", "0.5")
    trial = trials(SLEEP)
    trial.terminate()
    assert trial.wait(20) == -signal.SIGTERM


def test_signals_to_all_processes_of_a_job_leave_the_nursery_alone(trials):
    saved = "import signal, sys; signal.signal(signal.SIGUSR2, lambda *_: sys.exit(130)); "
    trial = trials(saved + SLEEP)
    pid = trials.pid(trial)
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        os.kill(parent, number)
    time.sleep(0.2)
    assert trial.poll() is None and not gone(parent)
    os.kill(pid, signal.SIGUSR2)
    assert trial.wait(20) == 130


def test_trials_die_with_their_nursery_and_the_next_ones_have_another(trials):
    lost = [trials(SLEEP), trials(SLEEP)]
    pids = [trials.pid(trial) for trial in lost]
    trials.nursery._process.kill()
    assert [trial.wait(20) for trial in lost] == [-signal.SIGKILL] * 2
    wait_until(lambda: all(gone(pid) for pid in pids))
    assert trials("print('again')").wait(20) == 0


def test_a_nursery_that_dies_while_it_loads_leaves_a_log_of_each_trial(trials, monkeypatch):
    monkeypatch.setenv("SECONDS_TO_LOAD", "60")
    lost = [trials(SLEEP), trials(SLEEP)]
    trials.nursery._process.kill()
    assert [trial.wait(20) for trial in lost] == [-signal.SIGKILL] * 2
    assert [trials.printed(trial) for trial in lost] == ["", ""]


def test_what_cannot_be_loaded_is_told_in_the_log(trials, monkeypatch):
    monkeypatch.setenv("BROKEN", "1")
    trial = trials("")
    assert trial.wait(20) == 1
    assert trials.printed(trial).endswith("ImportError: libtorch.so is missing\n")


def start_runner(tmp_path, **variables: str) -> subprocess.Popen:
    """Starts two trials, and prints the nursery's pid."""
    (tmp_path / "0.py").write_text(SLEEP)
    script = (
        "import sys, time; from pathlib import Path; from moepp.sweeps import nursery;"
        f"nursery.COMMAND = {nursery.COMMAND!r}; made = nursery.Nursery({{}}); folder = Path({str(tmp_path)!r});"
        "[made.start(folder / '0.py', folder / f'{n}.txt', {}) for n in range(2)];"
        "print(made._process.pid, flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    return subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)


def test_trials_die_with_the_runner(tmp_path):
    with start_runner(tmp_path) as runner:
        logs = [tmp_path / f"{n}.txt" for n in range(2)]
        wait_until(lambda: all(log.exists() and log.read_text().endswith("\n") for log in logs))
        runner.kill()
    wait_until(lambda: all(gone(int(log.read_text())) for log in logs))


def test_a_nursery_that_still_loads_dies_with_the_runner(tmp_path):
    with start_runner(tmp_path, SECONDS_TO_LOAD="60") as runner:
        pid = int(runner.stdout.readline())
        wait_until(lambda: b"fake_nursery" in Path(f"/proc/{pid}/cmdline").read_bytes())
        time.sleep(1.0)  # it has tied itself to the runner, and loads
        runner.kill()
    wait_until(lambda: gone(pid))


def test_what_trials_load_leaves_no_thread_behind_and_no_gpu_asked():
    """Neither would work in a fork."""
    script = """
import os, torch
def refuse(*_): raise AssertionError("a GPU was asked for")
for name in ("_cuda_getDeviceCount", "_cuda_init"):
    if hasattr(torch._C, name): setattr(torch._C, name, refuse)
torch.cuda.is_available = torch.cuda.device_count = refuse
from moepp.sweeps.trial import load_libraries
load_libraries()
print(len(os.listdir("/proc/self/task")))
"""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert (output.stdout, output.returncode) == ("1\n", 0), output.stderr


@pytest.mark.parametrize(
    ("command", "slot", "forked"),
    [
        (TRIAL_COMMAND, {}, True),
        (list(TRIAL_COMMAND), {}, True),
        (TRIAL_COMMAND, {"CUDA_VISIBLE_DEVICES": "0"}, False),
        (("another", "command"), {}, False),
    ],
)
def test_a_runner_forks_its_own_trials(command, slot, forked):
    with _starting(command, [slot]) as start:
        assert isinstance(getattr(start, "__self__", None), Nursery) == forked


def test_only_trials_without_gpus_are_forked(monkeypatch):
    assert can_fork([{"OMP_NUM_THREADS": "1"}])
    assert not can_fork([{}, {"CUDA_VISIBLE_DEVICES": "0"}])
    monkeypatch.delattr(os, "pidfd_open")
    assert not can_fork([{}])
