"""Measures expert parallelism: what the expert layer sends between devices, how evenly they work, how long it takes.

The layer is vanilla MoE and MoE++ at several tau; the same devices are divided into expert groups of several sizes, so
that nothing but the exchange differs between them. One process per device, on this machine: NCCL on GPUs, else gloo.
"""

import logging
import os
import random
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from moepp.benchmarks.cases import SETS, learned_like_routing
from moepp.benchmarks.tables import Columns, Row, markdown_table, write_benchmark, write_csv
from moepp.errors import RunError, UsageError
from moepp.layers.moe import MoELayer
from moepp.layers.router import Routing
from moepp.layers.settings import BalanceConfig, ExpertCounts, MoEConfig, ffn_share
from moepp.records import write_json
from moepp.statistics.markup import code
from moepp.strategies.dispatch import AllToAllDispatcher
from moepp.strategies.groups import CopyGroups
from moepp.strategies.sharding import slice_experts
from moepp.strategies.traffic import Traffic
from moepp.training.provenance import collect
from moepp.training.throughput import balanced_routing


@dataclass(frozen=True)
class ParallelBenchmark:
    """What is measured. Defaults are the paper's 0.6B layer; `tokens` are those of one device."""

    devices: int = 4
    tokens: int = 256
    dim: int = 768
    hidden: int = 2048
    ffn: int = 8  # FFN experts; moepp.benchmarks.cases.SETS has the others
    taus: tuple[float, ...] = (0.10, 0.25, 0.50, 0.75, 1.0)
    routings: tuple[str, ...] = ("learned", "balanced")
    dtype: str = "float32"
    repeats: int = 3
    warmup: int = 1
    sizes: tuple[int, ...] = tuple(2**n for n in range(12, 25, 2))  # bytes that each device sends, for the model's fit
    seed: int = 0

    @property
    def groups(self) -> list[int]:
        """Sizes of the expert groups: 1 (no exchange), 2, 4, ... as far as devices and experts can be divided so."""
        sizes = [2**n for n in range(self.devices.bit_length())]
        return [size for size in sizes if self.devices % size == 0 and self.ffn % size == 0]

    SCALES: ClassVar[dict[str, Row]] = {
        "paper": {},
        "laptop": {"taus": (0.75,), "routings": ("learned",), "tokens": 128},  # under a minute on two cores
    }


@dataclass(frozen=True)
class _Case:
    group: int
    tau: float | None  # None is vanilla MoE
    routing: str


def run_parallel(benchmark: ParallelBenchmark, out: Path) -> list[Row]:
    """Measures and writes table.csv, exchanges.csv, report.md and provenance.json into `out`; returns the table's
    rows.
    """
    rows, exchanges = measure_exchange(benchmark)
    found = collect({}) | {"benchmark": asdict(benchmark), "date": datetime.now(UTC).date().isoformat()}
    write_csv(rows, out / "table.csv")
    if exchanges:  # one device has none
        write_csv(exchanges, out / "exchanges.csv")
    write_json(out / "provenance.json", found)
    hardware = found["hardware"]
    machine = hardware["gpus"][0] if hardware["gpus"] else f"{hardware['cpu']}, {hardware['cores']} cores, gloo"
    setup = (
        f"{machine}, torch {torch.__version__}, {found['date']}: {benchmark.devices} processes, {benchmark.tokens} "
        f"tokens each, width {benchmark.dim}, hidden {benchmark.hidden}, {benchmark.ffn} FFN experts, top-2, "
        f"{benchmark.dtype}, forward and backward. Medians of {benchmark.repeats} interleaved passes of the slowest "
        f"process, each with new routing. Made by {code(found['command'])}."
    )
    write_benchmark(out / "report.md", "The expert layer on several devices", setup, list(traffic_table(rows)))
    return rows


def measure_exchange(benchmark: ParallelBenchmark) -> tuple[list[Row], list[Row]]:
    """One row per layer, and one per plain exchange that a communication model can be fitted to.

    Raises UsageError for devices that cannot share the experts, or more than there are GPUs; RunError when a process
    dies.
    """
    gpus = torch.cuda.device_count()
    if benchmark.groups == [1] and benchmark.devices > 1:
        raise UsageError(f"{benchmark.devices} devices cannot share {benchmark.ffn} FFN experts; use 2, 4 or 8")
    if gpus and benchmark.devices > gpus:
        raise UsageError(f"--devices {benchmark.devices}, but {gpus} GPUs are visible on this machine")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // benchmark.devices)))
    launched = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=benchmark.devices, start_method="spawn", max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", run_id="bench",
    )  # fmt: skip
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # they repeat the error that is raised here
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        layers, exchanges = elastic_launch(launched, _measure)(benchmark)[0]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        message = failure.message.strip().splitlines()[-1]
        raise RunError(f"rank {rank} of the benchmark failed: {message}") from error
    finally:
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)  # torch leaves its own behind
    return layers, exchanges


@record  # so that the error of a process reaches `measure_exchange`
def _measure(benchmark: ParallelBenchmark) -> tuple[list[Row], list[Row]]:
    """What one process does; rank 0's rows are the result."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=300)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timeout)
    groups = {size: CopyGroups.create(size, timeout) for size in benchmark.groups}
    layers = _layers(benchmark, groups, device)
    exchanges = [row for size in benchmark.groups if size > 1 for row in _exchanges(benchmark, groups[size], device)]
    dist.destroy_process_group()
    return layers, exchanges


def _layers(benchmark: ParallelBenchmark, groups: dict[int, CopyGroups], device: torch.device) -> list[Row]:
    """Every case once per repeat, in an order that is new each time and the same on all devices."""
    # Routing differs between devices, weights do not: each device has its own tokens.
    tokens = torch.Generator().manual_seed(benchmark.seed * 1000 + dist.get_rank())
    cases = [
        _Case(size, tau, routing)
        for routing in benchmark.routings
        for tau in (None, *benchmark.taus)
        for size in benchmark.groups
    ]
    layers = {(c.group, c.tau): _layer(benchmark, c, groups[c.group], device) for c in cases}
    x_TD = torch.randn(benchmark.tokens, benchmark.dim, generator=tokens).to(device, getattr(torch, benchmark.dtype))
    seen: dict[_Case, list[Row]] = {case: [] for case in cases}
    order, shuffle = list(cases), random.Random(benchmark.seed)
    for repeat in range(benchmark.warmup + benchmark.repeats):
        shuffle.shuffle(order)
        routings = {
            key: _routing(layers[benchmark.groups[0], key[0]].config, key[1], benchmark, repeat, tokens, device)
            for key in dict.fromkeys((case.tau, case.routing) for case in cases)
        }  # one for all group sizes
        for case in order:
            row = _step(layers[case.group, case.tau], x_TD, routings[case.tau, case.routing])
            if repeat >= benchmark.warmup:
                seen[case].append(row)
    return [_row(benchmark, case, seen[case]) for case in cases]


def _layer(benchmark: ParallelBenchmark, case: _Case, groups: CopyGroups, device: torch.device) -> MoELayer:
    counts = SETS[benchmark.ffn] if case.tau is not None else ExpertCounts(benchmark.ffn, 0, 0, 0)
    balance = BalanceConfig(tau=case.tau or 1.0)
    layer = MoELayer(MoEConfig(dim=benchmark.dim, hidden=benchmark.hidden, experts=counts, balance=balance), first=True)
    weights = torch.Generator().manual_seed(benchmark.seed)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=weights)
    if case.group > 1:
        slice_experts(layer, groups)
        layer.ffn.dispatcher = AllToAllDispatcher("auto", groups, Traffic())
    return layer.to(device, getattr(torch, benchmark.dtype))


def _routing(
    config: MoEConfig, kind: str, benchmark: ParallelBenchmark, repeat: int, generator: torch.Generator,
    device: torch.device,
) -> Routing:  # fmt: skip
    if kind == "balanced":
        return balanced_routing(config, benchmark.tokens, generator, device)
    # Which experts are popular is the model's, so the same for all devices; which token goes where is each device's.
    popular = torch.Generator().manual_seed(benchmark.seed + repeat)
    return learned_like_routing(config, benchmark.tokens, popular, device, generator)


@dataclass
class _Wire:
    """What this device sent to others through torch's all-to-all, and how long the exchanges took."""

    bytes: int = 0
    messages: int = 0
    seconds: float = 0.0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Exchanges begin together on all devices of a group, so that their time holds no waiting for a slow one."""
        original = dist.all_to_all_single

        def watched(
            received: Tensor, sent: Tensor, into: list[int], out: list[int], group: dist.ProcessGroup, async_op: bool
        ) -> dist.Work:
            elsewhere = [rows for peer, rows in enumerate(out) if peer != dist.get_rank(group)]
            self.bytes += sent.shape[1] * sent.element_size() * sum(elsewhere)
            self.messages += sum(rows > 0 for rows in elsewhere)
            dist.barrier(group)
            _synchronize(sent.device)
            begin = time.perf_counter()
            work = original(received, sent, into, out, group=group, async_op=async_op)
            work.wait()
            _synchronize(sent.device)
            self.seconds += time.perf_counter() - begin
            return work

        dist.all_to_all_single = watched
        try:
            yield
        finally:
            dist.all_to_all_single = original


def _step(layer: MoELayer, x_TD: Tensor, routing: Routing) -> Row:
    """One forward and backward pass as it is, then one whose exchanges are timed by themselves."""
    step = _pass(layer, x_TD, routing)
    wire = _Wire()
    with wire.watch():
        _pass(layer, x_TD, routing)
    experts = layer.config.experts.ffn
    rows_E = torch.bincount(routing.expert_TK.flatten().cpu(), minlength=experts)[:experts]
    mine = [step, wire.seconds, wire.bytes, wire.messages, int(rows_E.sum()), *rows_E.tolist()]
    table: list[list[float]] = [[]] * dist.get_world_size()
    dist.all_gather_object(table, mine)
    return {
        "step": max(row[0] for row in table),
        "exchange": max(row[1] for row in table),
        "bytes": [row[2] for row in table],
        "messages": max(row[3] for row in table),
        "ffn_rows": sum(row[4] for row in table),
        "rows_WE": [row[5:] for row in table],
    }


def _pass(layer: MoELayer, x_TD: Tensor, routing: Routing) -> float:
    layer.zero_grad(set_to_none=True)
    x_TD = x_TD.detach().requires_grad_()
    gate_TK = routing.gate_TK.detach().to(x_TD.dtype).requires_grad_()
    dist.barrier()
    _synchronize(x_TD.device)
    begin = time.perf_counter()
    y_TD = layer.expert_forward(x_TD, Routing(routing.expert_TK, gate_TK, routing.probs_TN))
    y_TD.backward(torch.ones_like(y_TD))
    _synchronize(x_TD.device)
    return time.perf_counter() - begin


def _row(benchmark: ParallelBenchmark, case: _Case, seen: list[Row]) -> Row:
    counts = SETS[benchmark.ffn]
    routed = benchmark.devices * benchmark.tokens * MoEConfig.top_k
    return {
        "group": case.group,
        "tau": "vanilla" if case.tau is None else case.tau,
        "routing": case.routing,
        "target_share": 1.0 if case.tau is None else ffn_share(counts, case.tau),
        "ffn_share": statistics.fmean(row["ffn_rows"] for row in seen) / routed,
        "bytes_sent": statistics.fmean(sum(row["bytes"]) for row in seen) / benchmark.devices,
        "messages": statistics.median(row["messages"] for row in seen),
        "device_load_max_over_mean": statistics.fmean(_imbalance(row["rows_WE"], case.group) for row in seen),
        "busiest_bytes": statistics.median(_busiest(row["rows_WE"], case.group) for row in seen)
        * benchmark.dim * getattr(torch, benchmark.dtype).itemsize,
        "exchange_ms": statistics.median(row["exchange"] for row in seen) * 1000,
        "step_ms": statistics.median(row["step"] for row in seen) * 1000,
        "step_min_ms": min(row["step"] for row in seen) * 1000,
    }  # fmt: skip


def _by_device(rows_WE: list[list[int]], group: int) -> Tensor:
    """Rows from each device to each device of its group, [C, G, G] for C copies of the experts."""
    return torch.tensor(rows_WE).unflatten(1, (group, -1)).sum(2).unflatten(0, (-1, group))


def _imbalance(rows_WE: list[list[int]], group: int) -> float:
    load_W = _by_device(rows_WE, group).sum(1).flatten().double()
    return float(load_W.max() / load_W.mean())


def _busiest(rows_WE: list[list[int]], group: int) -> int:
    """Most rows that a device sends to or gets from others in one exchange."""
    rows_CGG = _by_device(rows_WE, group)
    rows_CGG = rows_CGG * (1 - torch.eye(group, dtype=torch.int64))
    return int(max(rows_CGG.sum(1).max(), rows_CGG.sum(2).max()))


def _exchanges(benchmark: ParallelBenchmark, groups: CopyGroups, device: torch.device) -> list[Row]:
    """All-to-alls of equal parts, without a layer: medians over the repeats of the slowest device's time."""
    found = []
    for size in benchmark.sizes:
        part = max(1, size // (groups.size - 1))
        sent = torch.zeros(part * groups.size, dtype=torch.uint8, device=device)
        received = torch.empty_like(sent)
        times = []
        for repeat in range(benchmark.warmup + benchmark.repeats):
            dist.barrier()
            _synchronize(device)
            begin = time.perf_counter()
            dist.all_to_all_single(received, sent, group=groups.within)
            _synchronize(device)
            slowest = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            if repeat >= benchmark.warmup:
                times.append(float(slowest))
        sent_bytes = part * (groups.size - 1)
        found.append(
            {
                "group": groups.size,
                "messages": groups.size - 1,
                "bytes": sent_bytes,
                "ms": statistics.median(times) * 1e3,
            }
        )
    return found


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


COLUMNS: Columns = {
    "group": ("expert group", ""), "tau": ("tau", ""), "routing": ("routing", ""), "ffn_share": ("FFN share", ".2f"),
    "bytes_sent": ("sent, MB per device", ".2f"), "messages": ("messages", ".0f"),
    "device_load_max_over_mean": ("load, max / mean", ".2f"), "exchange_ms": ("exchanges, ms", ".1f"),
    "step_ms": ("forward and backward, ms", ".1f"), "over_vanilla": ("over vanilla", ".2f"),
}  # fmt: skip


def traffic_table(rows: list[Row]) -> Iterator[str]:
    """The rows as a Markdown table."""
    vanilla = {(row["group"], row["routing"]): row["step_ms"] for row in rows if row["tau"] == "vanilla"}
    shown = [
        row
        | {
            "bytes_sent": row["bytes_sent"] / 1e6,
            "over_vanilla": vanilla[row["group"], row["routing"]] / row["step_ms"],
        }
        for row in rows
    ]
    return markdown_table(shown, COLUMNS)
