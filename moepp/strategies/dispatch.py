"""Dispatchers of experts that share a batch over devices, or are themselves spread over them.

Shape suffixes: T tokens, K slots of a token, S = T*K slots, R rows, D model width, E FFN experts, N all experts, W
devices, G devices of an expert group, L experts on a device (E = G*L).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moepp.layers.balance import selection_counts
from moepp.layers.dispatch import LocalDispatcher, Meanwhile, SlotCounts, compute_dtype
from moepp.layers.kernels.base import RoutedTokens
from moepp.layers.regions import region
from moepp.layers.settings import Backend
from moepp.strategies.groups import CopyGroups
from moepp.strategies.traffic import Traffic


class SharedBatchDispatcher(LocalDispatcher):
    """All experts on this device, the batch's tokens on all devices."""

    def share(self, count_KN: Tensor) -> SlotCounts:
        """Counts that are under way: on GPUs, what follows on the device's stream runs meanwhile."""
        count_WKN = count_KN.new_empty(dist.get_world_size(), *count_KN.shape)
        pending = dist.all_gather(list(count_WKN), count_KN.contiguous(), async_op=True)
        return SlotCounts(count_WKN, dist.get_rank(), pending, sent=count_KN)

    def gather(self, of_this_T: Tensor) -> Tensor:
        gathered_WT = of_this_T.new_empty(dist.get_world_size(), *of_this_T.shape)
        dist.all_gather(list(gathered_WT), of_this_T.contiguous())
        return gathered_WT


@dataclass
class Exchange:
    """How many rows each device of the expert group gets from this one (`send`) and gives it (`receive`).

    `remote` of them, over all devices, leave theirs. `gradient` is that of the rows sent, while it is under way.
    """

    send: list[int]
    receive: list[int]
    remote: int
    gradient: Tensor | None = None

    def reversed(self) -> "Exchange":
        return Exchange(self.receive, self.send, self.remote)


class AllToAllDispatcher(SharedBatchDispatcher):
    """L of the E experts on this device. Rows of FFN experts go to the device of their expert and come back, in the
    dtype they are multiplied in; zero-computation experts and dropped slots send nothing.
    """

    def __init__(self, backend: Backend, groups: CopyGroups, traffic: Traffic):
        super().__init__(backend)
        self.groups, self.traffic = groups, traffic
        self.under_way: list[dist.Work] = []  # exchanges that were begun
        self.kept: list[Tensor] | None = None  # takes the rows that come, where they are to be had again
        self.given: Iterator[Tensor] | None = None  # such rows, in place of those that would come

    def __call__(
        self,
        w_in: Tensor,
        w_out: Tensor,
        tokens: RoutedTokens,
        counts: SlotCounts | None = None,
        meanwhile: Meanwhile | None = None,
    ) -> Tensor:
        x_TD, expert_TK, gate_TK, others = tokens.x_TD, tokens.expert_TK, tokens.gate_TK, tokens.others
        dtype, local, top_k = compute_dtype(x_TD), len(w_in), expert_TK.shape[1]
        experts = local * self.groups.size
        if counts is None:
            counts = self.share(selection_counts(expert_TK, experts))
        elif not counts.of_others:
            counts = self.share(counts.count_WKN[0])
        arriving = CountsOnTheWay(counts)
        with torch.autocast(x_TD.device.type, enabled=False):
            with region("zero_computation"):  # needs no counts: GPUs do it while these travel to the host
                y_TD = others(x_TD) if others is not None else gate_TK.new_zeros(x_TD.shape)
            slot_S = expert_TK.reshape(-1).clamp(max=experts).argsort(stable=True)  # by expert, so by device
            with region("wait_for_counts"):
                count_WN = arriving.on_host()
            exchange = self._plan(count_WN, experts)
            slot_R = slot_S[: sum(exchange.send)]
            token_R = slot_R // top_k
            with region("dispatch"):
                x_RD = BeginExchange.apply(x_TD.to(dtype)[token_R], exchange, self)
        if meanwhile is not None:
            meanwhile()
        with torch.autocast(x_TD.device.type, enabled=False):
            with region("wait_for_rows"):
                x_RD = EndExchange.apply(x_RD, exchange, self)
            expert_R = experts_of_rows(self._received(arriving.count_WN, local), len(x_RD))
            sizes = self._received(count_WN, local).sum(0).tolist()
            rows = RoutedTokens(x_RD, expert_R[:, None], x_RD.new_ones(len(x_RD), 1), sizes=sizes)
            y_RD = self.compute(w_in, w_out, rows)
            with region("combine"):
                back = exchange.reversed()
                y_RD = EndExchange.apply(BeginExchange.apply(y_RD, back, self), back, self)
                gate_R = gate_TK.reshape(-1)[slot_R]
                return y_TD.index_add_(0, token_R, y_RD * gate_R[:, None])

    def keeping(self) -> dict[str, Any]:
        return {"context_fn": self._passes}

    def _passes(self) -> tuple["KeptRows", "KeptRows"]:
        """Around the first pass of a block, and around those that repeat it."""
        rows: list[Tensor] = []
        return KeptRows(self, rows, again=False), KeptRows(self, rows, again=True)

    def begin(self, rows_RD: Tensor, exchange: Exchange, counted: bool) -> Tensor:
        """Sends rows; those that come are in the result once `end` has returned."""
        if self.given is not None:
            return next(self.given).detach()
        rows_RD = rows_RD.contiguous()
        received = rows_RD.new_empty(sum(exchange.receive), rows_RD.shape[1])
        if counted:
            self.traffic.sent(rows_RD, exchange.remote)
        sizes, group = (exchange.receive, exchange.send), self.groups.within
        self.under_way.append(dist.all_to_all_single(received, rows_RD, *sizes, group=group, async_op=True))
        if self.kept is not None:
            self.kept.append(received.detach())
        return received

    def end(self, rows_RD: Tensor, counted: bool) -> None:
        """Returns when exchanges of `rows_RD` are done, on GPUs for what follows on the device's stream."""
        with self.traffic.waiting(rows_RD.is_cuda, counted):
            while self.under_way:
                self.under_way.pop().wait()

    def _plan(self, count_WN: Tensor, experts: int) -> Exchange:
        groups, rows_WE = self.groups, count_WN[:, :experts]
        remote = self.traffic.routed(rows_WE, groups.size, int(count_WN.sum()))
        rows_GG = rows_WE[groups.first :][: groups.size].unflatten(1, (groups.size, -1)).sum(2)  # from, to
        return Exchange(rows_GG[groups.rank].tolist(), rows_GG[:, groups.rank].tolist(), remote)

    def _received(self, count_WN: Tensor, local: int) -> Tensor:
        """How many rows this device's experts get from each device of the expert group, [G, L]."""
        groups = self.groups
        return count_WN[groups.first :][: groups.size, groups.rank * local :][:, :local]


@dataclass
class KeptRows:
    """Around a pass of a block that activation checkpointing runs twice: the rows that come in the first one are kept,
    and given `again` in the other, which sends nothing. Not torch's selective checkpointing, which wants the same
    operators in both passes: FSDP gathers weights in the second that it has gathered ahead in the first.
    """

    dispatcher: AllToAllDispatcher
    rows: list[Tensor]
    again: bool

    def __enter__(self) -> None:
        if self.again:
            self.dispatcher.given = iter(self.rows)
        else:
            self.dispatcher.kept = self.rows

    def __exit__(self, *_: Any) -> None:
        self.dispatcher.kept = self.dispatcher.given = None


def experts_of_rows(rows_GL: Tensor, received: int) -> Tensor:
    """The expert of each received row, [R] in 0..L-1: rows come by device, and by expert from each."""
    expert_GL = torch.arange(rows_GL.shape[1], device=rows_GL.device).expand_as(rows_GL)
    return expert_GL.flatten().repeat_interleave(rows_GL.flatten(), output_size=received)


class CountsOnTheWay:
    """Slots by device and expert, [W, N], and their copy on the host: the only one a layer waits for.

    On GPUs the copy has a stream of its own, so that the compute stream waits for nothing. That stream waits for counts
    under way alone, which left after all that came before them; for others, which the compute stream made, it follows
    that.
    """

    def __init__(self, counts: SlotCounts):
        device, self.copied, self.counts = counts.count_WKN.device, None, counts  # kept until the copy is done
        if device.type != "cuda":
            self.count_WN = self.host_WN = counts.wait().sum(1)
            return
        stream = _copy_stream(device)
        if counts.pending is None:
            stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self.count_WN = counts.wait().sum(1)
            self.host_WN = self.count_WN.to("cpu", non_blocking=True)  # into pinned memory
            self.copied = stream.record_event()

    def on_host(self) -> Tensor:
        if self.copied is not None:
            self.copied.synchronize()
        return self.host_WN


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


class BeginExchange(torch.autograd.Function):
    """The all-to-all of rows within the expert group, until `EndExchange` under way; the gradient takes the same way
    back. What is computed between the two runs meanwhile, and its gradients too.
    """

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, exchange: Exchange, dispatcher: AllToAllDispatcher) -> Tensor:
        ctx.exchange, ctx.dispatcher = exchange, dispatcher
        return dispatcher.begin(rows_RD, exchange, counted=ctx.needs_input_grad[0])

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.exchange.gradient = ctx.exchange.gradient, None
        ctx.dispatcher.end(gradient, counted=True)
        return gradient, None, None


class EndExchange(torch.autograd.Function):
    """Waits for the rows, which are in its input only then; begins the exchange of their gradient."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, exchange: Exchange, dispatcher: AllToAllDispatcher) -> Tensor:
        ctx.exchange, ctx.dispatcher = exchange, dispatcher
        dispatcher.end(rows_RD, counted=ctx.needs_input_grad[0])
        return rows_RD

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
        ctx.exchange.gradient = ctx.dispatcher.begin(grad_RD, ctx.exchange.reversed(), counted=True)
        return grad_RD, None, None  # of the shape that autograd expects here, and not looked at
