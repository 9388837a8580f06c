"""Speed: steps, peak memory, peak FLOPs, and the paper's "expert forward time".

Expert forward time (footnote of Table 3) is FFN plus zero-computation experts; here with dispatch and combine, without
router and attention, summed over the layers of one forward pass. It is measured on the routing that was learned and on
forced balanced routing. Training time is that of the whole model, forward and backward.
"""

import math
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from moepp.data.token_files import TokenFiles
from moepp.layers.dense import DenseFFN
from moepp.layers.moe import MoELayer
from moepp.layers.router import Routing
from moepp.layers.settings import TOP_K_SELECTIONS, MoEConfig
from moepp.models.budget import expected_ffn_per_token
from moepp.models.decoder import Decoder
from moepp.training.interleaved import Key, interleaved_times
from moepp.training.loss import training_losses
from moepp.training.settings import RunConfig

TIMED_TOKENS = 4096  # in one expert-forward measurement

# Dense bf16 matrix-product peaks in FLOP/s, without sparsity (vendors' data sheets), by a piece of the device's name:
# the first that fits.
PEAK_FLOPS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12,
    "L40S": 362e12, "4090": 165e12,
}  # fmt: skip


class StepTimer:
    """Wall time of training alone: the time between `pause` and `resume` (validation) does not count."""

    def __init__(self, device: torch.device):
        self.device = device
        self.resume()

    def resume(self) -> None:
        self.elapsed, self.mark = getattr(self, "elapsed", 0.0), self._now()

    def pause(self) -> None:
        self.elapsed += self._now() - self.mark

    def lap(self) -> float:
        """Seconds since the last lap."""
        self.pause()
        seconds, self.elapsed = self.elapsed, 0.0
        self.resume()
        return seconds

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def peak_flops(device: torch.device) -> float | None:
    """The device's bf16 peak in FLOP/s; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: allocated on a GPU, resident set of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kilobytes on Linux


def balanced_routing(config: MoEConfig, tokens: int, generator: torch.Generator, device: torch.device) -> Routing:
    """Exactly balanced assignments in random token order: FFN experts share the slots of a balanced layer evenly, and
    zero-computation experts those that remain. Where a method has none of these, the rest of its slots stay unused.
    """
    experts, ffn_per_token = config.experts, expected_ffn_per_token(config)
    slots = config.top_k if config.selection in TOP_K_SELECTIONS else math.ceil(ffn_per_token)
    others = max(1, experts.zero_computation)  # without any, id N of unused slots
    weights = torch.tensor(
        [ffn_per_token / experts.ffn] * experts.ffn + [(slots - ffn_per_token) / others] * others, dtype=torch.float64
    )
    quota_N = torch.zeros(len(weights), dtype=torch.int64)
    remaining = tokens * slots
    while remaining:  # a token picks an expert once, so no expert takes more than `tokens`
        open_N = quota_N < tokens
        share_N = weights * open_N / (weights * open_N).sum() * remaining
        added_N = torch.minimum((share_N + 1e-6).floor().long(), tokens - quota_N)
        if not added_N.any():
            added_N[torch.where(open_N, share_N, -1.0).topk(min(remaining, int(open_N.sum()))).indices] = 1
        quota_N += added_N
        remaining -= int(added_N.sum())
    expert_KT = torch.arange(len(weights)).repeat_interleave(quota_N).view(slots, tokens)
    expert_TK = expert_KT[:, torch.randperm(tokens, generator=generator)].t().contiguous().to(device)
    gate_TK = torch.full(expert_TK.shape, 1 / slots, device=device)
    return Routing(expert_TK, gate_TK, torch.empty(tokens, 0, device=device))


def expert_forward_times(
    models: dict[str, Decoder],
    ids_BS: Tensor,
    precision: Callable[[], AbstractContextManager],
    repeats: int = 15,
    warmup: int = 3,
    seed: int = 0,
) -> list[dict[str, float | str]]:
    """Expert forward times of several models, interleaved in shuffled order in this process.

    One row per model and routing (`learned`, `balanced`): median_ms and min_ms of one pass over all layers at B*S
    tokens, the ffn_share of all slots reached, and ffn_width, the hidden FFN units that a token passes in them. A
    model without MoE layers is timed on its dense FFNs. `precision()` is the autocast context of the runs.
    """
    cases = {}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), precision():
        for name, model in models.items():
            learned = _layer_inputs(model.eval(), ids_BS)
            balanced = [
                (layer, x, routing and balanced_routing(layer.config, len(x), generator, x.device))
                for layer, x, routing in learned
            ]
            cases[name, "learned"], cases[name, "balanced"] = learned, balanced
        runs = {key: partial(_run, layers) for key, layers in cases.items()}
        times = _median_and_min(runs, ids_BS.device, repeats, warmup, seed)
    return [
        {
            "arm": name,
            "routing": routing,
            **times[name, routing],
            "ffn_share": _mean(cases[name, routing], _ffn_share),
            "ffn_width": sum(_ffn_width(*layer) for layer in cases[name, routing]),
        }
        for name, routing in cases
    ]


def training_times(
    models: dict[str, Decoder],
    batches: dict[str, Tensor],
    precision: Callable[[], AbstractContextManager],
    repeats: int = 15,
    warmup: int = 3,
    seed: int = 0,
) -> list[dict[str, float | str]]:
    """Training times of several models, interleaved in shuffled order in this process, on a batch [B, S+1] for each.

    One row per model: median_ms and min_ms of the forward and backward pass of one batch, and its `tokens`. Without the
    optimizer, whose work does not depend on where tokens go; the weights stay as they are.
    """

    def step(model: Decoder, tokens: Tensor) -> None:
        with precision():
            cross_entropy, balance, _ = training_losses(model, tokens)
        (cross_entropy + balance).backward()
        model.zero_grad()

    runs = {name: partial(step, model.train(), batches[name]) for name, model in models.items()}
    device = next(iter(batches.values())).device
    times = _median_and_min(runs, device, repeats, warmup, seed)
    return [{"arm": name, "tokens": batches[name][:, 1:].numel(), **times[name]} for name in models]


def _median_and_min(
    runs: Mapping[Key, Callable[[], None]], device: torch.device, repeats: int, warmup: int, seed: int
) -> dict[Key, dict[str, float]]:
    """median_ms and min_ms of each of `runs`, interleaved."""
    times = interleaved_times(runs, lambda key, _: runs[key], device, repeats, warmup, seed)
    return {key: {"median_ms": statistics.median(found), "min_ms": min(found)} for key, found in times.items()}


LayerCase = tuple[MoELayer | DenseFFN, Tensor, Routing | None]  # no routing: a dense FFN


def _layer_inputs(model: Decoder, ids_BS: Tensor) -> list[LayerCase]:
    """Every MoE layer with the tokens it sees and the routing it chooses for them; the dense FFNs where there is no MoE
    layer.
    """
    if not isinstance(model, Decoder):
        return model.expert_cases(ids_BS)
    seen: list[LayerCase] = []

    def remember(layer: MoELayer | DenseFFN, inputs: tuple[Tensor, ...]) -> None:
        x_TD = inputs[0].flatten(0, -2)
        routing = layer.route(layer.routed(x_TD, inputs[1])[0]) if isinstance(layer, MoELayer) else None
        seen.append((layer, x_TD, routing))

    layers = model.moe_layers() or [block.ffn for block in model.blocks]
    handles = [layer.register_forward_pre_hook(remember) for layer in layers]
    model(ids_BS)
    for handle in handles:
        handle.remove()
    return seen


def _run(cases: list[LayerCase]) -> None:
    for layer, x_TD, routing in cases:
        if routing is None:
            layer(x_TD)
        else:
            layer.expert_forward(x_TD, routing)


def _mean(cases: list[LayerCase], of: Callable[[MoELayer | DenseFFN, Tensor, Routing | None], float]) -> float:
    return statistics.fmean(of(*case) for case in cases)


def _ffn_share(layer: MoELayer | DenseFFN, x_TD: Tensor, routing: Routing | None) -> float:
    if routing is None:
        return 1.0
    used = int((routing.expert_TK < layer.config.experts.total).sum())
    return int((routing.expert_TK < layer.config.experts.ffn).sum()) / max(1, used)


def _ffn_width(layer: MoELayer | DenseFFN, x_TD: Tensor, routing: Routing | None) -> float:
    if routing is None:
        return layer.w_out.in_features
    rows = int((routing.expert_TK < layer.config.experts.ffn).sum())
    return (rows / len(x_TD) + layer.config.experts.shared) * layer.config.hidden


def autocast_of(precision: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """The precision context in which a run's forward passes are computed."""
    if precision == "bf16-mixed":
        return lambda: torch.autocast(device.type, torch.bfloat16)
    return nullcontext


def validation_ids(tokens: TokenFiles, seq_len: int) -> Tensor:
    """The first held-out sequences, about TIMED_TOKENS in all, [B, S] int64: what expert forward times are taken on."""
    sequences = max(1, min(TIMED_TOKENS, len(tokens.val)) // seq_len)
    return torch.from_numpy(tokens.val[: sequences * seq_len].astype("int64")).view(sequences, seq_len)


def training_batch(tokens: TokenFiles, config: RunConfig) -> Tensor:
    """A micro-batch of one device, [B, S+1] int64: the first training tokens."""
    data, trainer = config.data, config.trainer
    sequences = data.batch_size // (trainer.accumulate * trainer.devices * trainer.num_nodes)
    length = data.seq_len + 1
    return torch.from_numpy(tokens.train[: sequences * length].astype("int64")).view(sequences, length)
