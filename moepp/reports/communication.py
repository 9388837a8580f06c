"""What expert parallelism costs: an alpha-beta model of the exchange of rows, and of a training step on many devices.

An exchange (all-to-all) among G devices takes `alpha` for each of the G - 1 messages that a device sends, and `beta`
for each byte that the busiest device sends or receives. A training step makes four in every MoE layer: rows to their
experts and back, and the same for their gradients.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

EXCHANGES = 4  # in one MoE layer, forward and backward


@dataclass(frozen=True)
class AlphaBeta:
    """`alpha` in seconds per message, `beta` in seconds per byte."""

    alpha: float
    beta: float

    def seconds(self, messages: float, size: float) -> float:
        """Of one exchange in which the busiest device sends or receives `size` bytes in `messages` messages."""
        return self.alpha * messages + self.beta * size

    @property
    def bandwidth(self) -> float:
        """Bytes per second of long messages; infinite where size made no difference."""
        return 1 / self.beta if self.beta else float("inf")


@dataclass(frozen=True)
class MeasuredExchange:
    """A measured exchange: messages and bytes of the busiest device, and how long it took."""

    messages: float
    size: float
    seconds: float


def fit(measured: Sequence[MeasuredExchange]) -> AlphaBeta:
    """The alpha and beta, neither negative, with the least squared relative errors: short exchanges count like long.

    Raises ValueError for fewer than two exchanges, which do not tell alpha from beta.
    """
    if len(measured) < 2:
        raise ValueError(f"{len(measured)} measured exchanges do not determine alpha and beta; measure two or more")
    import numpy as np
    from scipy.optimize import nnls

    seconds = np.array([each.seconds for each in measured])
    terms = np.array([[each.messages, each.size] for each in measured])
    scale = terms.max(0)  # messages and bytes differ by many orders of magnitude
    solution, _ = nnls(terms / scale / seconds[:, None], np.ones(len(measured)))
    alpha, beta = (solution / scale).tolist()
    return AlphaBeta(alpha, beta)


@dataclass(frozen=True)
class Error:
    """Of predicted against measured seconds: |predicted / measured - 1| by its median and its largest, and the median
    of predicted / measured - 1, which tells a model that errs to one side.
    """

    median: float
    largest: float
    bias: float
    count: int


def error(model: AlphaBeta, measured: Sequence[MeasuredExchange]) -> Error:
    off = [model.seconds(each.messages, each.size) / each.seconds - 1 for each in measured]
    return Error(
        statistics.median(abs(o) for o in off), max(abs(o) for o in off), statistics.median(off), len(measured)
    )


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal devices. Rates are assumptions, not measurements: bytes and FLOP per second of one device, each
    way. Messages inside a node and between nodes use different links at the same time.
    """

    name: str
    devices_per_node: int
    inside: AlphaBeta
    between: AlphaBeta
    flops: float  # that a device reaches, not its peak


@dataclass(frozen=True)
class Work:
    """One training step of one model: all of a device's share, forward and backward.

    `ffn_share` is the share of a token's `top_k` slots that FFN experts get in a balanced layer; `flops_per_token` are
    those of the forward pass, all parts, at that share.
    """

    batch_tokens: int  # of all devices, in one optimizer step
    micro_batch_tokens: int  # of one device, in one forward pass
    layers: int  # MoE layers
    width: int
    experts: int
    top_k: int
    ffn_share: float
    flops_per_token: float
    dense_parameters: int
    expert_parameters: int
    row_bytes: int = 2  # of one element of an exchanged row, bfloat16
    gradient_bytes: int = 4


@dataclass(frozen=True)
class Step:
    """Predicted seconds of one optimizer step, and bytes that the average device sends in it."""

    devices: int
    expert_group: int
    exchanged_bytes: float
    compute: float
    exchange: float
    gradients: float  # the part of the gradients' all-reduce that the backward pass does not hide
    overlap: bool

    @property
    def seconds(self) -> float:
        """`overlap` False: exchange and compute take turns. True: the longer hides the other, which is the best that
        any schedule can reach.
        """
        busy = max(self.compute, self.exchange) if self.overlap else self.compute + self.exchange
        return busy + self.gradients


def predict(work: Work, cluster: Cluster, devices: int, overlap: bool = False) -> Step:
    """A step on `devices` devices, with perfectly balanced loads.

    The experts are divided among as many devices as there are experts or devices, whichever is less, and copied for the
    others. The gradients' all-reduce (a ring over all devices; sliced experts over their copies) runs during the
    last micro-batch's backward pass. Raises ValueError where batch or experts cannot be divided so.
    """
    group = min(devices, work.experts)
    if work.experts % group or devices % group:
        raise ValueError(f"{work.experts} experts cannot be divided among {devices} devices in equal groups")
    micro_batches, rest = divmod(work.batch_tokens, work.micro_batch_tokens * devices)
    if rest or not micro_batches:
        raise ValueError(f"{work.batch_tokens} tokens are no multiple of {devices} devices' micro-batches")
    rows = work.micro_batch_tokens * work.top_k * work.ffn_share
    to_each = rows / group * work.width * work.row_bytes  # bytes for each device of the group
    near = min(group, cluster.devices_per_node)
    exchange = max(
        cluster.inside.seconds(near - 1, (near - 1) * to_each),
        cluster.between.seconds(group - near, (group - near) * to_each),
    )
    exchanges = micro_batches * work.layers * EXCHANGES
    compute = 3 * work.flops_per_token * work.micro_batch_tokens / cluster.flops
    sums = _all_reduce(work.dense_parameters * work.gradient_bytes, devices, 1, cluster)
    sums += _all_reduce(work.expert_parameters / group * work.gradient_bytes, devices // group, group, cluster)
    return Step(
        devices,
        group,
        exchanged_bytes=exchanges * (group - 1) * to_each,
        compute=micro_batches * compute,
        exchange=exchanges * exchange,
        gradients=max(0.0, sums - compute * 2 / 3),
        overlap=overlap,
    )


def _all_reduce(size: float, members: int, stride: int, cluster: Cluster) -> float:
    """A ring over `members` devices, every `stride`-th; as fast as its slowest link."""
    if members == 1:
        return 0.0
    link = cluster.inside if members * stride <= cluster.devices_per_node else cluster.between
    return link.seconds(2 * (members - 1), 2 * (members - 1) / members * size)
