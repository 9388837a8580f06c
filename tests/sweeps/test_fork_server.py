import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import run_fake_sweep
import torch

from moepp.sweeps import fork_server
from moepp.sweeps.fork_server import ForkServer, can_fork
from moepp.sweeps.runner import _starting, run_sweep
from moepp.sweeps.trial import TRIAL_COMMAND
from moepp.training.settings import TrainerConfig

REAL_COMMAND = fork_server.COMMAND
TOUCH_GPU = "gpu = open('/dev/zero')"
LOAD = "from moepp.sweeps.trial import load_libraries; load_libraries()"
SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
GPU = torch.cuda.is_available()


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not GPU, reason="needs a CUDA device")(test))


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setattr(
        fork_server, "COMMAND", (sys.executable, str(Path(__file__).with_name("fake_fork_server.py")), "fork-server")
    )


class Trials:
    """Starts Python code as trials, and reads what they print."""

    def __init__(self, folder: Path, server: ForkServer):
        self.folder, self.server, self.logs = folder, server, {}

    def __call__(self, code: str, **environment: str) -> fork_server.ForkedTrial:
        number = len(self.logs)
        config, log = self.folder / f"{number}.py", self.folder / f"{number}.txt"
        config.write_text(code)
        trial = self.server.start(config, log, environment)
        self.logs[trial.number] = log
        return trial

    def printed(self, trial: fork_server.ForkedTrial) -> str:
        return self.logs[trial.number].read_text()

    def pid(self, trial: fork_server.ForkedTrial) -> int:
        wait_until(lambda: self.printed(trial).endswith("\n"))
        return int(self.printed(trial))


@pytest.fixture
def trials(tmp_path):
    made = ForkServer({"OMP_NUM_THREADS": "3"})
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


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="sessions share the cores alike here")
def test_the_sessions_of_trials_are_as_nice_as_their_server(trials, monkeypatch):
    monkeypatch.setattr(fork_server, "COMMAND", ("nice", "-n", "7", *fork_server.COMMAND))
    trial = trials("print(open('/proc/self/autogroup').read().split()[-1], __import__('os').nice(0))")
    nice = min(os.nice(0) + 7, 19)
    assert trial.wait(20) == 0 and trials.printed(trial) == f"{nice} {nice}\n"


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


def test_one_that_does_not_end_in_time_is_no_error_of_the_server(trials):
    deaf = trials(f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}")
    trials.pid(deaf)
    deaf.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        deaf.wait(0.2)
    deaf.kill()
    assert deaf.wait(20) == -signal.SIGKILL


def test_a_request_to_stop_while_the_server_loads_is_not_lost(trials, monkeypatch):
    monkeypatch.setenv("WHILE_LOADING", "import time; time.sleep(0.5)")
    trial = trials(SLEEP)
    trial.terminate()
    assert trial.wait(20) == -signal.SIGTERM


def test_signals_to_all_processes_of_a_job_leave_the_server_alone(trials):
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


def test_trials_die_with_their_server_and_the_next_ones_have_another(trials):
    lost = [trials(SLEEP), trials(SLEEP)]
    pids = [trials.pid(trial) for trial in lost]
    trials.server._process.kill()
    assert [trial.wait(20) for trial in lost] == [-signal.SIGKILL] * 2
    wait_until(lambda: all(gone(pid) for pid in pids))
    assert trials("print('again')").wait(20) == 0


def test_a_server_that_dies_while_it_loads_leaves_a_log_of_each_trial(trials, monkeypatch):
    monkeypatch.setenv("WHILE_LOADING", "import time; time.sleep(60)")
    lost = [trials(SLEEP), trials(SLEEP)]
    trials.server._process.kill()
    assert [trial.wait(20) for trial in lost] == [-signal.SIGKILL] * 2
    assert [trials.printed(trial) for trial in lost] == ["", ""]


def test_what_cannot_be_loaded_is_told_in_the_log(trials, monkeypatch):
    monkeypatch.setenv("WHILE_LOADING", "raise ImportError('libtorch.so is missing')")
    trial = trials("")
    assert trial.wait(20) == 1
    assert trials.printed(trial).endswith("ImportError: libtorch.so is missing\n")


def test_trials_load_anew_where_loading_has_initialised_a_gpu(trials, monkeypatch):
    monkeypatch.setenv("WHILE_LOADING", TOUCH_GPU)
    code = (
        "import os, sys; print('moepp.cli' in sys.modules, os.environ['ARM'], os.getsid(0) == os.getpid(),"
        " repr(sys.stdin.read()))"
    )
    first, second = trials(code, ARM="zero"), trials(code, ARM="copy")
    assert (first.wait(20), second.wait(20)) == (0, 0)
    warning, *lines = trials.printed(first).splitlines()
    assert warning == "warning: what trials load has initialised a GPU, which no fork can use; they load anew"
    assert (lines, trials.printed(second)) == (["False zero True ''"], "False copy True ''\n")


def test_trials_that_load_anew_end_as_forks_do(trials, monkeypatch):
    monkeypatch.setenv("WHILE_LOADING", TOUCH_GPU)
    failing, stopped, lost = trials("raise SystemExit(7)"), trials(SLEEP), trials(SLEEP)
    pids = [trials.pid(stopped), trials.pid(lost)]
    stopped.terminate()
    assert (failing.wait(20), stopped.wait(20), lost.poll()) == (7, -signal.SIGTERM, None)
    trials.server._process.kill()
    wait_until(lambda: all(gone(pid) for pid in pids))


def test_a_trial_sees_the_gpus_of_its_slot_and_not_what_the_server_counted(trials, monkeypatch):
    eight = "torch.cuda._is_compiled, torch.cuda._raw_device_count_nvml = (lambda: True), (lambda: 8)"
    monkeypatch.setenv("WHILE_LOADING", f"import torch; {eight}; print(torch.cuda.device_count(), flush=True)")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    count = "import torch; print(torch.cuda.device_count())"
    two, one = trials(count, CUDA_VISIBLE_DEVICES="4,5"), trials(count, CUDA_VISIBLE_DEVICES="6")
    assert (two.wait(60), one.wait(60)) == (0, 0)
    assert (trials.printed(two), trials.printed(one)) == ("8\n2\n", "1\n")


@on_gpu
@pytest.mark.parametrize(
    ("load", "forked"),
    [
        (LOAD, True),
        ("import torch; torch.cuda.device_count()", True),
        ("import torch; torch.cuda.init()", False),
        ("import torch; torch._C._cuda_getDeviceCount()", False),
    ],
)
def test_trials_compute_on_a_gpu_whatever_was_loaded(trials, monkeypatch, load, forked):
    monkeypatch.setenv("WHILE_LOADING", load)
    code = "import sys, torch; print('moepp.cli' in sys.modules, torch.ones(3, device='cuda').sum().item())"
    both = [trials(code, CUDA_VISIBLE_DEVICES="0") for _ in range(2)]
    assert [trial.wait(120) for trial in both] == [0, 0], [trials.printed(trial) for trial in both]
    assert [trials.printed(trial).splitlines()[-1] for trial in both] == [f"{forked} 3.0"] * 2


@on_gpu
def test_a_sweep_on_a_gpu_forks_its_trials(monkeypatch, overrides):
    monkeypatch.setattr(fork_server, "COMMAND", REAL_COMMAND)
    extra = [*overrides, "trainer.accelerator=gpu", "trainer.precision=bf16-mixed"]
    directory = run_sweep(run_fake_sweep.sweep(), "smoke", 2, extra, progress=False)
    assert len(list(directory.glob("*/done"))) == 2
    assert not any("load anew" in log.read_text() for log in directory.glob("*/log.txt"))


def start_runner(tmp_path, **variables: str) -> subprocess.Popen:
    """Starts two trials, and prints the server's pid."""
    (tmp_path / "0.py").write_text(SLEEP)
    script = (
        "import sys, time; from pathlib import Path; from moepp.sweeps import fork_server;"
        f"fork_server.COMMAND = {fork_server.COMMAND!r}; made = fork_server.ForkServer({{}});"
        f"folder = Path({str(tmp_path)!r});"
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


def test_a_server_that_still_loads_dies_with_the_runner(tmp_path):
    with start_runner(tmp_path, WHILE_LOADING="import time; time.sleep(60)") as runner:
        pid = int(runner.stdout.readline())
        wait_until(lambda: b"fake_fork_server" in Path(f"/proc/{pid}/cmdline").read_bytes())
        time.sleep(1.0)  # it has tied itself to the runner, and loads
        runner.kill()
    wait_until(lambda: gone(pid))


def test_what_trials_load_leaves_no_thread_behind_and_no_gpu_asked():
    """Neither would work in a fork."""
    script = """
import os, torch
asked = []
def refuse(name): return lambda *_: asked.append(name) or 1 / 0
for name in ("_cuda_getDeviceCount", "_cuda_init"):
    if hasattr(torch._C, name): setattr(torch._C, name, refuse(name))
for name in ("is_available", "device_count", "_device_count_nvml", "_lazy_init"):
    setattr(torch.cuda, name, refuse(name))
from moepp.sweeps.fork_server import _holds_gpu
from moepp.sweeps.trial import load_libraries
load_libraries()
print(asked, _holds_gpu(), len(os.listdir("/proc/self/task")))
"""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)  # conftest's: on a GPU kernels are built otherwise
    output = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert (output.stdout, output.returncode) == ("[] False 1\n", 0), output.stderr


@pytest.mark.parametrize(
    ("command", "allocation", "forked"),
    [
        (TRIAL_COMMAND, {}, True),
        (list(TRIAL_COMMAND), {}, True),
        (TRIAL_COMMAND, {"CUDA_VISIBLE_DEVICES": "0"}, True),
        (("another", "command"), {}, False),
    ],
)
def test_a_runner_forks_its_own_trials(command, allocation, forked):
    with _starting(command, [allocation], TrainerConfig()) as start:
        assert isinstance(getattr(start, "__self__", None), ForkServer) == forked


def test_trials_are_forked_where_the_system_can_watch_them(monkeypatch):
    assert can_fork()
    monkeypatch.delattr(os, "pidfd_open")
    assert not can_fork()
