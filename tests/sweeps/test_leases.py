import json
import os
import signal
import subprocess
import sys
import time

import pytest

from moepp.config import CONF
from moepp.sweeps.leases import FREE, LEASE_FILE, NO_LEASE, Heartbeat, Holder, LeaseWatch, exclusive, newest

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(CONF.parent)}
HOLD = """
import sys
from pathlib import Path
from moepp.sweeps.leases import Heartbeat, LeaseWatch
heartbeat = Heartbeat(float(sys.argv[2]))
lease = LeaseWatch(Path(sys.argv[1]), float(sys.argv[2])).claim()
with heartbeat.running():
    heartbeat.add(lease)
    print("claimed", flush=True)
    sys.stdin.readline()
    print("lost" if lease.lost else "held", flush=True)
"""
RACE = """
import sys, time
from pathlib import Path
from moepp.sweeps.leases import LeaseWatch
watch = LeaseWatch(Path(sys.argv[1]))
print("ready", flush=True)
end = float(sys.stdin.readline())
while time.time() < end:
    if watch.claim():
        print("claimed", flush=True)
        sys.stdin.readline()
        break
"""
GUARDED = """
import time
from moepp.sweeps.leases import end_without_lease
end_without_lease()
time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "leases"


@pytest.fixture
def python():
    """Starts a Python process; every one still alive is killed after the test."""
    started = []

    def python(script, *arguments, **environment):
        process = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)], env=ENVIRONMENT | environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield python
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def elsewhere(folder, number=1, stale=0.3, state="held"):
    """A claim by a machine of which nothing but this file is seen."""
    folder.mkdir(exist_ok=True)
    head = json.dumps(vars(Holder("far", 1, "another boot", 0, stale)))
    (folder / str(number)).write_text(f"{head}\n{state} 0000000001\n")


def claimed_after(watch, seconds):
    """How long it takes to claim, within `seconds`; None when that is too short."""
    start = time.monotonic()
    while (waited := time.monotonic() - start) < seconds:
        if watch.claim():
            return waited
        time.sleep(0.01)
    return None


def test_a_lease_is_held_by_one_until_it_is_released(folder):
    lease = LeaseWatch(folder).claim()
    assert LeaseWatch(folder).claim() is None
    lease.release()
    assert not lease.lost
    second = LeaseWatch(folder).claim()
    assert lease.lost and not second.lost
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]  # no temporary names are left


def test_of_many_processes_one_claims_a_new_lease(folder, python):
    assert winners(folder, python) == 1


def test_of_many_processes_one_takes_over_from_a_silent_holder(folder, python):
    elsewhere(folder)
    assert winners(folder, python) == 1
    assert newest(folder)[0] == 2


def winners(folder, python, processes=6):
    racers = [python(RACE, folder) for _ in range(processes)]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    end = time.time() + 1.5
    for racer in racers:
        racer.stdin.write(f"{end}\n")
        racer.stdin.flush()
    time.sleep(2)
    for racer in racers:
        racer.stdin.close()
    return sum(racer.stdout.read() == "claimed\n" for racer in racers)


def test_a_killed_holder_on_this_machine_is_replaced_at_once(folder, python):
    holder = python(HOLD, folder, 60)
    assert holder.stdout.readline() == "claimed\n"
    watch = LeaseWatch(folder)
    assert watch.claim() is None
    holder.kill()
    holder.wait()
    assert watch.claim() is not None


def test_a_stopped_holder_is_replaced_after_the_stale_time_and_finds_out(folder, python, capfd):
    holder = python(HOLD, folder, 0.6)
    assert holder.stdout.readline() == "claimed\n"
    watch = LeaseWatch(folder)
    assert claimed_after(watch, 1.0) is None  # it beats, so the stale time never passes
    holder.send_signal(signal.SIGSTOP)
    waited = claimed_after(watch, 3)
    assert 0.5 < waited < 1.5
    before = newest(folder)
    assert f"taking over {folder}/1 from process {holder.pid} on " in capfd.readouterr().err
    holder.send_signal(signal.SIGCONT)
    time.sleep(0.3)  # its beats go on, into the file of its own claim
    assert newest(folder) == before
    holder.stdin.write("\n")
    holder.stdin.flush()
    assert holder.stdout.readline() == "lost\n"


def test_clocks_that_disagree_change_nothing(folder):
    elsewhere(folder, stale=0.4)
    (folder / "\N{SUPERSCRIPT TWO}").touch()  # a digit that is no number
    for year in (-1, 1):
        os.utime(folder / "1", (time.time() + year * 3e7,) * 2)
        watch = LeaseWatch(folder)
        assert watch.claim() is None
        time.sleep(0.2)
        assert watch.claim() is None
    assert claimed_after(watch, 1) is not None


def head(**changes):
    return json.dumps({"host": "far", "pid": 1, "machine": "", "started": 0, "stale": 60.0, **changes}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"", b'{"host": "fa', b"\xff\x00\xfe", b"{}\nfree 0000000001\n", b"[1]",
        head(stale="soon"), head(stale=1e12), head(stale=float("nan")), head(machine=7),
    ],
)  # fmt: skip
def test_an_unreadable_lease_counts_as_held_until_it_is_stale(folder, content, capfd):
    folder.mkdir()
    (folder / "1").write_bytes(content)
    watch = LeaseWatch(folder, stale=0.3)
    assert claimed_after(watch, 0.2) is None
    (folder / "1").write_bytes(content + b"?")  # somebody writes: the time begins again
    assert 0.25 < claimed_after(watch, 2) < 1
    assert "from an unreadable lease, silent for 0 s" in capfd.readouterr().err


def test_a_lease_given_back_elsewhere_is_claimed_at_once(folder):
    elsewhere(folder, stale=60, state=FREE.decode())
    assert LeaseWatch(folder).claim() is not None


def test_a_heart_beats_for_what_it_holds(folder):
    heartbeat = Heartbeat(stale=0.2)
    lease = LeaseWatch(folder).claim()
    with heartbeat.running():
        heartbeat.add(lease)
        before = newest(folder)
        time.sleep(0.2)
        assert newest(folder) != before
        heartbeat.release(lease)
        before = newest(folder)
        time.sleep(0.1)
        assert newest(folder) == before


def test_a_removed_folder_is_a_lost_lease(folder):
    lease = LeaseWatch(folder).claim()
    (folder / "1").unlink()
    assert lease.lost
    lease.beat()
    assert newest(folder) == (0, b"")


def test_a_trial_ends_itself_before_its_silent_worker_is_replaced(folder, python):
    lease = LeaseWatch(folder, stale=1.0).claim()
    trial = python(GUARDED, **{LEASE_FILE: str(lease.path)})
    for _ in range(8):
        time.sleep(0.2)
        lease.beat()
    assert trial.poll() is None
    assert trial.wait(timeout=1.0) == NO_LEASE  # sooner than the stale time


def test_a_trial_ends_itself_when_another_worker_has_the_lease(folder, python):
    lease = LeaseWatch(folder, stale=60).claim()
    trial = python(GUARDED, **{LEASE_FILE: str(lease.path)})
    elsewhere(folder, number=2)
    assert trial.wait(timeout=5) == NO_LEASE


def test_exclusive_stays_so_however_long_it_takes(folder):
    with exclusive(folder, stale=0.8):
        assert claimed_after(LeaseWatch(folder), 1.5) is None


def test_exclusive_waits_for_its_turn(folder, python):
    holder = python(HOLD, folder, 60)
    assert holder.stdout.readline() == "claimed\n"
    holder.stdin.close()  # it ends, without having released
    with exclusive(folder):
        assert newest(folder)[0] == 2
        assert LeaseWatch(folder).claim() is None
    assert LeaseWatch(folder).claim() is not None
