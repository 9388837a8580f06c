import json
import subprocess
import sys
from urllib.parse import unquote

import pytest
from synthetic_sweep import write_run, write_sweep

from moepp.config import CONF
from moepp.errors import UsageError
from moepp.records import RunRecord, write_json, write_text
from moepp.reports.side_by_side import (
    comparison_address,
    config_changes,
    metric_differences,
    pair,
    provenance_changes,
    read_side,
    side_by_side,
)
from moepp.tracking import pages

TINY = "seed: {seed}\ntags: {{arm: {arm}}}\nmodel: {{top_k: {top_k}, capacity_factor: null, experts: {{zero: 1}}}}\n"


@pytest.fixture
def sweep(tmp_path):
    """vanilla and zero share seeds 0, 1 and 2; zero's losses are lower by 0.1, 0.2 and 0.3; copy has seed 5 alone."""
    losses = {"vanilla": {0: 3.0, 1: 3.1, 2: 3.2}, "zero": {2: 2.9, 1: 2.9, 0: 2.9}, "copy": {5: 3.0}}
    directory = write_sweep(tmp_path / "sweep", losses)
    for arm, by_seed in losses.items():
        for seed in by_seed:
            text = TINY.format(seed=seed, arm=arm, top_k=2 if arm == "vanilla" else 1)
            write_text(directory / f"trials/{arm}-{seed}" / "config.yaml", text)
    return directory


def sides(directory, a="vanilla", b="zero"):
    return read_side(f"{directory}:{a}"), read_side(f"{directory}:{b}")


def test_two_arms_are_paired_over_their_seeds(sweep):
    pairs = pair(*sides(sweep))
    assert [(a.path.name, b.path.name) for a, b in pairs] == [(f"vanilla-{i}", f"zero-{i}") for i in range(3)]
    metrics = {metric.name: metric for metric in metric_differences(pairs)}
    loss = metrics["val_loss"]
    assert (loss.a, loss.b) == (pytest.approx(3.1), pytest.approx(2.9))
    assert (loss.difference.mean, loss.difference.n) == (pytest.approx(-0.2), 3)
    assert loss.difference.half_width == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-4)
    assert metrics["total_params"].difference.mean == 0
    assert next(iter(metrics)) == "val_loss"


def test_configs_differ_in_what_was_set_and_not_in_seeds_or_labels(sweep):
    (change,) = config_changes(pair(*sides(sweep)))
    assert (change.key, change.a, change.b) == ("model.top_k", "2", "1")


def test_a_key_that_one_config_lacks_or_leaves_empty_is_told_apart(sweep):
    path = sweep / "trials/zero-1" / "config.yaml"
    path.write_text(TINY.format(seed=1, arm="zero", top_k=2).replace("capacity_factor: null, ", "gate: softmax, "))
    changes = {change.key: (change.a, change.b) for change in config_changes(pair(*sides(sweep)))}
    assert changes == {
        "model.top_k": ("2", "1, 2"),
        "model.capacity_factor": ("null", "null, –"),
        "model.gate": ("–", "–, softmax"),
    }


def test_provenance_differs_in_what_can_change_a_result_and_not_in_when(sweep):
    common = {"started": "2026-01-01", "command": "a", "data": {"digest": "d", "train": {"tokens": 5}}}
    for arm, torch in (("vanilla", "2.11"), ("zero", "2.13")):
        for seed in range(3):
            about = common | {"started": f"{arm}{seed}", "versions": {"torch": torch, "numpy": "2.4"}}
            about["data"] = about["data"] | {"train": {"tokens": 5 + seed + len(arm)}}
            write_json(sweep / f"trials/{arm}-{seed}" / "provenance.json", about | {"git": {"sha": "abc"}})
    (change,) = provenance_changes(pair(*sides(sweep)))
    assert (change.key, change.a, change.b) == ("versions.torch", "2.11", "2.13")


def test_two_runs_make_a_pair_whatever_their_seeds(sweep):
    a, b = read_side(str(sweep / "trials/vanilla-0")), read_side(str(sweep / "trials/zero-2"))
    assert [(x.path.name, y.path.name) for x, y in pair(a, b)] == [("vanilla-0", "zero-2")]
    assert {change.key for change in config_changes(pair(a, b))} == {"seed", "model.top_k"}
    text = side_by_side(a, b)
    assert "±" not in text and "paired" not in text


def test_a_run_that_has_not_finished_still_shows_its_config(tmp_path, sweep):
    unfinished = write_run(tmp_path / "started", 3.0)
    write_text(unfinished.path / "metrics.jsonl", "")
    (unfinished.path / "done").unlink()
    text = side_by_side(read_side(str(sweep / "trials/vanilla-0")), read_side(str(unfinished.path)))
    assert "model.top_k" in text
    assert "total_params" in text and "val_loss" not in text


def test_damaged_runs_are_left_out_and_named(sweep):
    metrics = sweep / "trials/vanilla-0/metrics.jsonl"
    metrics.write_bytes(bytes(64))
    text = side_by_side(*sides(sweep))
    assert "paired over seeds 1, 2" in text and f"damaged and left out: {metrics} is cut off" in text
    with pytest.raises(UsageError, match=r"vanilla-0/metrics\.jsonl is cut off"):
        read_side(str(sweep / "trials/vanilla-0"))


def test_the_text_holds_settings_metrics_and_the_way_to_the_browser(sweep):
    lines = side_by_side(*sides(sweep)).splitlines()
    assert lines[2] == "paired over seeds 0, 1, 2"
    assert "model.top_k  2  1" in lines
    assert "made with: no difference" in lines
    loss = next(line for line in lines if line.startswith("val_loss "))
    assert loss.split() == ["val_loss", "3", "3.1", "2.9", "-0.2", "±", "0.248"]
    assert any(line.startswith("val_bits_per_byte ") for line in lines)
    assert "run.py sync" in lines[-1]


def test_a_metric_that_some_seeds_lack_states_its_n(sweep):
    for arm, seed in (("vanilla", 0), ("zero", 0), ("zero", 1)):
        RunRecord(sweep / f"trials/{arm}-{seed}").replace_final({"final/sciq_acc": 0.5})
    lines = side_by_side(*sides(sweep)).splitlines()
    assert next(line for line in lines if line.startswith("sciq_acc ")).split()[1] == "1"


def test_a_difference_beyond_its_interval_is_marked(tmp_path):
    losses = {"vanilla": {0: 3.0, 1: 3.1, 2: 3.2}, "zero": {0: 2.5, 1: 2.61, 2: 2.69}}
    text = side_by_side(*sides(write_sweep(tmp_path, losses)))
    assert next(line for line in text.splitlines() if line.startswith("val_loss ")).endswith("†")
    assert "tokens_per_s" in text and not any("tokens_per_s" in line and "†" in line for line in text.splitlines())


def test_the_page_that_compares_the_runs_in_mlflow(sweep, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    records = [record for both in pair(*sides(sweep)) for record in both]
    assert comparison_address(records) is None
    for i, record in enumerate(records):
        write_json(record.path / "mlflow.json", {"run_id": f"id{i}", "experiment_id": "7", "steps": {}})
    page = comparison_address(records)
    base, _, query = page.partition("?")
    assert base == "http://127.0.0.1:5000/#/compare-runs"
    parts = dict(part.split("=") for part in query.split("&"))
    assert json.loads(unquote(parts["runs"])) == [f"id{i}" for i in range(6)]
    assert json.loads(unquote(parts["experiments"])) == ["7"]
    assert not set(query) & set('"[] ')
    assert page in side_by_side(*sides(sweep))
    pages.remember_port(records[0].path.parent.parent, 5001)
    assert comparison_address(records).startswith("http://127.0.0.1:5001/#/compare-runs?")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:80/")
    assert comparison_address(records).startswith("http://tracker:80/#/compare-runs?")
    assert comparison_address([records[0], records[0]]).startswith("http://tracker:80/#/experiments/7/runs/id0?")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere", "nowhere is neither a run directory nor <sweep directory>:<arm>"),
        ("{}", "names no arm of the sweep; write {}:ARM with one of vanilla, zero, copy"),
        ("{}:zeros", "names no arm of the sweep; write {}:ARM with one of vanilla, zero, copy"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(sweep, given, message):
    with pytest.raises(UsageError) as caught:
        read_side(given.replace("{}", str(sweep)))
    assert message.replace("{}", str(sweep)) in str(caught.value) and "\n" not in str(caught.value)


def test_arms_without_finished_or_common_seeds_are_refused(sweep):
    with pytest.raises(UsageError, match="share no finished seed"):
        pair(*sides(sweep, b="copy"))
    (sweep / "trials/copy-5/done").unlink()
    with pytest.raises(UsageError, match=r"no run of .*:copy has finished"):
        sides(sweep, b="copy")


def test_it_needs_no_torch_and_no_mlflow(sweep):
    script = f"""
import sys
from moepp.cli import main
assert main(["compare", "{sweep}:vanilla", "{sweep}:zero"]) == 0
sys.exit(bool({{"torch", "mlflow", "lightning"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=CONF.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "model.top_k" in done.stdout
