"""MLflow's web page over the store: its server for this machine, and which of its pages to open first."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moepp.addresses import without_user
from moepp.errors import RunError, UsageError
from moepp.process import python_path
from moepp.program import program
from moepp.records import read_json
from moepp.tracking import pages
from moepp.tracking.mlflow_store import connect, find_run, is_server, store_uri
from moepp.tracking.mlflow_views import ARMS, TRIALS, view_key

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from moepp.tracking.settings import TrackingConfig

OPEN = """
import sys, time, urllib.request, webbrowser
for _ in range(120):
    try:
        urllib.request.urlopen(sys.argv[1].partition("#")[0], timeout=5)
        sys.exit(not webbrowser.open(sys.argv[1]))
    except OSError:
        time.sleep(0.5)
"""


def serve(tracking: "TrackingConfig", runs: Path | str, port: int = 5000, sweep: Path | None = None) -> None:
    """Becomes the MLflow server over the store, for this machine only, and opens the page of `sweep`, else of the
    newest sweep, where there is a display; Ctrl-C ends it. Does not return, unless the tracker is a server already.

    Raises UsageError when `sweep` is not in MLflow, RunError when the port is taken.
    """
    uri = store_uri(tracking, runs)
    if not is_server(uri):
        _require_free(port)
    client, experiment_id = connect(tracking, runs)
    sweep = sweep or _newest_sweep(client, Path(runs))
    addresses = _addresses(pages.address(without_user(uri), port), experiment_id, sweep)
    for title, page in addresses.items():
        print(f"{title:<8} {page}", flush=True)
    first = next(iter(addresses.values()))
    if is_server(uri):
        open_when_served(first)
        return
    pages.remember_port(runs, port)
    print(f"MLflow starts on port {port} of this machine (Ctrl-C ends it)", flush=True)
    open_when_served(first)
    artifacts = (Path(runs).resolve() / "mlartifacts").as_uri()
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")  # jobs belong to features that no run uses
    os.environ["MLFLOW_BACKEND_STORE_URI"] = uri  # not an argument: other users of the machine can see those
    store = ["--default-artifact-root", artifacts]
    place = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--uvicorn-opts", "--log-level warning"]
    os.environ["PYTHONPATH"] = python_path()
    os.execv(sys.executable, [sys.executable, "-m", "moepp.tracking.server", "server", *store, *place])


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise RunError(f"cannot use port {port} ({error.strerror}); choose another with --port") from None


def _newest_sweep(client: "MlflowClient", runs: Path) -> Path | None:
    """The sweep that was begun or extended last, of those that the store has."""
    known = [(path.stat().st_mtime, path.parent) for path in runs.glob("*/sweep.json")]
    for _, sweep in sorted(known, reverse=True):
        run = find_run(client, (read_json(sweep / "mlflow.json") or {}).get("run_id"))
        if run is not None:
            return sweep
    return None


def _addresses(base: str, experiment_id: str, sweep: Path | None) -> dict[str, str]:
    everything = {
        "runs": pages.experiment_page(base, experiment_id),
        "models": pages.models_page(base, experiment_id),
    }
    if sweep is None:
        return everything
    parent = read_json(sweep / "mlflow.json")
    if parent is None or "experiment_id" not in parent:
        raise UsageError(f"{sweep} is not in MLflow yet; run the sweep, or `{program()} sync` for its records")
    place, run, said = parent["experiment_id"], parent["run_id"], next(iter(parent.get("sections", ())), "")
    return {
        "arms": pages.view_page(base, place, view_key(run, ARMS), charts=True),
        "trials": pages.view_page(base, place, view_key(run, TRIALS)),
        "report": pages.report_page(base, place, run, said) if said else pages.run_page(base, place, run),
        **everything,
    }


def open_when_served(page: str) -> None:
    """Opens a browser, in a process of its own, once the address answers; nothing where there is no display."""
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return
    subprocess.Popen([sys.executable, "-c", OPEN, page], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
