import csv
import gzip
import json
from dataclasses import replace
from math import isclose

import pytest
import torch

from moepp.benchmarks import contest
from moepp.benchmarks.cases import Case
from moepp.benchmarks.commands import at_scale
from moepp.benchmarks.failures import DeviceLost
from moepp.benchmarks.folder import run_benchmark
from moepp.benchmarks.layer import LayerBenchmark
from moepp.benchmarks.layer_tables import layer_report, layer_table

TINY = {"dim": 16, "hidden": 24, "repeats": 2}


def table_of(out):
    with open(out / "table.csv") as file:
        return list(csv.DictReader(file))


def number(row, key):
    return float(row[key])


def failing(error):
    """An implementation that cannot run."""

    def build(layer):
        def forward(inputs):
            raise error

        return forward

    return build


def test_a_benchmark_writes_a_table_whose_ratios_are_those_of_its_times(tmp_path):
    here = ["moepp", "floor", "expert_floor", "zero_computation", "loop"]
    benchmark = LayerBenchmark(tokens=[64], ffn=[8], taus=[[0.25, 1.0]], implementations=here, **TINY)
    run_benchmark(benchmark, tmp_path)
    rows = table_of(tmp_path)
    assert len(rows) == 4 * 2 * 3  # passes, routings, vanilla and two values of tau
    for row in rows:
        vanilla = next(
            r for r in rows
            if r["tau"] == "vanilla" and all(r[k] == row[k] for k in ("dtype", "direction", "routing"))
        )  # fmt: skip
        assert isclose(number(row, "speedup"), number(vanilla, "moepp_ms") / number(row, "moepp_ms"), rel_tol=1e-4)
        assert isclose(number(row, "over_floor"), number(row, "moepp_ms") / number(row, "floor_ms"), rel_tol=1e-4)
        by_expert = number(row, "moepp_ms") / number(row, "expert_floor_ms")
        assert isclose(number(row, "over_expert_floor"), by_expert, rel_tol=1e-4)
        assert number(row, "loop_over_moepp_low") <= number(row, "loop_over_moepp_high")
        assert number(row, "moepp_resident_gib") >= 0
        assert number(row, "moepp_min_ms") <= number(row, "moepp_ms")
        assert (row["zero_computation_share"] == "") == (row["tau"] == "vanilla")
        assert isclose(number(row, "ideal_speedup"), 1 / number(row, "ffn_share"), rel_tol=1e-4)
        products = 6 * 16 * 24 * 128 * number(row, "ffn_share") * (3 if "backward" in row["direction"] else 1)
        assert isclose(number(row, "tflops"), products / number(row, "moepp_ms") / 1e9, rel_tol=1e-4)
    assert {row["ffn_share"] for row in rows if row["tau"] == "vanilla"} == {"1"}
    balanced = [row for row in rows if row["routing"] == "balanced" and row["tau"] == "0.25"]
    assert all(isclose(number(row, "ffn_share"), number(row, "target_share"), abs_tol=0.07) for row in balanced)
    provenance = json.loads((tmp_path / "provenance.json").read_text())
    assert provenance["benchmark"]["tokens"] == [64] and provenance["hardware"]["cores"]
    report = (tmp_path / "report.md").read_text()
    assert report.count("\n## ") == 4 and report.count("\n| 8+4 | 0.25 ") == 4 * 4 * 2  # times, ratios, memory twice
    assert [row["paper_speedup"] for row in rows[:3]] == ["", "1.927", "1.191"]


def test_the_smoke_scale_has_all_of_the_gpu_scales_parts(tmp_path):
    smoke, gpu = (at_scale("layer", scale, {}) for scale in ("smoke", "gpu"))
    assert smoke.implementations == gpu.implementations and smoke.trace and smoke.passes == gpu.passes
    benchmark = replace(smoke, tokens=[32], taus=[[0.75]], ffn=[64])
    run_benchmark(benchmark, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "table.csv", "report.md", "provenance.json", "rows.jsonl", "trace.json.gz",
    }  # fmt: skip
    with gzip.open(tmp_path / "trace.json.gz") as file:
        assert json.load(file)["traceEvents"]
    rows = table_of(tmp_path)
    assert [(row["experts"], row["tau"]) for row in rows] == [("64", "vanilla"), ("64+8", "0.75")] * 2
    assert all(number(row, "ffn_share") < 1 and number(row, "whole_layer_ms") > 0 for row in rows)  # some are dropped


def test_every_tau_of_the_most_tokens_comes_first_and_the_trace_after_one_group():
    groups = at_scale("layer", "gpu", {}).groups()
    assert len(groups) == 1 + 2 * 4 * 3
    assert str(groups[0]) == "bfloat16 forward+backward, 65536 tokens, 8 FFN experts, tau 0.75, 0.1, 0.25, 1.0"
    assert str(groups[1]) == "trace, 65536 tokens, 8 FFN experts, tau 0.75"
    assert {(group.tokens, group.direction) for group in groups[2:9]} == {
        (65536, "forward+backward"), (65536, "forward"),
    }  # fmt: skip


def test_the_devices_own_time_has_a_table_and_a_speed_up_where_it_was_measured():
    def row(tau, device_ms):
        shared = {
            "tokens": 64,
            "dtype": "bfloat16",
            "direction": "forward",
            "group": "g",
            "ffn": 8,
            "routing": "learned",
        }
        measured = {"failure": None, "ms": 3.0, "min_ms": 3.0, "device_ms": device_ms, "gib": 1.0}
        return shared | measured | {"implementation": "moepp", "tau": tau, "ffn_share": 1.0, "tflop": 1.0}

    rows = [row(None, 2.0), row(0.75, 1.25)]
    assert [line["device_speedup"] for line in layer_table(rows)] == [1.0, 1.6]
    assert any("Milliseconds of the device alone" in line for line in layer_report(rows))
    on_a_cpu = [{**line, "device_ms": None, "gib": None} for line in rows]
    assert not any("device alone" in line for line in layer_report(on_a_cpu))


def test_the_released_loop_is_judged_call_by_call():
    """Its routing differs from call to call more than the two do."""
    shared = {
        "tokens": 64, "dtype": "float32", "direction": "forward", "group": "g", "ffn": 8, "routing": "learned",
        "failure": None, "min_ms": 1.0, "gib": None, "tflop": 1.0, "ffn_share": 1.0,
    }  # fmt: skip

    def rows(tau, ours, loop):
        each = {"moepp": ours, "loop": loop}
        return [
            shared | {"tau": tau, "implementation": name, "ms": sorted(calls)[1], "calls_ms": calls}
            for name, calls in each.items()
        ]

    faster, slower = rows(None, [1.0, 2.0, 4.0], [1.2, 2.3, 4.9]), rows(0.75, [1.0, 2.0, 4.0], [0.9, 1.7, 3.5])
    tied = rows(0.25, [1.0, 2.0, 4.0], [1.1, 1.9, 4.0])
    table = layer_table([*faster, *slower, *tied])
    assert [row["loop_over_moepp_low"] > 1 for row in table] == [True, False, False]
    assert [row["loop_over_moepp_high"] < 1 for row in table] == [False, True, False]
    lines = list(layer_report([*faster, *slower, *tied]))
    assert any(line.startswith("Of 3 layers") and "in 1, and slower in 1;" in line for line in lines)


def test_an_implementation_that_fails_is_a_cell(tmp_path, monkeypatch):
    monkeypatch.setitem(contest.IMPLEMENTATIONS, "loop", failing(ValueError("not with\nthese weights")))
    monkeypatch.setitem(contest.IMPLEMENTATIONS, "sorted", failing(torch.OutOfMemoryError("CUDA out of memory. ...")))
    names = ["moepp", "floor", "loop", "sorted"]
    benchmark = LayerBenchmark(
        tokens=[32], ffn=[8], taus=[[0.75]], passes=[("float32", "forward")], implementations=names, **TINY
    )
    lines, _ = run_benchmark(benchmark, tmp_path)
    assert {row["loop_ms"] for row in table_of(tmp_path)} == {"ValueError: not with"}
    assert {row["sorted_ms"] for row in table_of(tmp_path)} == {"out of memory"}
    assert all(number(row, "speedup") > 0 for row in table_of(tmp_path))
    assert "Not measured: released loop (ValueError: not with)." in lines
    assert not any("| released loop |" in line for line in lines)


def test_one_that_fails_on_one_layer_keeps_its_column(tmp_path, monkeypatch):
    def of_vanilla_only(layer):
        if layer.config.experts.zero_computation:
            raise ValueError("no such experts")
        return lambda inputs: inputs.x_TD

    monkeypatch.setitem(contest.IMPLEMENTATIONS, "loop", of_vanilla_only)
    benchmark = LayerBenchmark(
        tokens=[32], ffn=[8], taus=[[0.75]], passes=[("float32", "forward")], routings=["learned"],
        implementations=["moepp", "loop"], **TINY,
    )  # fmt: skip
    lines, _ = run_benchmark(benchmark, tmp_path)
    assert any(line.startswith("| 8+4 |") and line.endswith("| ValueError: no such experts |") for line in lines)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_memory_is_measured_and_the_floor_never_waits(tmp_path):
    device, sizes = torch.device("cuda"), contest.Sizes(256, 64, 128, "bfloat16", True, 1.1)
    match = contest.Contest(sizes, [Case(8, 0.75, "learned")], ["moepp", "floor"], device, seed=0)
    assert all(row["gib"] > 0 and row["ms"] > 0 for row in match.run(repeats=2, warmup=2))
    call = match._call(match.keys[1], match._draws()[match.keys[1][0]])
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not match.failures


def test_one_that_loses_the_device_is_left_out_by_the_next_call(tmp_path, monkeypatch):
    lost = failing(torch.AcceleratorError("CUDA error: an illegal memory access"))
    monkeypatch.setitem(contest.IMPLEMENTATIONS, "loop", lost)
    benchmark = LayerBenchmark(
        tokens=[32], ffn=[8], taus=[[0.75]], passes=[("float32", "forward")], routings=["learned"],
        implementations=["moepp", "loop"], **TINY,
    )  # fmt: skip
    with pytest.raises(DeviceLost, match=r"loop on Case\(ffn=8, tau=None, .*illegal memory access; the same command"):
        run_benchmark(benchmark, tmp_path)
    run_benchmark(benchmark, tmp_path)
    for row in table_of(tmp_path):
        assert row["loop_ms"].startswith("AcceleratorError: CUDA error") and number(row, "moepp_ms") > 0
