import csv
from importlib.util import find_spec

import pytest
import torch

from moepp.benchmarks.commands import at_scale
from moepp.benchmarks.folder import run_benchmark
from moepp.benchmarks.scoring import LONGEST_CHOICE, ScoringBenchmark

pytestmark = pytest.mark.skipif(find_spec("transformers") is None, reason="needs the package transformers")


def test_both_ways_score_the_same_choices_alike(tmp_path):
    run_benchmark(at_scale("scoring", "smoke", {"repeats": 1}), tmp_path)
    with open(tmp_path / "table.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["moepp", "vanilla"]
    for row in rows:
        assert not row["failure"] and float(row["difference"]) < 1e-4
        assert row["requests"] == "8" and float(row["over_transformers"]) > 0
    assert "plain loop" in (tmp_path / "report.md").read_text()


def test_choices_of_a_question_differ_in_their_ends_alone_and_fit_into_the_context():
    requests = ScoringBenchmark(questions=3, choices=4).requests(64, 100)
    for question in (requests[i : i + 4] for i in range(0, 12, 4)):
        assert len({tuple(tokens[:-scored]) for tokens, scored in question}) == 1
        assert all(1 <= scored <= LONGEST_CHOICE and len(tokens) <= 64 for tokens, scored in question)


def test_ours_multiplies_less_than_half_as_much_as_the_plain_loop():
    """Counted, not timed: FLOPs of all products, heads included."""
    from torch.utils.flop_counter import FlopCounterMode

    benchmark = ScoringBenchmark(questions=1)
    counted = {}
    for name, call in benchmark.calls(benchmark.groups()[1], torch.device("cpu")).items():
        with FlopCounterMode(display=False) as counter:
            call()
        counted[name] = counter.get_total_flops()
    assert 0 < 2 * counted["moepp"] < counted["transformers"]
