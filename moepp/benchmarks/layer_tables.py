"""The layer benchmark's rows side by side: one row per layer and routing, a column per implementation, and ratios."""

from collections.abc import Iterator

from moepp.benchmarks.cases import SETS, Case
from moepp.benchmarks.tables import Columns, Row, markdown_table, ratio
from moepp.layers.settings import ffn_share
from moepp.statistics.seeds import ratio_interval

# Expert forward of MoE++ over vanilla MoE in the paper's Table 3 (0.6B, 1B, 2B), by the FFN experts of the set.
PAPER = {
    8: {0.10: 2.645, 0.25: 1.927, 0.50: 1.382, 0.75: 1.252, 1.0: 1.191},
    16: {0.10: 2.112, 0.25: 1.587, 0.50: 1.301, 0.75: 1.221, 1.0: 1.152},
    32: {0.10: 1.635, 0.25: 1.443, 0.50: 1.283, 0.75: 1.218, 1.0: 1.157},
}
NAMES = {
    "moepp": "ours", "triton": "triton", "grouped": "grouped", "sorted": "sorted", "floor": "GEMM floor",
    "expert_floor": "floor by expert", "zero_computation": "zero-comp. part", "loop": "released loop",
    "transformers_eager": "transformers eager", "transformers_grouped_mm": "transformers grouped_mm",
    "whole_layer": "with router",
}  # fmt: skip
LAYER: Columns = {
    "tokens": ("tokens", ""), "experts": ("experts", ""), "tau": ("tau", ""), "routing": ("routing", ""),
    "ffn_share": ("FFN share", ".2f"),
}  # fmt: skip
RATIOS: Columns = {
    "tflops": ("ours, TFLOP/s", ".3g"), "over_floor": ("ours / floor", ".2f"),
    "over_expert_floor": ("ours / floor by expert", ".2f"),
    "zero_computation_share": ("zero-comp. part / ours", ".2f"), "loop_over_moepp": ("released loop / ours", ".2f"),
    "loop_over_moepp_low": ("from", ".2f"), "loop_over_moepp_high": ("to", ".2f"),
    "best_transformers_over_moepp": ("best transformers / ours", ".2f"), "speedup": ("over vanilla", ".2f"),
    "device_speedup": ("over vanilla, device", ".2f"), "floor_speedup": ("floor's", ".2f"),
    "ideal_speedup": ("ideal", ".2f"), "paper_speedup": ("paper", ".2f"),
}  # fmt: skip

FLOOR = (
    "GEMM floor: all rows in one product per projection, as if there were one expert. Whoever has E experts reads E"
    " times its weights, which few rows to an expert do not repay: the more experts and the fewer tokens, the farther"
    " from it is everybody."
)
EXPERT_FLOOR = "Floor by expert: the products of every expert, one after the other, on rows that are sorted already."

MORE = (  # where it was measured: the suffix of a column, what the table says, and how it is written
    ("_device_ms", "Milliseconds of the device alone, once the host has queued the call:", ",.4g"),
    ("_gib", "GiB above what stood there before the call:", ".3g"),
    ("_resident_gib", "GiB by which the process grew, with what libraries need for themselves and holes:", ".3g"),
)


def layer_table(rows: list[Row]) -> list[Row]:
    """`{implementation}_ms` holds the reason where there is no time. `vanilla`, and what a layer is compared with, are
    of the same group: the same tokens, dtype and direction, timed in turn with it.
    """
    layers: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        layers.setdefault((row["group"], row["ffn"], row["tau"], row["routing"]), {})[row["implementation"]] = row
    return [
        _row(found, layers.get((group, ffn, None, routing), {})) for (group, ffn, _, routing), found in layers.items()
    ]


def _row(found: dict[str, Row], vanilla: dict[str, Row]) -> Row:
    one = next(iter(found.values()))
    case = Case(one["ffn"], one["tau"], one["routing"])
    ms = {name: row.get("ms") for name, row in found.items()}
    vanilla_ms = {name: row.get("ms") for name, row in vanilla.items()}
    share = _known(found, "ffn_share")
    transformers = [ms[name] for name in ms if name.startswith("transformers") and ms[name] is not None]
    return {
        "tokens": one["tokens"],
        "experts": f"{case.ffn}+{SETS[case.ffn].zero_computation}" if case.tau is not None else f"{case.ffn}",
        "tau": "vanilla" if case.tau is None else case.tau,
        "dtype": one["dtype"],
        "direction": one["direction"],
        "routing": case.routing,
        "ffn_share": share,
        "target_share": 1.0 if case.tau is None else ffn_share(case.counts, case.tau),
        **{f"{name}_ms": row["failure"] or row["ms"] for name, row in found.items()},
        **{f"{name}_min_ms": row.get("min_ms") for name, row in found.items()},
        **{f"{name}_device_ms": row.get("device_ms") for name, row in found.items()},
        **{f"{name}_gib": row["gib"] for name, row in found.items()},
        **{f"{name}_resident_gib": row.get("resident_gib") for name, row in found.items()},
        "tflops": ratio(_known(found, "tflop"), ms.get("moepp") and ms["moepp"] / 1000),
        "over_floor": ratio(ms.get("moepp"), ms.get("floor")),
        "over_expert_floor": ratio(ms.get("moepp"), ms.get("expert_floor")),
        "zero_computation_share": ratio(ms.get("zero_computation"), ms.get("moepp")) if case.tau is not None else None,
        "loop_over_moepp": ratio(ms.get("loop"), ms.get("moepp")),
        **_scatter(found, "loop", "moepp"),
        "best_transformers_over_moepp": ratio(min(transformers, default=None), ms.get("moepp")),
        "ideal_speedup": ratio(_known(vanilla, "ffn_share"), share),
        "floor_speedup": ratio(vanilla_ms.get("floor"), ms.get("floor")),
        "speedup": ratio(vanilla_ms.get("moepp"), ms.get("moepp")),
        "device_speedup": ratio(_device_ms(vanilla), _device_ms(found)),
        "paper_speedup": PAPER.get(case.ffn, {}).get(case.tau),
    }


def _scatter(found: dict[str, Row], name: str, other: str) -> Row:
    """The 95 % interval of the ratio of two that were timed in turn, call by call on the same routing."""
    calls = [found.get(each, {}).get("calls_ms") or [] for each in (name, other)]
    if len(calls[0]) != len(calls[1]) or len(calls[0]) < 2:
        return {}
    interval = ratio_interval(*calls)
    return {f"{name}_over_{other}_low": interval.low, f"{name}_over_{other}_high": interval.high}


def _known(found: dict[str, Row], key: str) -> float | None:
    """What all implementations that were timed have in common."""
    return next((row[key] for row in found.values() if row.get(key) is not None), None)


def _device_ms(found: dict[str, Row]) -> float | None:
    return found.get("moepp", {}).get("device_ms")


def layer_report(rows: list[Row]) -> Iterator[str]:
    """For every dtype and direction a table of times, one of ratios, and one of memory where it was measured."""
    table, failures = layer_table(rows), _nowhere(rows)
    layer = {key: column for key, column in LAYER.items() if len({row[key] for row in table}) > 1 or key == "ffn_share"}
    names = {name: title for name, title in NAMES.items() if name not in failures}
    for dtype, direction in dict.fromkeys((row["dtype"], row["direction"]) for row in table):
        part = [row for row in table if (row["dtype"], row["direction"]) == (dtype, direction)]
        yield from (f"## {dtype}, {direction}", "", "Milliseconds:", "")
        yield from markdown_table(part, layer | {f"{name}_ms": (title, ",.4g") for name, title in names.items()})
        yield from ("", "Ratios:", "")
        yield from markdown_table(part, layer | RATIOS)
        for suffix, title, spec in MORE:
            columns = {f"{name}{suffix}": (column, spec) for name, column in names.items()}
            if any(row.get(key) is not None for row in part for key in columns):
                yield from ("", title, "")
                yield from markdown_table(part, layer | columns)
        yield ""
    yield from _against_the_loop(table)
    for name, text in (("floor", FLOOR), ("expert_floor", EXPERT_FLOOR)):
        if any(row["implementation"] == name for row in rows):
            yield from (text, "")
    for name, reason in failures.items():
        yield f"Not measured: {NAMES[name]} ({reason})."


def _against_the_loop(table: list[Row]) -> Iterator[str]:
    """How often the whole interval lies on one side."""
    judged = [row for row in table if row.get("loop_over_moepp_low") is not None]
    if judged:
        ahead = sum(row["loop_over_moepp_low"] > 1 for row in judged)
        behind = sum(row["loop_over_moepp_high"] < 1 for row in judged)
        yield (
            f"Of {len(judged)} layers ours is faster than the released loop, beyond the scatter of the calls, in "
            f"{ahead}, and slower in {behind}; between equals chance alone gives some {len(judged) / 40:.0f} of each."
        )
        yield ""


def _nowhere(rows: list[Row]) -> dict[str, str]:
    """The implementations that ran on no layer, with what they said first."""
    ran = {row["implementation"] for row in rows if not row["failure"]}
    return {row["implementation"]: row["failure"] for row in reversed(rows) if row["implementation"] not in ran}
