from dataclasses import replace

import pytest
from analysis.synthetic_sweep import write_sweep

from experiments.table5 import EXPERIMENT as TABLE5
from moepp.analysis.report import write_report
from moepp.analysis.results import load_sweep_results
from moepp.analysis.task_tables import paper_accuracy, task_columns
from moepp.records import RunRecord, read_json

LOSSES = {"vanilla": {0: 3.0, 1: 3.1}, "zero": {0: 2.9, 1: 3.0}}


@pytest.fixture
def sweep(tmp_path):
    directory = write_sweep(tmp_path / "sweep", LOSSES)
    for trial in read_json(directory / "sweep.json")["trials"]:
        better = 0.1 * (trial["arm"] == "zero")
        RunRecord(directory / trial["path"]).replace_final({
            **metrics("sciq", "acc", 0.5 + better, 2.0 + trial["seed"] - better, 100),
            **metrics("boolq", "acc", 0.4, 1.0 + trial["seed"], 50),
            **metrics("nq_open", "exact_match", 0.1 * trial["seed"], 3.0, 20),
        })  # fmt: skip
    return directory


def metrics(task, accuracy, value, bits, examples):
    return {
        f"final/{task}_{accuracy}": value, f"final/{task}_gold_bits_per_byte": bits, f"final/{task}_examples": examples
    }  # fmt: skip


def test_tasks_become_columns_with_paired_differences(sweep):
    found = task_columns(load_sweep_results(sweep), list(LOSSES))
    assert found.tasks == ("sciq", "boolq", "nq_open")
    heads, vanilla, zero = found.accuracy
    assert heads == ["arm", "sciq (n=100)", "boolq (n=50)", "nq_open (n=20)", "mean", "mean without BoolQ"]
    assert vanilla[:2] == ["vanilla", "50.0 ± 0.0"] and zero[1] == "60.0 ± 0.0"
    assert zero[4].startswith(f"{(60 + 40 + 5) / 3:.1f} ±") and zero[5].startswith("32.5 ±")
    _, vanilla, zero = found.bits_per_byte
    assert vanilla[1].startswith("2.500 ± ")  # seeds differ by 1 bit, which cancels in the difference
    assert zero[1] == "-0.100 ± 0.000†" and zero[2] == "+0.000 ± 0.000"
    assert zero[4] == "-0.033 ± 0.000†" and zero[5] == "-0.050 ± 0.000†"
    head, first, second = found.csv
    assert dict(zip(head, second, strict=True))["sciq accuracy"] == "60.0"
    assert dict(zip(head, first, strict=True))["sciq gold_bits_per_byte_minus_vanilla"] == ""


def test_the_papers_scores_stand_beside_the_tasks_it_has(sweep, tmp_path):
    rows = paper_accuracy(TABLE5, ("sciq", "piqa", "boolq", "lambada_openai"))
    assert rows[0] == ["arm", "piqa", "boolq", "lambada_openai", "mean", "mean without BoolQ"]
    assert rows[1] == ["vanilla", "68.4", "41.2", "42.5", "50.7", "55.5"] and len(rows) == 9
    assert paper_accuracy(TABLE5, ("sciq",)) is None and paper_accuracy(replace(TABLE5, paper={}), ("piqa",)) is None
    write_report(TABLE5, load_sweep_results(sweep), tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text()
    assert "The paper's, of its 1B model:\n\n| arm | boolq |" in text and "| zero | 45.7 |" in text


def test_a_task_counts_only_where_every_run_has_it(sweep):
    first = RunRecord(sweep / read_json(sweep / "sweep.json")["trials"][0]["path"])
    first.replace_final(metrics("sciq", "acc", 0.5, 2.0, 10))  # fewer examples than the others
    assert task_columns(load_sweep_results(sweep), list(LOSSES)).tasks == ("boolq", "nq_open")


def test_without_tasks_there_are_no_columns(tmp_path):
    directory = write_sweep(tmp_path / "sweep", LOSSES)
    assert task_columns(load_sweep_results(directory), list(LOSSES)) is None
