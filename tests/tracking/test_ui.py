import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import pytest
from mirrored import make_sweep, store

from moepp.errors import RunError, UsageError
from moepp.process import python_path
from moepp.records import read_json
from moepp.tracking import pages, ui
from moepp.tracking.mirror import FolderMirror
from moepp.tracking.mlflow_views import ARMS, TAG, TRIALS, saved_views, view_key
from moepp.tracking.settings import TrackingConfig


def test_a_sweep_brings_its_saved_views(runs):
    directory = make_sweep(runs, "sweep-with-views")
    config = directory / "bbbb" / "config.yaml"
    config.write_text(config.read_text().replace("zero: 1", "zero: 3").replace("zero+copy", "zeros"))
    FolderMirror(directory, TrackingConfig(), runs).sync()
    parent = read_json(directory / "mlflow.json")
    tags = store(runs).get_experiment(parent["experiment_id"]).tags
    views = {}
    for name in (ARMS, TRIALS):
        view = json.loads(tags[TAG + view_key(parent["run_id"], name)])
        assert view["name"] == f"sweep-with-views: {name}"
        views[name] = json.loads(view["state"])
    assert views[ARMS]["groupsExpanded"] == {"param.arm.zero+copy": False, "param.arm.zeros": False}
    assert views[TRIALS]["selectedColumns"][:3] == ["params.`seed`", "params.`n_zero`", "metrics.`final/val_loss`"]
    assert views[TRIALS]["compareRunCharts"][0]["selectedParams"] == ["n_zero"]
    children = store(runs).search_runs([parent["experiment_id"]], views[ARMS]["searchFilter"])
    assert {run.info.run_id for run in children} == {
        read_json(directory / trial / "mlflow.json")["run_id"] for trial in ("aaaa", "bbbb")
    }
    assert all(len(tags[key]) < 20_000 for key in tags)


def test_views_of_a_thousand_arms_fit_into_tags():
    views = saved_views("sweep", "feed" * 8, 0, [f"learning_rate={i}" for i in range(1000)], ["lr", "tau", "n_zero"])
    assert max(map(len, views.values())) < 20_000  # MLflow refuses more


def test_the_server_is_for_this_machine_only(runs, monkeypatch, capsys):
    commands = []
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "")  # and removed at the end
    monkeypatch.setattr(os, "execv", lambda path, arguments: commands.append(arguments))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(RunError, match=f"cannot use port {port}"):
            ui.serve(TrackingConfig(), runs, port)
    ui.serve(TrackingConfig(), runs, port)
    (command,) = commands
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert os.environ["MLFLOW_BACKEND_STORE_URI"] == f"sqlite:///{runs}/mlflow.db"  # unseen by others of the machine
    assert f"http://127.0.0.1:{port}" in capsys.readouterr().out
    assert pages.known_port(runs) == port  # `run.py compare` prints it
    assert capsys.readouterr().out == ""


def test_the_ui_opens_at_a_sweep(runs, monkeypatch, capsys):
    directory = make_sweep(runs, "sweep-to-open")
    monkeypatch.setattr(os, "execv", lambda path, arguments: None)
    with pytest.raises(UsageError, match=r"run\.py sync"):
        ui.serve(TrackingConfig(), runs, 0, directory)
    FolderMirror(directory, TrackingConfig(), runs).sync()
    opened = []
    monkeypatch.setattr(ui, "open_when_served", opened.append)
    ui.serve(TrackingConfig(), runs, 0, directory)
    lines = capsys.readouterr().out.splitlines()
    run_id = read_json(directory / "mlflow.json")["run_id"]
    assert [line.split()[0] for line in lines[:4]] == ["arms", "trials", "report", "runs"]
    assert f"?viewStateShareKey={run_id}-arms&compareRunsMode=CHART" in lines[0]
    assert f"/runs/{run_id}?" in lines[2]
    assert opened == [lines[0].split()[1]]


def test_without_a_name_the_ui_opens_at_the_newest_sweep_that_is_in_the_store(runs, monkeypatch, capsys):
    monkeypatch.setattr(os, "execv", lambda path, arguments: None)
    ids, now = [], time.time()
    for age, name in enumerate(("sweep-newest", "sweep-older")):
        directory = make_sweep(runs, name)
        FolderMirror(directory, TrackingConfig(), runs).sync()
        ids.append(read_json(directory / "mlflow.json")["run_id"])
        os.utime(directory / "sweep.json", (now + 1000 - age, now + 1000 - age))
    unmirrored = make_sweep(runs, "sweep-unmirrored") / "sweep.json"
    os.utime(unmirrored, (now + 2000, now + 2000))
    ui.serve(TrackingConfig(), runs, 0)
    assert f"viewStateShareKey={ids[0]}-arms" in capsys.readouterr().out
    store(runs).delete_run(ids[0])
    ui.serve(TrackingConfig(), runs, 0)
    assert f"viewStateShareKey={ids[1]}-arms" in capsys.readouterr().out


SERVER = """
import os, signal, subprocess
def cli(prog_name):
    print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
    signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_what_mlflow_has_started_ends_with_it_and_hears_what_its_group_is_told(number, tmp_path):
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow/__init__.py").touch()
    (tmp_path / "mlflow/cli.py").write_text(SERVER)
    command = [sys.executable, "-m", "moepp.tracking.server"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{python_path()}"}
    serving = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    pid = int(serving.stdout.readline())
    child = os.pidfd_open(pid)
    assert os.getpgid(pid) == os.getpgid(serving.pid)
    serving.send_signal(number)
    assert serving.wait(20) == -number
    assert select.select([child], [], [], 20)[0], "its child is still there"
    os.close(child)
    serving.stdout.close()


def test_no_browser_is_opened_without_a_display(monkeypatch):
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **_: started.append(arguments))
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    ui.open_when_served("http://127.0.0.1:5000/#/runs")
    assert not started
    monkeypatch.setenv("DISPLAY", ":0")
    ui.open_when_served("http://127.0.0.1:5000/#/runs")
    assert started[0][0][-1] == "http://127.0.0.1:5000/#/runs"
