import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", "5.24", reason="needs the extra hf")

from moepp.errors import UsageError
from moepp.retrofit import calibrate, export, retrofit
from moepp.routing.offsets import knee, route_by_offsets, say_knee

sys.path.append(str(Path(__file__).parents[1] / "retrofit"))
from families import IDS, tiny


def test_a_retrofitted_folder_gives_table_figure_and_knee(token_folder, tmp_path):
    export(calibrate(retrofit(tiny("mixtral", num_hidden_layers=2)), [IDS], share=0.3), tmp_path / "model")
    words = ["data=tokens", f"data.path={token_folder}", "data.seq_len=16", "data.val_sequences=4"]
    text = route_by_offsets(tmp_path / "model", (-60.0, 0.0, 60.0), words, tmp_path / "out")
    rows = [line.split(",") for line in (tmp_path / "out/route.csv").read_text().splitlines()[-3:]]
    used = [float(row[1]) for row in rows]
    assert used[0] == 2 and used[-1] == 0 and 1 < used[1] < 1.8
    assert "knee" in text and list((tmp_path / "out").glob("route.*"))


def test_a_model_without_new_experts_has_no_offsets(token_folder, tmp_path):
    tiny("mixtral", num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="holds a model without new experts"):
        route_by_offsets(tmp_path, (0.0,), ["data=tokens", f"data.path={token_folder}"])


def test_the_knee_lies_furthest_below_the_straight_line():
    assert knee([(0.0, 5.0), (1.0, 3.2), (1.5, 3.1), (2.0, 3.0)]) == 1
    assert knee([(0.0, 5.0), (1.0, 4.0), (2.0, 3.0)]) is None
    assert knee([(1.0, 4.0)]) is None
    assert "no knee" in say_knee([(0.0, 1.0, 4.0)])
