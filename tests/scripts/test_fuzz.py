"""1,000 odd inputs of every kind that people type; scripts/fuzz.py throws as many as it is told."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

from fuzz import fuzz

INPUTS = 1000


def test_odd_input_is_taken_as_meant_or_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcomes = list(fuzz(INPUTS, seed=0))
    found = [
        f"{kind} {made!r}: {type(error).__name__}: {error}" for kind, made, error in outcomes if error not in (0, 1)
    ]
    assert not found, "\n".join(found[:10])
    taken = {kind: sum(other == kind and outcome for other, _, outcome in outcomes) for kind, _, _ in outcomes}
    assert min(taken.values()) > 2  # not everything is refused
    assert list(tmp_path.iterdir()) == []  # and nothing is begun
