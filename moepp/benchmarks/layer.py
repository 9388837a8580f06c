"""Times the expert layer against its floor and its peers, with routing that changes at every call.

A benchmark that repeats one routing hides what routing costs: kernels compiled for new shapes, caches, allocation.
"""

import csv
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from moepp.benchmarks.peers import Forward, available
from moepp.layers.moe import MoELayer
from moepp.layers.router import Routing
from moepp.layers.settings import BalanceConfig, ExpertCounts, MoEConfig, ffn_share
from moepp.records import write_json, write_text
from moepp.training.provenance import collect
from moepp.training.throughput import balanced_routing

# Expert forward of MoE++ over vanilla MoE in the paper's Table 3 (0.6B, 1B, 2B), by the FFN experts of the set.
PAPER = {
    8: {0.10: 2.645, 0.25: 1.927, 0.50: 1.382, 0.75: 1.252, 1.0: 1.191},
    16: {0.10: 2.112, 0.25: 1.587, 0.50: 1.301, 0.75: 1.221, 1.0: 1.152},
    32: {0.10: 1.635, 0.25: 1.443, 0.50: 1.283, 0.75: 1.218, 1.0: 1.157},
}
SETS = {8: ExpertCounts(8, 1, 1, 2), 16: ExpertCounts(16, 1, 1, 2), 32: ExpertCounts(32, 1, 1, 6)}
LOAD_SPREAD = 0.3  # standard deviation of the experts' log popularity: max over mean about 1.5, as trained routers show


@dataclass
class LayerBenchmark:
    """What is measured. Defaults are the paper's 0.6B layer at 4096 tokens, everything of Table 3."""

    tokens: int = 4096
    dim: int = 768
    hidden: int = 2048
    sets: list[int] = field(default_factory=lambda: [8, 16, 32])
    taus: list[float] = field(default_factory=lambda: [0.10, 0.25, 0.50, 0.75, 1.0])
    passes: list[tuple[str, str]] = field(
        default_factory=lambda: [(d, p) for d in ("float32", "bfloat16") for p in ("forward", "forward+backward")]
    )
    routings: list[str] = field(default_factory=lambda: ["learned", "balanced"])
    repeats: int = 5
    warmup: int = 1
    seed: int = 0

    @classmethod
    def quick(cls, **given: Any) -> "LayerBenchmark":
        """Under a minute on two cores: vanilla and tau 0.75 of one set, float32 forward and bfloat16 training."""
        passes = [("float32", "forward"), ("bfloat16", "forward+backward")]
        quick = {"sets": [8], "taus": [0.75], "passes": passes, "routings": ["learned"], "repeats": 3, "warmup": 1}
        return cls(**(quick | given))


@dataclass(frozen=True)
class Case:
    """One layer under one routing. `tau` None is vanilla MoE."""

    ffn: int
    tau: float | None
    routing: str

    @property
    def counts(self) -> ExpertCounts:
        return SETS[self.ffn] if self.tau is not None else ExpertCounts(self.ffn, 0, 0, 0)


def learned_like_routing(
    config: MoEConfig,
    tokens: int,
    generator: torch.Generator,
    device: torch.device,
    choices: torch.Generator | None = None,
) -> Routing:
    """Top-k of noisy popularities around the loads that the balance loss aims at: uneven, and new at every call.

    `choices` draws the tokens' noise where `generator`, which draws the popularities, is the same on several devices.
    """
    popularity_N = LOAD_SPREAD * torch.randn(config.experts.total, generator=generator)
    popularity_N[config.experts.ffn :] -= torch.tensor(config.balance.tau).log()
    uniform_TN = torch.rand(tokens, config.experts.total, generator=choices or generator)
    logits_TN = popularity_N - (-uniform_TN.log()).log()  # Gumbel noise: top-k samples by popularity
    gate_TK, expert_TK = logits_TN.softmax(-1).topk(config.top_k)
    gate_TK = gate_TK / gate_TK.sum(-1, keepdim=True)
    return Routing(expert_TK.to(device), gate_TK.to(device), torch.empty(tokens, 0, device=device))


def run(benchmark: LayerBenchmark, out: Path, progress: bool = True) -> list[dict[str, Any]]:
    """Measures and writes table.csv, report.md and provenance.json into `out`; returns the table's rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = list(available())
    groups = [(ffn, *one) for ffn in benchmark.sets for one in benchmark.passes]
    calls = len(groups) * (1 + len(benchmark.taus)) * len(benchmark.routings) * len(names)
    rows = []
    with tqdm(total=calls * (benchmark.warmup + benchmark.repeats), unit="call", disable=not progress) as bar:
        for ffn, dtype, direction in groups:
            bar.set_description(f"{ffn} experts {dtype} {direction}")
            times, shares = _time_group(benchmark, ffn, getattr(torch, dtype), direction, device, bar)
            rows += [_row(case, dtype, direction, times, shares, names) for case in shares]
            _write(rows, benchmark, out, device)  # after each group: an interrupted benchmark keeps what it has
    return rows


Times = dict[tuple[Case, str], list[float]]


def _time_group(
    benchmark: LayerBenchmark, ffn: int, dtype: torch.dtype, direction: str, device: torch.device, bar: tqdm
) -> tuple[Times, dict[Case, float]]:
    """Milliseconds of every case and implementation, interleaved: each repeat visits all in a new order."""
    generator = torch.Generator().manual_seed(benchmark.seed)
    cases = [Case(ffn, tau, routing) for routing in benchmark.routings for tau in (None, *benchmark.taus)]
    layers = {case: _layer(case, benchmark, dtype, device, generator) for case in cases}
    forwards = {(c, n): build(layer) for c, layer in layers.items() for n, build in available().items()}
    x_TD = torch.randn(benchmark.tokens, benchmark.dim, generator=generator).to(device, dtype)
    times: Times = {key: [] for key in forwards}
    shares: dict[Case, list[float]] = {case: [] for case in cases}
    shuffle, order = random.Random(benchmark.seed), list(forwards)
    for repeat in range(benchmark.warmup + benchmark.repeats):
        routings = {}
        for case in cases:  # one routing per repeat, the same for all implementations, never seen before
            make = learned_like_routing if case.routing == "learned" else balanced_routing
            routings[case] = make(layers[case].config, benchmark.tokens, generator, device)
            shares[case].append(float((routings[case].expert_TK < ffn).float().mean()))
        shuffle.shuffle(order)
        for case, name in order:
            milliseconds = _time(forwards[case, name], layers[case], x_TD, routings[case], "backward" in direction)
            if repeat >= benchmark.warmup:
                times[case, name].append(milliseconds)
            bar.update()
    return times, {case: statistics.fmean(reached[benchmark.warmup :]) for case, reached in shares.items()}


def _layer(
    case: Case, benchmark: LayerBenchmark, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> MoELayer:
    config = MoEConfig(
        dim=benchmark.dim, hidden=benchmark.hidden, experts=case.counts, balance=BalanceConfig(tau=case.tau or 1.0)
    )
    layer = MoELayer(config, first=True)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    return layer.to(device, dtype)


def _time(forward: Forward, layer: MoELayer, x_TD: torch.Tensor, routing: Routing, backward: bool) -> float:
    """Milliseconds of one call on a tensor of its own; the gradients of the call before are freed first."""
    layer.zero_grad(set_to_none=True)
    x_TD = x_TD.detach().requires_grad_(backward)
    gate_TK = routing.gate_TK.detach().requires_grad_(backward)
    routing = Routing(routing.expert_TK, gate_TK, routing.probs_TN)
    _synchronize(x_TD.device)
    begin = time.perf_counter()
    with torch.set_grad_enabled(backward):
        y = forward(x_TD, routing)
        if backward:
            y.backward(torch.ones_like(y))
    _synchronize(x_TD.device)
    return (time.perf_counter() - begin) * 1000


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _row(
    case: Case, dtype: str, direction: str, times: Times, shares: dict[Case, float], names: list[str]
) -> dict[str, Any]:
    median = {name: statistics.median(times[case, name]) for name in names}
    vanilla = {name: statistics.median(times[Case(case.ffn, None, case.routing), name]) for name in names}
    peers = [name for name in names if name.startswith("transformers")]
    best_peer = min((median[name] for name in peers), default=None)
    return {
        "experts": f"{case.ffn}+{SETS[case.ffn].zero_computation}" if case.tau is not None else f"{case.ffn}",
        "tau": "vanilla" if case.tau is None else case.tau,
        "dtype": dtype,
        "direction": direction,
        "routing": case.routing,
        "ffn_share": shares[case],
        "target_share": 1.0 if case.tau is None else ffn_share(case.counts, case.tau),
        **{f"{name}_ms": median[name] for name in names},
        **{f"{name}_min_ms": min(times[case, name]) for name in names},
        "over_floor": median["moepp"] / median["floor"],
        "zero_computation_share": median["zero_computation"] / median["moepp"] if case.tau is not None else None,
        "loop_over_moepp": median["loop"] / median["moepp"],
        "best_transformers_over_moepp": best_peer / median["moepp"] if best_peer else None,
        "ideal_speedup": 1 / shares[case],
        "floor_speedup": vanilla["floor"] / median["floor"],
        "speedup": vanilla["moepp"] / median["moepp"],
        "paper_speedup": PAPER[case.ffn].get(case.tau),
    }


def _write(rows: list[dict[str, Any]], benchmark: LayerBenchmark, out: Path, device: torch.device) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    provenance = collect({}) | {"benchmark": asdict(benchmark), "date": datetime.now(UTC).date().isoformat()}
    write_json(out / "provenance.json", provenance)
    hardware = provenance["hardware"]
    machine = hardware["gpus"][0] if device.type == "cuda" else f"{hardware['cpu']}, {torch.get_num_threads()} threads"
    setup = (
        f"{machine}, torch {torch.__version__}, {provenance['date']}: {benchmark.tokens} tokens, width "
        f"{benchmark.dim}, hidden {benchmark.hidden}, top-2. Medians of {benchmark.repeats} interleaved calls, every "
        "call with new routing. Made by `" + provenance["command"] + "`."
    )
    write_text(out / "report.md", "\n".join(["# The expert layer's speed", "", setup, "", *markdown(rows)]) + "\n")


COLUMNS = {
    "experts": "experts", "tau": "tau", "dtype": "dtype", "direction": "direction", "routing": "routing",
    "ffn_share": "FFN share", "moepp_ms": "ours, ms", "floor_ms": "GEMM floor, ms", "over_floor": "ours / floor",
    "zero_computation_share": "zero-computation pass / ours",
    "loop_ms": "loop, ms", "loop_over_moepp": "loop / ours",
    "transformers_eager_ms": "transformers eager, ms", "transformers_grouped_mm_ms": "transformers grouped_mm, ms",
    "best_transformers_over_moepp": "best transformers / ours",
    "speedup": "over vanilla", "floor_speedup": "floor's", "ideal_speedup": "ideal", "paper_speedup": "paper",
}  # fmt: skip


def markdown(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The rows as a Markdown table; columns that no row fills are left out."""
    kept = {key: title for key, title in COLUMNS.items() if any(row.get(key) is not None for row in rows)}
    yield "| " + " | ".join(kept.values()) + " |"
    yield "|" + "---|" * len(kept)
    for row in rows:
        yield "| " + " | ".join(_cell(key, row[key]) for key in kept) + " |"


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "–"
    if not isinstance(value, float) or key == "tau":
        return str(value)
    return f"{value:.1f}" if key.endswith("_ms") else f"{value:.2f}"
