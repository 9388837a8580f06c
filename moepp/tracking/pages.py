"""Addresses of MLflow's pages. Each opens the pages for model training, not those for language model applications."""

import json
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote, urlencode

from moepp.records import write_text

DEFAULT_PORT = 5000
LOCAL = f"http://127.0.0.1:{DEFAULT_PORT}"  # where `make ui` serves
PORT = ".ui_port"  # in the folder of runs
KIND = {"workflowType": "machine_learning"}


def address(uri: str, port: int = DEFAULT_PORT) -> str:
    """Where the pages of the tracker at `uri` are served: by itself, or for a database by `run.py ui`."""
    return uri.rstrip("/") if uri.startswith("http") else LOCAL.replace(str(DEFAULT_PORT), str(port))


def remember_port(runs: Path | str, port: int) -> None:
    """Keeps where `run.py ui` serves the runs, for other commands that print addresses."""
    write_text(Path(runs) / PORT, f"{port}\n")


def known_port(runs: Path | str) -> int:
    """Where `run.py ui` has last served these runs; 5000 before it ever has."""
    try:
        return int((Path(runs) / PORT).read_text())
    except (OSError, ValueError):
        return DEFAULT_PORT


def experiment_page(base: str, experiment_id: str) -> str:
    """Every run, the sweeps folded."""
    return f"{base}/#/experiments/{experiment_id}/runs?{urlencode(KIND)}"


def view_page(base: str, experiment_id: str, view: str, charts: bool = False) -> str:
    """The runs as the saved view of that key shows them, in a table or in `charts`.

    Any search parameter beside the key would make MLflow pass over the saved view.
    """
    mode = {"compareRunsMode": "CHART"} if charts else {}
    return f"{base}/#/experiments/{experiment_id}/runs?{urlencode({'viewStateShareKey': view, **mode, **KIND})}"


def run_page(base: str, experiment_id: str, run_id: str) -> str:
    """One run: description, params, metrics, artifacts."""
    return f"{base}/#/experiments/{experiment_id}/runs/{run_id}?{urlencode(KIND)}"


def report_page(base: str, experiment_id: str, run_id: str, experiment: str) -> str:
    """What a report wrote onto a sweep's parent run, as a page within MLflow's."""
    page = f"{quote(experiment)}/report.html"
    return f"{base}/#/experiments/{experiment_id}/runs/{run_id}/artifacts/{page}?{urlencode(KIND)}"


def models_page(base: str, experiment_id: str) -> str:
    """The checkpoints of all finished runs, with what was measured of them."""
    return f"{base}/#/experiments/{experiment_id}/models?{urlencode(KIND)}"


def comparison_page(base: str, run_ids: Sequence[str], experiment_ids: Sequence[str]) -> str:
    """Runs side by side."""
    lists = {"runs": list(run_ids), "experiments": sorted(set(experiment_ids))}
    # Quoted throughout, so that terminals recognise the address as one word.
    query = "&".join(f"{key}={quote(json.dumps(ids, separators=(',', ':')))}" for key, ids in lists.items())
    return f"{base}/#/compare-runs?{query}&{urlencode(KIND)}"
