import json
import math
import subprocess
import sys

import pytest

from moepp.errors import RunError
from moepp.evaluation.results import (
    About,
    Example,
    TaskResult,
    final_metrics,
    load_task_results,
    means,
    write_task_result,
)
from moepp.records import RunRecord


def result(task: str = "sciq", correct: tuple[float, ...] = (1, 0, 1, 1), bits: float = 2.0) -> TaskResult:
    """Gold answers of 1 to n bytes at `bits` bits per byte each."""
    examples = tuple(
        Example(str(i), -bits * (i + 1) * math.log(2), i + 1, {"acc": value}, (-1.0, -2.0), 0)
        for i, value in enumerate(correct)
    )
    return TaskResult(About(task, 0, None, "hub:x", "", "0.4.13", {task: "1"}, 128, 0.0, "2026-11-24"), examples)


def test_scores_and_their_standard_errors_by_hand():
    scores = result().scores()
    assert scores["acc"].value == 0.75
    assert scores["acc"].error == pytest.approx(0.5 / 2)  # deviation of 1, 0, 1, 1 over the root of 4
    assert scores["gold_bits_per_byte"].value == pytest.approx(2.0)
    assert scores["gold_bits_per_byte"].error == pytest.approx(0, abs=1e-7)  # all answers agree on the ratio


def test_the_error_of_bits_per_byte_is_that_of_a_ratio():
    """Answers of equal length make the ratio a mean, whose standard error is known."""
    examples = tuple(Example(str(i), -nats, 2, {"acc": 0.0}) for i, nats in enumerate((1.0, 2.0, 4.0)))
    score = TaskResult(result().about, examples).scores()["gold_bits_per_byte"]
    assert score.value == pytest.approx(7 / 6 / math.log(2))
    deviation = math.sqrt(((1 - 7 / 3) ** 2 + (2 - 7 / 3) ** 2 + (4 - 7 / 3) ** 2) / 2)
    assert score.error == pytest.approx(deviation / math.sqrt(3) / 2 / math.log(2))


def test_results_come_back_from_their_files(tmp_path):
    assert load_task_results(tmp_path) == {}
    for each in (result("sciq"), result("boolq")):
        write_task_result(tmp_path / "evaluation", each)
    assert load_task_results(tmp_path) == {"boolq": result("boolq"), "sciq": result("sciq")}
    path = tmp_path / "evaluation" / "sciq.jsonl"
    path.write_text(path.read_text().splitlines()[0])
    with pytest.raises(RunError, match=r"sciq\.jsonl is no result"):
        load_task_results(tmp_path)


def test_means_with_and_without_boolq():
    found = means([result("sciq", (1, 1)), result("piqa", (1, 0), bits=3), result("boolq", (0, 0), bits=7)])
    assert found["accuracy"] == pytest.approx(0.5) and found["accuracy without BoolQ"] == pytest.approx(0.75)
    assert found["bits per byte"] == pytest.approx(4) and found["bits per byte without BoolQ"] == pytest.approx(2.5)
    assert means([result("boolq")]).keys() == means([result("sciq")]).keys() == {"accuracy", "bits per byte"}


def test_evaluating_again_replaces_and_keeps_all_else(tmp_path):
    record = RunRecord(tmp_path)
    record.log(10, {"train/loss": 3.0})
    record.log(10, {"final/val_loss": 2.0, "final/val_bits_per_byte": 1.0})
    record.replace_final(final_metrics(result("sciq")))
    record.replace_final(final_metrics(result("piqa")))
    once = record.final()
    assert once["sciq_acc"] == 0.75 and once["sciq_examples"] == 4 and once["val_loss"] == 2.0
    record.replace_final(final_metrics(result("sciq", (0, 0, 0, 1))))
    assert record.final() == {**once, "sciq_acc": 0.25}
    lines = record.metrics()
    assert len(lines) == 4 and all(line["step"] == 10 for line in lines)
    assert sum("final/sciq_acc" in line for line in lines) == 1


def test_reading_results_needs_neither_torch_nor_the_harness(tmp_path):
    write_task_result(tmp_path / "evaluation", result())
    code = (
        "import sys; from moepp.evaluation.results import load_task_results;"
        f"print(len(load_task_results({json.dumps(str(tmp_path))})), sum(m in sys.modules for m in"
        " ('torch', 'datasets', 'lm_eval.api.model')))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["1", "0"]
