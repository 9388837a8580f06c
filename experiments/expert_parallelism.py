"""What does MoE++ save when experts lie on several devices?

The paper argues that zero-computation experts, being so small, can lie on every device, so that their tokens need no
exchange, and reports no communication. Expected: bytes on the wire fall to the FFN share of vanilla MoE's; a step gains
more than its FFN computation alone where exchanges are a large part of it.
"""

from typing import TYPE_CHECKING, Any

from moepp.reports.experiment import Context, Experiment, Findings
from moepp.statistics.claims import Claim
from moepp.statistics.style import Figure
from moepp.statistics.tables import Table

if TYPE_CHECKING:
    from moepp.benchmarks.parallel import ParallelBenchmark
    from moepp.reports.communication import AlphaBeta, Cluster, Step, Work

SIZES = ("0.6b", "1b", "2b", "7b")
DEVICES = (8, 16, 32, 64, 128, 256)
TAUS = (0.10, 0.25, 0.50, 0.75, 1.0)
PLOTTED = (0.25, 0.75)
FITTED, UNSEEN = "plain exchanges, which it was fitted to", "expert layers, which it was not"
MICRO_BATCH = 8192  # tokens of one device in a forward pass: four of the paper's sequences
# Assumed, not measured: eight devices per node, each with 400 dense bfloat16 TFLOP/s (40 % of an H100's peak), 360 GB/s
# each way to devices of its node and 45 GB/s (400 Gbit/s less protocol) to others, 5 and 15 us per message.
NODE = {"devices_per_node": 8, "flops": 400e12, "inside": (5e-6, 1 / 360e9), "between": (15e-6, 1 / 45e9)}


def measure(context: Context) -> Findings:
    from dataclasses import asdict

    from moepp.benchmarks.parallel import measure_exchange
    from moepp.reports.communication import EXCHANGES, MeasuredExchange, error, fit

    benchmark = _benchmark(context)
    layers, exchanges = measure_exchange(benchmark)
    on_plain = [MeasuredExchange(row["messages"], row["bytes"], row["ms"] / 1000) for row in exchanges]
    model = fit(on_plain)
    exchanged = [row for row in layers if row["group"] > 1]
    on_layers = [
        MeasuredExchange(EXCHANGES * (row["group"] - 1), EXCHANGES * row["busiest_bytes"], row["exchange_ms"] / 1000)
        for row in exchanged
    ]
    for row, each in zip(exchanged, on_layers, strict=True):
        row["predicted_ms"] = model.seconds(each.messages, each.size) * 1000
    errors = {FITTED: error(model, on_plain), UNSEEN: error(model, on_layers)}
    steps = _predictions()
    return Findings(
        tables=(_measured(layers), _fit(model, errors), _paper_sizes(steps)),
        figures=(_plot(steps),),
        claims=_claims(layers, benchmark, errors[UNSEEN].median, steps),
        notes=(
            "Processes on CPUs share cores and memory: their step times compare arms with each other, and say nothing"
            " about GPUs. All expert groups use the same processes, so group 1 is the same load without exchanges.",
            "The table of the paper's sizes is a model: nothing of it was measured. It assumes perfectly balanced"
            f" loads, micro-batches of {MICRO_BATCH} tokens per device, rows in bfloat16, gradients in float32,"
            " all-reduced during the last backward pass, and the cluster stated in provenance.json. `no overlap` lets"
            " exchange and compute take turns, `full overlap` hides the shorter behind the longer.",
        ),
        setup={"benchmark": asdict(benchmark), "cluster": asdict(_cluster()), "micro_batch_tokens": MICRO_BATCH},
    )


def _benchmark(context: Context) -> "ParallelBenchmark":
    from moepp.benchmarks.parallel import ParallelBenchmark

    given = {"devices": int(context.options["devices"])} if "devices" in context.options else {}
    if context.scale == "smoke":
        smoke = {"devices": 2, "dim": 64, "hidden": 128, "sizes": (4096, 65536)}
        return ParallelBenchmark(**(ParallelBenchmark.SCALES["laptop"] | smoke | given))
    return ParallelBenchmark(**(given | ({"tokens": 8192, "dtype": "bfloat16"} if context.scale == "gpu" else {})))


def _cluster() -> "Cluster":
    from moepp.reports.communication import AlphaBeta, Cluster

    inside, between = AlphaBeta(*NODE["inside"]), AlphaBeta(*NODE["between"])
    return Cluster("eight-device nodes", NODE["devices_per_node"], inside, between, NODE["flops"])


def _work(size: str, tau: float | None) -> "Work":
    """A training step of the paper's model of this size, at its batch of 4M tokens; tau None is vanilla MoE."""
    from moepp.config import compose
    from moepp.models.budget import expected_ffn_per_token, forward_flops, parameters
    from moepp.reports.communication import Work
    from moepp.training.settings import RunConfig

    arm = ["model=vanilla"] if tau is None else [f"model.balance.tau={tau}"]
    config = compose(RunConfig, [f"size={size}", *arm])
    model, per_token = config.model, expected_ffn_per_token(config.model)
    parts = parameters(model)
    return Work(
        batch_tokens=config.data.batch_size * config.data.seq_len,
        micro_batch_tokens=MICRO_BATCH,
        layers=sum(model.is_moe(block) for block in range(model.layers)),
        width=model.dim,
        experts=model.experts.ffn,
        top_k=model.top_k,
        ffn_share=per_token / model.top_k,
        flops_per_token=sum(forward_flops(model, config.data.seq_len, per_token).values()),
        dense_parameters=sum(parts.values()) - parts["ffn_experts"],
        expert_parameters=parts["ffn_experts"],
    )


Steps = dict[tuple[str, float | None, int, bool], "Step"]


def _predictions() -> Steps:
    from moepp.reports.communication import predict

    cluster, steps = _cluster(), {}
    for size in SIZES:
        for tau in (None, *TAUS):
            work = _work(size, tau)
            for devices in DEVICES:
                for overlap in (False, True):
                    steps[size, tau, devices, overlap] = predict(work, cluster, devices, overlap)
    return steps


MEASURED = {
    "group": "expert group", "tau": "tau", "routing": "routing", "ffn_share": "FFN share",
    "bytes_sent": "bytes sent per device", "messages": "messages", "device_load_max_over_mean": "load, max / mean",
    "exchange_ms": "exchanges, ms", "predicted_ms": "the model's, ms", "step_ms": "step, ms",
    "bytes_over_vanilla": "bytes over vanilla", "over_vanilla": "vanilla's step over this",
}  # fmt: skip


def _measured(layers: list[dict[str, Any]]) -> Table:
    vanilla = {(row["group"], row["routing"]): row for row in layers if row["tau"] == "vanilla"}
    rows = []
    for row in layers:
        base = vanilla[row["group"], row["routing"]]
        ratios = {"over_vanilla": base["step_ms"] / row["step_ms"]}
        if base["bytes_sent"]:
            ratios["bytes_over_vanilla"] = row["bytes_sent"] / base["bytes_sent"]
        rows.append(tuple((row | ratios).get(name) for name in MEASURED))
    caption = "One expert layer, forward and backward, on this machine."
    return Table("measured", caption, tuple(MEASURED.values()), tuple(rows))


def _fit(model: "AlphaBeta", errors: dict[str, Any]) -> Table:
    columns = ("checked on", "n", "median error", "largest error", "bias", "alpha, us per message", "bandwidth, GB/s")
    fitted = (model.alpha * 1e6, model.bandwidth / 1e9)
    rows = tuple((name, e.count, e.median, e.largest, e.bias, *fitted) for name, e in errors.items())
    caption = "The alpha-beta model of an exchange; errors are of predicted over measured time, less one."
    return Table("model", caption, columns, rows)


def _over_vanilla(steps: Steps, size: str, tau: float | None, devices: int) -> tuple[float, float]:
    """Vanilla MoE's step over this one's, without overlap and with all of it."""
    without, full = (
        steps[size, None, devices, overlap].seconds / steps[size, tau, devices, overlap].seconds
        for overlap in (False, True)
    )
    return without, full


def _paper_sizes(steps: Steps) -> Table:
    columns = ("size", "tau", "devices", "expert group", "GB sent per device and step", "exchange share of the step")
    columns += ("step, s, no overlap", "over vanilla, no overlap", "over vanilla, full overlap")
    rows = []
    for (size, tau, devices, overlap), step in steps.items():
        if not overlap:
            shown = (step.exchanged_bytes / 1e9, step.exchange / step.seconds, step.seconds)
            name = "vanilla" if tau is None else tau
            rows.append((size, name, devices, step.expert_group, *shown, *_over_vanilla(steps, size, tau, devices)))
    caption = "Predicted optimizer steps of 4M tokens at the paper's sizes; a model, not a measurement."
    return Table("paper_sizes", caption, columns, tuple(rows))


def _plot(steps: Steps) -> Figure:
    shown = [(size, tau, devices) for size in SIZES for tau in PLOTTED for devices in DEVICES]
    return step_figure(tuple((*key, *_over_vanilla(steps, *key)) for key in shown))


def step_figure(rows: tuple[tuple[Any, ...], ...]) -> Figure:
    """A panel for each tau, two lines for each size."""
    columns = ("size", "tau", "devices", "over vanilla, no overlap", "over vanilla, full overlap")
    caption = (
        "Predicted speed of a training step over vanilla MoE (a model, no measurement: no n, no interval): solid"
        " without overlap, dotted with full overlap."
    )
    return Figure(Table("step_over_vanilla", caption, columns, rows), lambda: _draw(rows))


def _draw(rows: tuple[tuple[Any, ...], ...]):
    from moepp.statistics.style import axes_of, looks

    figure, columns = axes_of(width=6.4, height=3.0, columns=2)
    for axes, tau in zip(columns, PLOTTED, strict=True):
        for size, look in looks(SIZES).items():
            _, _, devices, without, full = zip(*(row for row in rows if row[:2] == (size, tau)), strict=True)
            axes.plot(devices, without, ms=4, label=size, **look)
            axes.plot(devices, full, ms=4, mfc="none", **look | {"ls": ":"})
        axes.set_xscale("log", base=2)
        axes.set_xticks(DEVICES, [str(count) for count in DEVICES])
        axes.set_title(f"tau {tau}")
        axes.set_xlabel("devices")
    columns[0].set_ylabel("vanilla's step time over MoE++'s")
    figure.legend(*columns[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(SIZES))
    return figure


def _claims(
    layers: list[dict[str, Any]], benchmark: "ParallelBenchmark", median_error: float, steps: Steps
) -> tuple[Claim, ...]:
    """What was measured, against what was expected."""
    vanilla = {(row["group"], row["routing"]): row["bytes_sent"] for row in layers if row["tau"] == "vanilla"}
    pairs = [row for row in layers if row["group"] > 1 and row["tau"] != "vanilla" and row["routing"] == "balanced"]
    pairs = pairs or [row for row in layers if row["group"] > 1 and row["tau"] != "vanilla"]
    off = max(abs(row["bytes_sent"] / vanilla[row["group"], row["routing"]] / row["ffn_share"] - 1) for row in pairs)
    few, many = (
        [_over_vanilla(steps, size, tau, devices)[0] for size in SIZES for tau in TAUS]
        for devices in (DEVICES[0], DEVICES[-1])
    )
    grows = all(more > less for less, more in zip(few, many, strict=True))
    return (
        Claim(
            "MoE++ sends vanilla MoE's bytes times its FFN share",
            "holds" if off < 0.05 else "fails",
            note=f"largest deviation {off:.1%}; the rest is which rows happen to stay on their device",
        ),
        Claim(
            "the alpha-beta model predicts the layers' exchanges within 25 % (median)",
            "holds" if median_error < 0.25 else "fails",
            note=f"median error {median_error:.0%}, {benchmark.devices} processes",
        ),
        Claim(
            f"in the model, a step gains more on {DEVICES[-1]} devices than on {DEVICES[0]}, at every size and tau",
            "holds" if grows else "fails",
            note="without overlap; what gradients add at many devices is the same for MoE++ and vanilla MoE",
        ),
    )


EXPERIMENT = Experiment(
    name="expert_parallelism",
    title="Expert parallelism: what crosses between devices",
    question="What does MoE++ save when experts lie on several devices?",
    expected="bytes fall to the FFN share of vanilla MoE's; steps gain most where exchanges are most of them.",
    measure=measure,
    options={"devices": "processes to measure with, on GPUs where there are any (4)"},
    notes=(
        "The paper trained with Megatron on 32 A100 in four nodes; it gives no expert-parallel size and no"
        " communication: there are no numbers beside ours.",
    ),
    scales=("smoke", "laptop", "gpu"),
)
