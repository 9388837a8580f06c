"""The saved views with which MLflow opens a sweep: columns, order, groups and charts.

MLflow keeps a saved view in a tag of the experiment and lists it under "Views". A version that does not know them opens
the same address with its own columns.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

TAG = "mlflow.sharedViewState."  # followed by the view's key
ARMS_OF = "arms_of"  # tag of the runs that a report makes for the arms of a sweep: its parent run
ANSWER = {  # what the view of arms shows of these runs, and the widths of the columns
    "val_loss_minus_baseline": 190, "val_loss_minus_baseline_low": 110, "val_loss_minus_baseline_high": 110,
    "expert_forward_speedup": 110, "tokens_per_s": 110, "val_accuracy": 110, "ffn_per_token": 115, "val_loss": 90,
}  # fmt: skip
DIFFERENCE = "val_loss_minus_baseline"
INTERVAL = f"interval/{DIFFERENCE}"  # low, mean and high at one step, which a chart of lines draws as a bar
ARMS, TRIALS = "arms", "trials"
OBJECTIVE = "final/val_loss"
RESULTS = {  # and the widths of their columns, in pixels
    OBJECTIVE: 120, "final/val_bits_per_byte": 180, "final/val_accuracy": 150, "final/ffn_per_token": 155,
    "final/flops_per_token": 165, "final/expert_forward_ms": 190, "final/tokens_per_s": 150, "final/train_seconds": 155,
}  # fmt: skip
FOLDED = ("final", "perf", "router", "train", "val", "Model metrics", "System metrics")  # MLflow's own sections
FOLDED_ARMS = 100  # more would not fit into a tag


def view_key(parent_run_id: str, view: str) -> str:
    """`view` is ARMS, seeds averaged, or TRIALS, every run from the lowest loss on."""
    return f"{parent_run_id}-{view}"


def saved_views(
    sweep: str, parent_run_id: str, created_ms: int, arms: Sequence[str], varied: Sequence[str]
) -> dict[str, str]:
    """Experiment tags with both views of a sweep. `varied` names the params in which its arms differ."""
    trials_of = f"tags.`mlflow.parentRunId` = '{parent_run_id}'"
    by_arm = {"aggregateFunction": "average", "groupByKeys": [{"mode": "param", "groupByData": "arm"}]}
    averages = {
        **_state(trials_of, OBJECTIVE, RESULTS, [], [_scatter("final/ffn_per_token", OBJECTIVE), *_curves()]),
        "groupBy": by_arm,
        "groupsExpanded": {f"param.arm.{arm}": False for arm in arms[:FOLDED_ARMS]},
        "runsHiddenMode": "SHOW_ALL",
    }
    trials = {
        **_state(trials_of, OBJECTIVE, RESULTS, ["seed", *varied], [_parallel(varied or ["seed"]), *_curves()]),
        "runsHiddenMode": "FIRST_20_RUNS",
    }
    return {
        TAG + view_key(parent_run_id, view): _envelope(f"{sweep}: {view}", created_ms, state)
        for view, state in ((ARMS, averages), (TRIALS, trials))
    }


def arms_view(sweep: str, parent_run_id: str, created_ms: int) -> str:
    """The view of arms once a report has made their runs: the value of its experiment tag. It answers on one screen."""
    charts = [
        _line(INTERVAL),
        _bar("expert_forward_speedup"),
        _bar("tokens_per_s"),
        _line("val/loss"),
        _bar("val_accuracy"),
        _bar("ffn_per_token"),
    ]
    state = _state(f"tags.{ARMS_OF} = '{parent_run_id}'", DIFFERENCE, ANSWER, [], charts)
    state["compareRunSections"][0] |= {"columns": 3, "cardHeight": 235}
    return _envelope(f"{sweep}: {ARMS}", created_ms, state | {"runsHiddenMode": "SHOW_ALL"})


def _state(
    found_by: str, order: str, metrics: Mapping[str, int], params: Sequence[str], charts: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    columns = [f"params.`{name}`" for name in params] + [f"metrics.`{name}`" for name in metrics]
    sections = [{"uuid": "sweep", "name": "sweep", "display": True, "isReordered": True}]
    sections += [{"uuid": name, "name": name, "display": False, "isReordered": False} for name in FOLDED]
    return {
        "searchFilter": found_by,
        "orderByKey": f"metrics.`{order}`",
        "orderByAsc": True,
        "selectedColumns": columns,
        "columnOrder": columns,
        "columnWidths": {f"metrics.`{name}`": width for name, width in metrics.items()},
        "compareRunCharts": [
            {"uuid": f"sweep-{i}", "metricSectionId": "sweep", "deleted": False, "isGenerated": False, **chart}
            for i, chart in enumerate(charts)
        ],
        "compareRunSections": sections,
        "isAccordionReordered": True,  # else MLflow sorts the sections by name
    }


def _curves() -> list[dict[str, Any]]:
    return [_line("val/loss"), _line("train/loss"), _line("router/ffn_per_token"), _line("router/load_max_over_mean")]


def _line(metric: str) -> dict[str, Any]:
    return {
        "type": "LINE", "metricKey": metric, "selectedMetricKeys": [metric], "displayName": metric, "lineSmoothness": 0,
        "scaleType": "linear", "xAxisKey": "step", "xAxisScaleType": "linear", "selectedXAxisMetricKey": "",
        "yAxisKey": "metric", "yAxisExpressions": [], "range": {}, "ignoreOutliers": False, "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True, "runsCountToCompare": 20,
    }  # fmt: skip


def _bar(metric: str) -> dict[str, Any]:
    return {"type": "BAR", "metricKey": metric, "displayName": metric, "runsCountToCompare": 20}


def _scatter(x: str, y: str) -> dict[str, Any]:
    axes = {axis: {"key": key, "type": "METRIC"} for axis, key in (("xaxis", x), ("yaxis", y))}
    return {"type": "SCATTER", **axes, "runsCountToCompare": 100}


def _parallel(params: Sequence[str]) -> dict[str, Any]:
    return {"type": "PARALLEL", "selectedParams": list(params), "selectedMetrics": [OBJECTIVE], "showAllRuns": True}


def _envelope(name: str, created_ms: int, state: Mapping[str, Any]) -> str:
    text = json.dumps(state, separators=(",", ":"))
    return json.dumps({"name": name, "createdAt": created_ms, "updatedAt": created_ms, "state": text})
