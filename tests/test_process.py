import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moepp.process import cause_of_end, die_with_parent, no_collections, start


def test_a_process_without_a_runner_lives_on(monkeypatch):
    monkeypatch.delenv("MOEPP_PARENT_PID", raising=False)
    die_with_parent()


def test_a_process_whose_runner_is_already_gone_ends_at_once():
    script = "from moepp.process import die_with_parent; die_with_parent(); print('alive')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MOEPP_PARENT_PID": "1999999999"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"")


@pytest.mark.parametrize(("handler", "outcome"), [(signal.SIG_DFL, "asked"), (signal.SIG_IGN, "not asked")])
def test_a_closed_terminal_is_a_request_to_stop_unless_nohup_was_there(handler, outcome):
    script = (
        "import os, signal\nfrom moepp.process import stop_requests\n"
        "with stop_requests() as stop:\n    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    print('asked' if stop.wait(0.1) else 'not asked')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, handler),
    )  # fmt: skip
    assert done.stdout == f"{outcome}\n", done.stderr


def test_a_trial_starts_in_its_own_session_with_its_slot(tmp_path):
    log = tmp_path / "log.txt"
    script = (
        "import os; print(os.getsid(0) == os.getpid(), os.environ['OMP_NUM_THREADS'], os.environ['MOEPP_PARENT_PID'])"
    )
    assert start([sys.executable, "-c", script], log, {"OMP_NUM_THREADS": "3"}).wait() == 0
    assert log.read_text().split() == ["True", "3", str(os.getpid())]


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="sessions share the cores alike here")
def test_the_session_of_a_child_is_as_nice_as_what_started_it(tmp_path):
    """Without that, Linux gives a sweep that was asked to leave the cores to others as many as they get."""
    child = (
        "import os\nfrom pathlib import Path\nfrom moepp.process import die_with_parent\ndie_with_parent()\n"
        "print(os.nice(0), Path('/proc/self/autogroup').read_text().split()[-1])"
    )
    parent = (
        f"import os, sys\nfrom pathlib import Path\nfrom moepp.process import start\nos.nice(7)\n"
        f"start([sys.executable, '-c', {child!r}], Path(sys.argv[1]), {{}}).wait()"
    )
    log = tmp_path / "log.txt"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", parent, log], env=environment, check=True)
    assert log.read_text().split() == ["7", "7"]


def test_a_child_is_no_rank_of_what_started_its_parent(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    script = "import os; print({'TORCHELASTIC_RUN_ID', 'SLURM_STEP_NUM_TASKS'} & set(os.environ))"
    assert start([sys.executable, "-c", script], tmp_path / "log.txt", {}).wait() == 0
    assert (tmp_path / "log.txt").read_text() == "set()\n"


def test_cause_of_end_names_the_signal_and_the_last_line(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("step 1\n" * 5000 + "CUDA error: out of memory\n\n")
    assert cause_of_end(-9, log) == "killed by SIGKILL; its last output: CUDA error: out of memory"
    log.write_text("")
    assert cause_of_end(3, log) == "exit code 3; nothing printed"


def test_imports_are_not_searched_for_garbage_and_all_else_is():
    before = gc.get_freeze_count()
    with pytest.raises(ImportError), no_collections():
        assert not gc.isenabled()
        raise ImportError
    try:
        assert gc.isenabled() and gc.get_freeze_count() > before
    finally:
        gc.unfreeze()
