"""`python run.py dial RUN`: a finished run's validation loss against the FFN experts a token uses, by a bias on the
logits of zero-computation experts. One model, one curve.

Shape suffixes: W windows of a batch, S positions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moepp.data.batches import ValWindows
from moepp.data.prepare import prepare
from moepp.data.settings import DataConfig
from moepp.data.windows import evenly_spread
from moepp.errors import UsageError
from moepp.layers.moe import MoELayer
from moepp.models.protocol import CausalLM
from moepp.statistics.style import BLUE, Figure, axes_of, save_figure
from moepp.statistics.tables import Table, as_csv, as_lines
from moepp.training.loading import load_run
from moepp.training.routing_stats import RoutingStatistics

BIASES = (-4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0)
BATCH_TOKENS = 4096


def dial(source: Path, biases: Sequence[float], out: Path | None = None) -> str:
    """The table, which is written with its figure to `out`, else to the run's folder `tables`. Raises UsageError for a
    run whose model has no zero-computation experts.
    """
    run, rows = load_run(source), []
    batches = held_out_batches(run.config.data)
    for bias in sorted(set(biases)):
        with biased(run.model, bias):
            rows.append((bias, *loss_and_compute(run.model, batches)))
    figure = curve(rows, "dial", "bias", "the bias on the logits of zero-computation experts")
    return write_figure(figure, out or run.path / "tables")


def held_out_batches(data: DataConfig) -> list[Tensor]:
    """The held-out windows [W, S + 1] of a validation."""
    windows = ValWindows(prepare(data, progress=False), data.seq_len)
    chosen = evenly_spread(len(windows), data.val_sequences)
    size = max(1, BATCH_TOKENS // data.seq_len)
    return [windows[chosen[start : start + size]][0] for start in range(0, len(chosen), size)]


@torch.no_grad()
def loss_and_compute(model: CausalLM, batches: Sequence[Tensor]) -> tuple[float, float]:
    """FFN experts per token and nats per token, of windows [W, S + 1]."""
    routing, nats, targets = RoutingStatistics(model.config), 0.0, 0
    model.eval()
    for ids in batches:
        output = model(ids[:, :-1], targets_BS=ids[:, 1:])
        routing.update(output.stats)
        nats += float(output.nats_BS.double().sum())
        targets += output.nats_BS.numel()
    return float(routing.compute()["ffn_per_token"]), nats / targets


@contextmanager
def biased(model: Any, bias: float) -> Iterator[None]:
    """The model with its zero-computation experts' logits raised by `bias`."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, MoELayer)}
    configs = [config for config in configs.values() if config.experts.zero_computation]
    if not configs:
        raise UsageError("a dial of compute needs zero-computation experts; choose a run whose model has them")
    before = [config.zero_computation_bias for config in configs]
    try:
        for config, given in zip(configs, before, strict=True):
            config.zero_computation_bias = given + bias
        yield
    finally:
        for config, given in zip(configs, before, strict=True):
            config.zero_computation_bias = given


def curve(rows: Sequence[tuple[float, float, float]], name: str, moved: str, meaning: str) -> Figure:
    """Of (what is moved, FFN experts per token, nats per token)."""

    def draw() -> Any:
        figure, axes = axes_of(width=4.8, height=3.2)
        axes.plot([used for _, used, _ in rows], [nats for *_, nats in rows], "o-", color=BLUE)
        for value, used, nats in rows:
            axes.annotate(f"{value:+g}", (used, nats), xytext=(3, 4), textcoords="offset points", fontsize=7)
        axes.set_xlabel("FFN experts per token")
        axes.set_ylabel("validation loss, nats per token")
        return figure

    caption = f"Validation loss against compute, by {meaning}."
    return Figure(Table(name, caption, (moved, "ffn_per_token", "val_loss"), tuple(rows)), draw)


def write_figure(figure: Figure, folder: Path) -> str:
    """The table in lines; it and the figure are written to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{figure.data.name}.csv").write_text(as_csv(figure.data), "utf-8")
    save_figure(figure, folder)
    return "\n".join(as_lines(figure.data))
