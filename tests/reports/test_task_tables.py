import json
import math
from dataclasses import replace

import numpy as np
import pytest
from moepp.experiments.table5 import EXPERIMENT as TABLE5
from reports.synthetic_sweep import write_sweep, written
from scipy import stats

from moepp.evaluation.results import FOLDER, About, Example, TaskResult, write_task_result
from moepp.records import read_json
from moepp.reports.arms import of_records
from moepp.reports.results import load_sweep_results
from moepp.reports.standing import standing
from moepp.reports.task_tables import paper_accuracy, task_tables

PAPER = TABLE5.measure.design.paper
LOSSES = {"vanilla": {0: 3.0, 1: 3.1}, "zero": {0: 2.9, 1: 3.0}, "copy": {0: 2.9, 1: 3.0}}
N = 200


def result(task, right, bits, metric="acc", **about):
    """Gold answers of 1 to 4 bytes; `bits` per byte of each example, `right` whether it is."""
    examples = tuple(
        Example(str(i), -bits[i] * (1 + i % 4) * math.log(2), 1 + i % 4, {metric: float(right[i])}) for i in range(N)
    )
    asked = {"shots": 0, "data": f"{task}.jsonl:ab", "examples_from": "", "examples": N, "context": 128, "cut": 0.25}
    return TaskResult(About(task=task, limit=N, lm_eval="0.4.13", versions={task: "1"}, **{**asked, **about}), examples)


@pytest.fixture
def sweep(tmp_path):
    """`zero` gains 0.1 bits per byte on sciq on average; examples and seeds differ by far more."""
    directory = write_sweep(tmp_path / "sweep", LOSSES)
    generator = np.random.default_rng(0)
    example, noise = generator.uniform(1, 5, N), generator.normal(0, 0.2, (3, N))
    for trial in trials(directory):
        arm, seed = trial["arm"], trial["seed"]
        gain = 0.1 * (arm == "zero") + noise[list(LOSSES).index(arm)]
        right = np.arange(N) % 10 < (7 if arm == "zero" else 5)
        cut = 0.25 if seed else 1.0
        for each in (
            result("sciq", right, example + seed - gain, cut=cut),
            result("boolq", np.arange(N) % 5 < 2, example),
            result("nq_open", np.arange(N) % 10 < seed, example, "exact_match"),
        ):
            write_task_result(directory / trial["path"] / FOLDER, each)
    return directory


def trials(directory):
    return read_json(directory / "sweep.json")["trials"]


def table(rows):
    return {row[0]: dict(zip(rows.columns, row, strict=True)) for row in rows.rows}


def test_the_papers_scores_stand_beside_the_tasks_it_has(sweep, tmp_path):
    rows = table(paper_accuracy(PAPER, ("sciq", "piqa", "boolq", "lambada_openai")))
    assert list(rows) == ["piqa", "boolq", "lambada_openai", "mean", "mean without BoolQ"]
    assert [row["vanilla"] for row in rows.values()] == ["68.4", "41.2", "42.5", "50.7", "55.5"]
    assert paper_accuracy(PAPER, ("sciq",)) is None
    written(TABLE5, sweep, tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text()
    assert "The paper's, of its 1B model:\n\n| task | vanilla |" in text and "| boolq | 41.2 |" in text


def test_tasks_and_means_become_rows(sweep):
    found = task_tables(load_sweep_results(sweep), list(LOSSES))
    accuracy = table(found.accuracy)
    assert list(accuracy) == ["boolq", "nq_open", "sciq", "mean", "mean without BoolQ"]
    assert accuracy["sciq"]["vanilla"] == "50.0 ± 0.0" and accuracy["sciq"]["zero"] == "70.0 ± 0.0"
    assert accuracy["mean"]["zero"].startswith(f"{(40 + 5 + 70) / 3:.1f} ±")
    assert accuracy["mean without BoolQ"]["zero"].startswith("37.5 ±")


def test_the_interval_of_a_difference_crosses_seeds_with_examples(sweep):
    found = task_tables(load_sweep_results(sweep), list(LOSSES))
    gold = table(found.gold)
    value, half_width = gold["sciq"]["zero"].removesuffix("‡").split(" ± ")
    assert gold["sciq"]["zero"].endswith("‡") and float(value) == pytest.approx(-0.1, abs=0.05)
    assert 0.02 < float(half_width) < 0.1  # seeds agree to the last digit, examples do not: 200 with noise of 0.3
    assert gold["boolq"]["zero"] == "+0.000 ± 0.000"
    assert "‡" not in gold["sciq"]["copy"]
    assert table(found.accuracy_differences)["sciq"]["zero"].startswith("+20.0 ± 5.")
    lines = {line[:3]: dict(zip(found.full.columns, line, strict=True)) for line in found.full.rows}
    line = lines["gold_bits_per_byte", "sciq", "zero"]
    error = line["error_over_examples"]
    assert line["sd_over_seeds"] == pytest.approx(0, abs=1e-9)
    assert line["difference_half_width"] == pytest.approx(stats.t.ppf(0.975, N - 1) * error)
    assert lines["accuracy", "sciq", "vanilla"]["difference"] is None and float(line["value"]) > 2


def test_the_error_over_examples_is_that_of_their_paired_differences(sweep):
    found = task_tables(load_sweep_results(sweep), ["vanilla", "zero"])
    line = next(line for line in found.full.rows if line[:3] == ("accuracy", "sciq", "zero"))
    row = dict(zip(found.full.columns, line, strict=True))
    gains = 100 * ((np.arange(N) % 10 < 7).astype(float) - (np.arange(N) % 10 < 5))
    assert row["error_over_examples"] == pytest.approx(gains.std(ddof=1) / N**0.5)


def test_whole_texts_have_bits_per_byte_and_no_accuracy(sweep, tmp_path):
    for trial in trials(sweep):
        texts = result("wikitext", np.ones(N), np.full(N, 2.0))
        texts = replace(texts, examples=tuple(replace(example, metrics={}) for example in texts.examples))
        write_task_result(sweep / trial["path"] / FOLDER, texts)
    results = load_sweep_results(sweep)
    found = task_tables(results, list(LOSSES))
    assert "wikitext" not in table(found.accuracy) | table(found.accuracy_differences)
    assert table(found.gold)["wikitext"]["vanilla"] == "2.000 ± 0.000" and "wikitext" not in standing(results).tasks
    for trial in trials(sweep):
        for task in ("sciq", "boolq", "nq_open"):
            (sweep / trial["path"] / FOLDER / f"{task}.jsonl").unlink()
    alone = task_tables(load_sweep_results(sweep), list(LOSSES))
    assert alone.accuracy not in alone.section and alone.gold in alone.section


def test_two_examples_are_enough_for_an_interval(sweep):
    """The error of their mean has one degree of freedom, which rounding must not make none."""
    for number, trial in enumerate(trials(sweep)):
        for task, bits in {"sciq": (1.1 + 0.1 * number, 2.3), "boolq": (2.0, 2.0), "nq_open": (1.0, 1.0)}.items():
            two = tuple(Example(str(i), -bits[i], 4, {"acc": 1.0}) for i in (0, 1))
            found = replace(result(task, np.ones(N), np.ones(N)), examples=two)
            write_task_result(sweep / trial["path"] / FOLDER, found)
    rows = table(task_tables(load_sweep_results(sweep), list(LOSSES)).gold)
    assert all("nan" not in row["zero"] for row in rows.values())


def test_accuracy_stands_beside_chance(sweep):
    for trial in trials(sweep):
        path = sweep / trial["path"] / FOLDER
        four = result("piqa", np.arange(N) % 2 == 0, np.ones(N))
        chosen = tuple(replace(e, choices=(-1.0,) * (2 + i % 2), gold=0) for i, e in enumerate(four.examples))
        write_task_result(path, replace(four, examples=chosen))
    accuracy = table(task_tables(load_sweep_results(sweep), list(LOSSES)).accuracy)
    assert accuracy["piqa"]["chance"] == f"{100 * (1 / 2 + 1 / 3) / 2:.1f}" and accuracy["nq_open"]["chance"] == "0.0"
    assert accuracy["mean"]["chance"] == f"{100 * (1 / 2 + 1 / 3) / 2 / 4:.1f}"


def test_holm_is_over_the_arms(sweep):
    """The same difference, judged beside fewer arms, has a smaller p."""
    results = load_sweep_results(sweep)
    both, one = (task_tables(results, arms) for arms in (list(LOSSES), ["vanilla", "zero"]))
    p = [
        next(line[8] for line in found.full.rows if line[:3] == ("gold_bits_per_byte", "sciq", "zero"))
        for found in (both, one)
    ]
    assert p[0] == pytest.approx(2 * p[1])


def test_what_was_asked_is_shown_and_recorded(sweep, tmp_path):
    results = load_sweep_results(sweep)
    found = task_tables(results, list(LOSSES))
    assert table(found.setup)["sciq"]["prompts cut"] == "25% to 100%"
    assert table(found.setup)["boolq"]["data"] == "boolq.jsonl:ab" and table(found.setup)["boolq"]["shots"] == "0"
    written(of_records(sweep), sweep, tmp_path / "out")
    asked = json.loads((tmp_path / "out" / "provenance.json").read_text())["tasks"]["sciq"]
    assert asked["cut"] == [0.25, 1.0] and asked["lm_eval"] == "0.4.13" and asked["examples"] == N
    text = (tmp_path / "out" / "report.md").read_text()
    assert (
        "## Downstream tasks" in text and "| sciq | 0 | 200 | 25% to 100% | 128 | – | sciq.jsonl:ab | 0.4.13 |" in text
    )


@pytest.mark.parametrize("other", [{"shots": 5}, {"data": "sciq.jsonl:cd"}, {"examples_from": "sciq.jsonl"}])
def test_a_task_counts_only_where_every_run_was_asked_the_same(sweep, other):
    """Equally many examples are not enough."""
    first = sweep / trials(sweep)[0]["path"]
    write_task_result(first / FOLDER, result("sciq", np.ones(N), np.ones(N), **other))
    found = task_tables(load_sweep_results(sweep), list(LOSSES))
    assert found.tasks == ("boolq", "nq_open") and found.left_out == ("sciq",)
    assert "were asked something else: sciq." in found.section[0]


def test_without_tasks_there_are_no_tables(tmp_path):
    directory = write_sweep(tmp_path / "sweep", LOSSES)
    assert task_tables(load_sweep_results(directory), list(LOSSES)) is None
