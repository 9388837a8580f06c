"""Run records of a sweep as plain data. Only finished runs count; any other trial is listed with its reason."""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from moepp.config import leaves
from moepp.errors import UsageError
from moepp.program import program
from moepp.records import RunRecord, read_json
from moepp.reports.targets import target_share
from moepp.statistics.seeds import Estimate, mean_interval

ROUTINGS = ("learned", "balanced")  # by the trained router, and forced to its target load


@dataclass(frozen=True)
class Run:
    """One finished trial. `curve` holds (tokens seen, val/loss); `first_ms` and `last_ms` are Unix times of its log."""

    arm: str
    seed: int
    path: Path  # of its record, whose name is the identity of its config
    final: dict[str, float]
    budget: dict[str, float]  # as planned, but for the tokens of a run that a callback stopped early
    size: str  # a file of conf/size, such as `1b`; empty where the record names none
    experts: dict[str, int]  # ffn, zero, copy, constant, shared; empty for a dense model
    target_share: float | None  # of all slots, what the balance aims to send to FFN experts
    provenance: dict[str, Any]
    config: dict[str, Any]  # by dotted key
    curve: tuple[tuple[float, float], ...]
    first_ms: int
    last_ms: int

    def value(self, metric: str) -> float | None:
        """`final/<metric>`, else the budget of that name; None when it is absent or not finite."""
        value = self.final.get(metric, self.budget.get(metric))
        return value if isinstance(value, int | float) and math.isfinite(value) else None


@dataclass(frozen=True)
class ExpertTime:
    """Expert-layer forward time of one arm, in ms; `ffn_width` is the hidden FFN units that a token of the timed batch
    passes. Both are summed over the MoE layers.
    """

    median_ms: float
    min_ms: float
    ffn_width: float


@dataclass(frozen=True)
class SweepResults:
    name: str
    scale: str
    baseline: str
    match: str
    runs: dict[str, dict[int, Run]]  # arm -> seed -> run
    missing: dict[tuple[str, int], str] = field(default_factory=dict)  # (arm, seed) -> why there is no result
    lengthened: dict[str, dict[float, dict[int, Run]]] = field(default_factory=dict)  # arm -> times the tokens -> seed
    expert_times: dict[tuple[str, str], ExpertTime] = field(default_factory=dict)  # (arm, routing)
    training_speeds: dict[str, float] = field(default_factory=dict)  # tokens per second of a forward and backward pass
    timing_setup: dict[str, Any] = field(default_factory=dict)  # hardware, threads, tokens, dtype, repeats, date
    overrides: tuple[str, ...] = ()  # config values that the command line gave
    seeds: tuple[int, ...] = ()  # of all trials, where they are not those of the sweep's file
    scored: dict[str, str] = field(default_factory=dict)  # --tasks, --tasks-dir and --limit that scored the trials

    @property
    def size(self) -> str:
        """That of the runs, which is the same in all arms."""
        return next(run.size for by_seed in self.runs.values() for run in by_seed.values())

    @property
    def chose_size(self) -> bool:
        """Whether the command named another size than the scale's own."""
        return any(word.startswith(("size=", "recipe=")) for word in self.overrides)

    def target_share(self, arm: str) -> float | None:
        return next((run.target_share for run in self.runs.get(arm, {}).values()), None)

    def by_seed(self, arm: str, metric: str) -> dict[int, float]:
        """The metric of every finished seed of `arm`, in the order of seeds."""
        runs = self.runs.get(arm, {})
        values = {seed: runs[seed].value(metric) for seed in sorted(runs)}
        return {seed: value for seed, value in values.items() if value is not None}

    def at_lengths(self, arm: str) -> dict[float, dict[int, Run]]:
        """The finished runs of an arm by how many times its tokens they trained on, in rising order; 1 is its own."""
        return dict(sorted({1.0: self.runs.get(arm, {}), **self.lengthened.get(arm, {})}.items()))

    def estimate(self, arm: str, metric: str) -> Estimate | None:
        values = self.by_seed(arm, metric)
        return mean_interval(list(values.values())) if values else None

    def mean(self, arm: str, metric: str) -> float | None:
        estimate = self.estimate(arm, metric)
        return estimate.mean if estimate else None

    @property
    def timing_scatter(self) -> float:
        """The largest ratio of an expert forward's median to its fastest call: near 1 where nothing else ran beside."""
        return max((time.median_ms / time.min_ms for time in self.expert_times.values() if time.min_ms), default=1.0)

    def ratio(self, arm: str, routing: str, of: Callable[[ExpertTime], float]) -> float | None:
        """`of(baseline) / of(arm)` under the same routing; None without both times."""
        ours, base = self.expert_times.get((arm, routing)), self.expert_times.get((self.baseline, routing))
        return of(base) / of(ours) if ours and base and of(ours) else None


def load_sweep_results(directory: Path | str) -> SweepResults:
    """Everything the tables need from `runs/<sweep>-<scale>/`. Raises UsageError when no trial has finished."""
    directory = Path(directory)
    sweep = read_json(directory / "sweep.json")
    runs: dict[str, dict[int, Run]] = {}
    lengthened: dict[str, dict[float, dict[int, Run]]] = defaultdict(dict)
    missing = {}
    for trial in sweep["trials"] if sweep else []:
        arm, seed = trial["arm"], trial["seed"]
        record = RunRecord(directory / trial["path"])
        reason, run = _unfinished(record), None
        if reason is None and (run := _finished(record, arm, seed)) is None:
            reason = "final/val_loss is not finite"
        if run is not None:
            length = trial.get("length")
            by_seed = lengthened[trial["of_arm"]].setdefault(length, {}) if length else runs.setdefault(arm, {})
            by_seed[seed] = run
        elif not trial.get("left_out"):  # of what the newest call asks for
            missing[arm, seed] = reason
    if not runs:
        raise UsageError(
            f"{directory} holds no finished run; run `{program()} reproduce EXPERIMENT --scale SCALE` first"
            f" (`{program()} reproduce --list` names the experiments)"
        )
    timing = read_json(directory / "timing.json") or {}
    times = {
        (row["arm"], row["routing"]): ExpertTime(row["median_ms"], row["min_ms"], row["ffn_width"])
        for row in timing.pop("expert_forward", [])
    }
    speeds = {row["arm"]: 1000 * row["tokens"] / row["median_ms"] for row in timing.pop("training", [])}
    about = {key: sweep[key] for key in ("name", "scale", "baseline", "match")}
    return SweepResults(
        **about,
        runs=runs,
        missing=missing,
        lengthened=dict(lengthened),
        expert_times=times,
        training_speeds=speeds,
        timing_setup=timing,
        overrides=_overrides(directory, sweep),
        seeds=_other_seeds(sweep),
        scored=read_json(directory / "tasks.json") or {},
    )


def _overrides(directory: Path, sweep: dict[str, Any]) -> tuple[str, ...]:
    """Those of the runs, with the folder in which they are now."""
    given = tuple(word for word in sweep.get("overrides", ()) if not word.startswith("runs="))
    return given if directory.parent == Path("runs") else (*given, f"runs={directory.parent}")


def _other_seeds(sweep: dict[str, Any]) -> tuple[int, ...]:
    trained = sorted({trial["seed"] for trial in sweep["trials"]})
    return () if trained == sorted(sweep.get("file_seeds", trained)) else tuple(trained)


def _unfinished(record: RunRecord) -> str | None:
    """Why the trial has no result; None when it has one."""
    if record.status == "failed":
        reason = record.read("failed.json").get("reason", "no reason recorded")
        return f"failed ({' '.join(reason.split())[:200]})"  # a reason may be the tail of a log: keep it to one line
    if record.status == "damaged":
        return f"damaged ({record.damage})"
    if record.status == "pruned":
        return f"pruned ({record.read('pruned.json')['reason']})"
    if record.status != "done":
        return "not finished" if record.status == "started" else "not started"
    if not (record.path / "config.yaml").is_file():
        return f"damaged ({record.path} has no config.yaml; restore it, or remove the folder to train it again)"
    return None


def _finished(record: RunRecord, arm: str, seed: int) -> Run | None:
    """None without a finite loss at the end."""
    return _read(record.path, (record.path / "metrics.jsonl").stat().st_mtime_ns, arm, seed)


@lru_cache(maxsize=2**12)  # a report asks several times, of a thousand runs
def _read(path: Path, written_ns: int, arm: str, seed: int) -> Run | None:
    record = RunRecord(path)
    final = record.final()
    if not math.isfinite(final.get("val_loss", math.nan)):
        return None
    lines = record.metrics()
    budget, config = record.read("budget.json"), record.read("config.yaml")
    model = config.get("model", {})
    if budget and (stopped := final.get("stopped_at_step")):
        budget["tokens"] = budget["tokens"] * stopped // config["trainer"]["steps"]
    tokens_per_step = budget.get("tokens", 0) / max(1, lines[-1]["step"])
    return Run(
        arm=arm,
        seed=seed,
        path=record.path,
        final=final,
        budget=budget,
        size=config.get("tags", {}).get("size", ""),
        experts=model.get("experts", {}) if model.get("moe_every", 1) else {},
        target_share=target_share(model),
        provenance=record.read("provenance.json"),
        config=dict(leaves(config)),
        curve=tuple((line["step"] * tokens_per_step, line["val/loss"]) for line in lines if "val/loss" in line),
        first_ms=lines[0]["time"],
        last_ms=next(line["time"] for line in reversed(lines) if "final/val_loss" in line),  # tasks may follow later
    )
