import json

import pytest
from mirrored import make_sweep, store

from moepp.records import read_json, write_json
from moepp.tracking import arm_runs
from moepp.tracking.arm_runs import COLOUR, ArmRun, colours_of, log_arms
from moepp.tracking.mirror import FolderMirror
from moepp.tracking.mlflow_views import ARMS, INTERVAL, TAG, view_key
from moepp.tracking.settings import TrackingConfig

DIFFERENCE = {"val_loss_minus_baseline": -0.2, "val_loss_minus_baseline_low": -0.3, "val_loss_minus_baseline_high": 0.1}
FOUND = {
    "a": ArmRun({"val_loss": 3.0}, {"val/loss": [(100, 4.0), (200, 3.0)]}),
    "b": ArmRun({"val_loss": 2.8, **DIFFERENCE}, {"val/loss": [(100, 3.9), (200, 2.8)]}),
}


@pytest.fixture
def sweep(runs, request):
    directory = make_sweep(runs, request.node.name[:40].replace("[", "_"))
    FolderMirror(directory, TrackingConfig(), runs).sync(ended=True)
    log_arms(directory, TrackingConfig(), runs, FOUND)
    return directory


def view_of(directory, runs):
    parent = read_json(directory / "mlflow.json")
    tags = store(runs).get_experiment(parent["experiment_id"]).tags
    return json.loads(json.loads(tags[TAG + view_key(parent["run_id"], ARMS)])["state"])


def shown(directory, runs):
    place = read_json(directory / "mlflow.json")["experiment_id"]
    found = store(runs).search_runs([place], view_of(directory, runs)["searchFilter"])
    return {run.info.run_name: run for run in found}


def test_a_report_gives_every_arm_a_run_in_a_colour_of_its_own(sweep, runs):
    found = shown(sweep, runs)
    assert set(found) == {"a", "b"} and found["b"].data.metrics["val_loss_minus_baseline_low"] == -0.3
    colours = colours_of(read_json(sweep / "sweep.json"))
    assert {name: run.data.tags[COLOUR] for name, run in found.items()} == colours and len(set(colours.values())) == 2
    points = store(runs).get_metric_history(found["b"].info.run_id, "val/loss")
    assert [(point.step, point.value) for point in points] == [(100, 3.9), (200, 2.8)]


def test_the_interval_is_a_line_at_the_arms_place(sweep, runs):
    run = shown(sweep, runs)["b"]
    points = store(runs).get_metric_history(run.info.run_id, INTERVAL)
    assert [(p.step, p.value) for p in sorted(points, key=lambda p: p.timestamp)] == [(1, -0.3), (1, -0.2), (1, 0.1)]


def test_the_view_answers_with_these_runs_and_children_stay_trials(sweep, runs):
    charts = [chart["metricKey"] for chart in view_of(sweep, runs)["compareRunCharts"]]
    assert charts[0] == INTERVAL and {"expert_forward_speedup", "tokens_per_s", "val_accuracy"} < set(charts)
    FolderMirror(sweep, TrackingConfig(), runs).sync(ended=True)  # leaves the view
    assert view_of(sweep, runs)["compareRunCharts"][0]["metricKey"] == INTERVAL
    parent = read_json(sweep / "mlflow.json")
    below = f"tags.`mlflow.parentRunId` = '{parent['run_id']}'"
    assert len(store(runs).search_runs([parent["experiment_id"]], below)) == 2


def test_the_same_report_changes_nothing_and_another_replaces_what_differs(sweep, runs):
    before = {name: run.info.run_id for name, run in shown(sweep, runs).items()}
    log_arms(sweep, TrackingConfig(), runs, FOUND)
    assert {name: run.info.run_id for name, run in shown(sweep, runs).items()} == before
    log_arms(sweep, TrackingConfig(), runs, FOUND | {"b": ArmRun({"val_loss": 2.7})})
    after = shown(sweep, runs)
    assert after["a"].info.run_id == before["a"] and after["b"].data.metrics == {"val_loss": 2.7}


def test_a_dead_tracker_costs_a_line(sweep, runs, capsys, monkeypatch):
    def away(*_):
        raise ConnectionError("refused")

    monkeypatch.setattr(arm_runs, "find_run", away)
    log_arms(sweep, TrackingConfig(), runs, FOUND)
    assert "the arms of the report are not in" in capsys.readouterr().err


def test_trials_have_the_colour_of_their_arm_and_every_key_they_differ_in(runs):
    directory = make_sweep(runs, "sweep-of-decay")
    plan = read_json(directory / "sweep.json")
    for trial, arm, decay in (("aaaa", "a", "0.1"), ("bbbb", "b", "null")):
        config = directory / trial / "config.yaml"
        text = config.read_text().replace("arm: zero+copy", f"arm: {arm}")
        config.write_text(
            text.replace("{name: adamw, lr: 0.0005}", f"{{name: adamw, lr: 0.0005, weight_decay: {decay}}}")
        )
    write_json(directory / "sweep.json", plan)
    FolderMirror(directory, TrackingConfig(), runs).sync(ended=True)
    colours = colours_of(plan)
    decays = {}
    for trial in plan["trials"]:
        run = store(runs).get_run(read_json(directory / trial["path"] / "mlflow.json")["run_id"])
        decays[trial["arm"]] = run.data.params["optim.weight_decay"]
        assert run.data.tags[COLOUR] == colours[trial["arm"]]
    assert decays == {"a": "0.1", "b": "null"}


def test_a_key_that_a_later_trial_differs_in_is_added_to_those_before(runs):
    directory = make_sweep(runs, "sweep-that-grows")
    later = directory / "bbbb" / "config.yaml"
    text = later.read_text()
    later.unlink()
    FolderMirror(directory, TrackingConfig(), runs).sync(ended=True)
    later.write_text(text.replace("corpus: sotu", "corpus: sotu, seq_len: 64"))
    FolderMirror(directory, TrackingConfig(), runs).sync(ended=True)
    ids = [read_json(directory / trial / "mlflow.json")["run_id"] for trial in ("aaaa", "bbbb")]
    assert [store(runs).get_run(i).data.params["data.seq_len"] for i in ids] == ["null", "64"]
