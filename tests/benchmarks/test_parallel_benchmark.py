import csv
import signal

import pytest

from moepp.benchmarks import parallel
from moepp.benchmarks.parallel import ParallelBenchmark, run_parallel, traffic_table
from moepp.cli import main
from moepp.errors import UsageError


def quick(**given):
    return ParallelBenchmark(**(ParallelBenchmark.SCALES["laptop"] | given))


def test_what_crosses_is_what_ffn_experts_elsewhere_get(tmp_path):
    benchmark = quick(devices=2, dim=32, hidden=48, tokens=80, routings=("balanced",), repeats=2, sizes=(4096, 65536))
    handler = signal.getsignal(signal.SIGTERM)
    rows = run_parallel(benchmark, tmp_path)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert [(row["group"], row["tau"]) for row in rows] == [(1, "vanilla"), (2, "vanilla"), (1, 0.75), (2, 0.75)]
    alone, vanilla, _, moepp = rows
    assert (alone["bytes_sent"], alone["messages"], alone["exchange_ms"]) == (0, 0, 0)
    assert vanilla["messages"] == moepp["messages"] == 4  # one peer; rows there and back, and their gradients
    assert vanilla["ffn_share"] == 1 and moepp["ffn_share"] == pytest.approx(0.6)
    assert vanilla["device_load_max_over_mean"] == moepp["device_load_max_over_mean"] == pytest.approx(1, abs=0.05)
    row_bytes = 32 * 4
    # Balanced: half of the 160 slots of each device belong to experts of the other; each row crosses four times.
    assert vanilla["bytes_sent"] == 4 * 80 * row_bytes and vanilla["busiest_bytes"] == 80 * row_bytes
    assert moepp["bytes_sent"] == vanilla["bytes_sent"] * 6 // 10  # the FFN share
    assert all(row["step_ms"] > 0 and (row["exchange_ms"] > 0) == (row["group"] > 1) for row in rows)
    with open(tmp_path / "exchanges.csv") as file:
        assert [(row["messages"], row["bytes"]) for row in csv.DictReader(file)] == [("1", "4096"), ("1", "65536")]
    assert (tmp_path / "report.md").read_text().count("\n|") == 2 + len(rows)
    assert len(list(traffic_table(rows))) == 2 + len(rows)


def test_one_device_has_step_times_and_sends_nothing(tmp_path):
    benchmark = quick(devices=1, dim=32, hidden=48, tokens=16, repeats=1)
    rows = run_parallel(benchmark, tmp_path)
    assert [(row["group"], row["tau"]) for row in rows] == [(1, "vanilla"), (1, 0.75)]
    assert all(row["bytes_sent"] == row["messages"] == row["exchange_ms"] == 0 < row["step_ms"] for row in rows)
    assert not (tmp_path / "exchanges.csv").exists()


def test_groups_divide_devices_and_experts():
    assert ParallelBenchmark(devices=4).groups == [1, 2, 4]
    assert ParallelBenchmark(devices=16, ffn=8).groups == [1, 2, 4, 8]
    assert ParallelBenchmark(devices=6).groups == [1, 2]


def test_devices_that_cannot_share_experts_are_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(UsageError, match="3 devices cannot share 8 FFN experts"):
        run_parallel(ParallelBenchmark(devices=3), tmp_path)
    monkeypatch.setattr(parallel.torch.cuda, "device_count", lambda: 1)
    assert main(["bench", "parallel", "--devices", "2", "--out", str(tmp_path)]) == 2
    assert "--devices 2, but 1 GPUs are visible" in capsys.readouterr().err


def test_busiest_device_counts_what_it_sends_and_gets():
    rows_WE = [[5, 1, 2, 0], [4, 0, 0, 7]]  # from each device to each expert; two experts on a device
    assert parallel._busiest(rows_WE, 2) == 4  # device 1 sends 4, device 0 sends 2
    assert parallel._imbalance(rows_WE, 2) == pytest.approx(10 / 9.5)
    assert parallel._busiest(rows_WE, 1) == 0
