import math

import pytest
from synthetic_sweep import START_MS, TOKENS, write_run, write_sweep

from moepp.errors import UsageError
from moepp.records import RunRecord, write_json
from moepp.reports.results import load_sweep_results


def test_reads_finals_budgets_experts_and_curves(tmp_path):
    results = load_sweep_results(write_sweep(tmp_path, {"vanilla": {0: 3.2, 1: 3.4}, "zero": {0: 3.1, 1: 3.2}}))
    run = results.runs["zero"][1]
    assert (results.baseline, results.scale, results.match) == ("vanilla", "laptop", "tokens")
    assert run.value("val_loss") == 3.2 and run.value("total_params") == 1_000_000 and run.value("absent") is None
    assert run.experts == {"ffn": 8, "zero": 1, "copy": 1, "constant": 2}
    assert run.curve[0] == (TOKENS / 4, pytest.approx(3.2 + 75 / 50)) and run.curve[-1] == (TOKENS, pytest.approx(3.2))
    assert run.first_ms == START_MS + 25_000
    assert results.mean("vanilla", "val_loss") == pytest.approx(3.3)
    assert results.mean("vanilla", "tokens_per_s") == 1005


def test_absolute_record_paths_work(tmp_path):
    write_run(tmp_path / "elsewhere", 3.0)
    trials = [{"arm": "vanilla", "seed": 0, "path": str(tmp_path / "elsewhere")}]
    about = {"name": "s", "question": "?", "scale": "laptop", "baseline": "vanilla", "match": "tokens"}
    write_json(tmp_path / "sweep" / "sweep.json", {**about, "trials": trials})
    assert load_sweep_results(tmp_path / "sweep").mean("vanilla", "val_loss") == 3.0


def test_unfinished_failed_and_diverged_trials_are_named_and_left_out(tmp_path):
    write_sweep(tmp_path, {"vanilla": {0: 3.2, 1: 3.3, 2: math.nan, 3: 3.1, 4: 3.0, 5: 3.0}})
    (tmp_path / "trials/vanilla-5/config.yaml").unlink()
    (tmp_path / "trials/vanilla-4/metrics.jsonl").write_bytes(b"")
    (tmp_path / "trials/vanilla-1/done").unlink()
    (tmp_path / "trials/vanilla-3/done").unlink()
    RunRecord(tmp_path / "trials/vanilla-3").fail("out of memory\nTraceback ...")
    results = load_sweep_results(tmp_path)
    assert list(results.runs["vanilla"]) == [0]
    assert results.missing == {
        ("vanilla", 1): "not finished",
        ("vanilla", 2): "final/val_loss is not finite",
        ("vanilla", 3): "failed (out of memory Traceback ...)",
        ("vanilla", 4): f"damaged ({RunRecord(tmp_path / 'trials/vanilla-4').damage})",
        ("vanilla", 5): f"damaged ({tmp_path / 'trials/vanilla-5'} has no config.yaml; restore it, or remove the folder"
        " to train it again)",
    }


@pytest.mark.parametrize("sweep_exists", [False, True])
def test_nothing_finished_says_what_to_run(tmp_path, sweep_exists):
    if sweep_exists:
        write_sweep(tmp_path, {"vanilla": {0: 3.2}})
        (tmp_path / "trials/vanilla-0/done").unlink()
    with pytest.raises(UsageError, match=r"no finished run; run `python run.py reproduce") as error:
        load_sweep_results(tmp_path)
    assert "\n" not in str(error.value)


def test_speedups_compare_the_same_routing(tmp_path):
    write_sweep(tmp_path, {"vanilla": {0: 3.2}}, times={"vanilla": (12.0, 1.0), "zero": (10.0, 0.75)})
    results = load_sweep_results(tmp_path)
    assert results.ratio("zero", "learned", lambda t: t.median_ms) == pytest.approx(1.2)
    assert results.ratio("zero", "balanced", lambda t: t.ffn_width) == pytest.approx(4 / 3)
    assert results.ratio("copy", "learned", lambda t: t.median_ms) is None
    assert results.timing_setup == {"hardware": "two cores", "threads": 2, "repeats": 30}
