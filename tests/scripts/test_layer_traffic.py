"""What a training step of the layer launches and moves, counted without a GPU, so that it does not grow unseen."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/layer_traffic.py"
MOST = {"grouped": (103, 123), "triton": (115, 135)}  # launches of vanilla MoE and of MoE++


@pytest.fixture(scope="module")
def rows():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs the package triton")
    result = subprocess.run([sys.executable, SCRIPT, "--tokens", "65536"], capture_output=True, text=True, check=True)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in result.stdout.splitlines()[2:]]
    return {(backend, tau): (int(launches), *map(float, bytes)) for backend, tau, launches, *bytes in cells}


@pytest.mark.parametrize("backend", MOST)
def test_a_step_launches_no_more_than_it_did(rows, backend):
    for tau, most in zip(("vanilla", "0.75"), MOST[backend], strict=True):
        assert rows[backend, tau][0] <= most


@pytest.mark.parametrize("backend", MOST)
def test_what_moves_follows_the_ffn_share(rows, backend):
    """Of what only the FFN rows need, capacity 1.1 leaves 0.66 at tau 0.75 and 0.18 at tau 0.1."""
    moved = {tau: rows[backend, tau][1] + rows[backend, tau][2] for tau in ("0.75", "0.25", "0.1")}
    per_share = (moved["0.75"] - moved["0.1"]) / (0.66 - 1.1 / 6)
    assert moved["0.25"] == pytest.approx(moved["0.1"] + per_share * (1.1 / 3 - 1.1 / 6), rel=0.02)
    assert moved["0.1"] < 0.7 * moved["0.75"]
