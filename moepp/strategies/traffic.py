"""What expert parallelism sends, and how long that takes. Reads host-side numbers only: no layer waits for it."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Traffic:
    """Sums over the passes of training since they were last read.

    Shape suffixes: W devices, E FFN experts, G devices of an expert group.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.steps = self.layers = self.slots = self.rows_sent = self.bytes = 0
        self.imbalance = self.seconds = 0.0
        self.events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()  # of exchanges not yet seen to end

    def count_step(self) -> None:
        """At every optimizer step; also adds up the exchanges that have ended, so that `events` stays short."""
        self.steps += 1
        while self.events and self.events[0][1].query():
            self._add_first()

    def _add_first(self) -> None:
        start, end = self.events.popleft()
        self.seconds += start.elapsed_time(end) / 1000

    def routed(self, rows_WE: Tensor, group_size: int, slots: int) -> int:
        """One layer's rows, by the device of their token and by expert, of `slots` slots that any expert serves.

        Returns how many of the rows leave their device.
        """
        rows_CGG = rows_WE.unflatten(1, (group_size, -1)).sum(2).unflatten(0, (-1, group_size))  # copy, from, to
        load_W = rows_CGG.sum(1).flatten().double()
        sent = int(rows_WE.sum() - rows_CGG.diagonal(dim1=1, dim2=2).sum())
        if torch.is_grad_enabled():
            self.layers += 1
            self.slots += slots
            self.rows_sent += sent
            self.imbalance += float(load_W.max() / load_W.mean().clamp(min=1e-12))
        return sent

    def sent(self, rows: Tensor, remote_rows: int) -> None:
        """One all-to-all of `rows` [R, D], of which `remote_rows` on all devices together leave theirs."""
        self.bytes += remote_rows * rows.shape[1] * rows.element_size()

    @contextmanager
    def waiting(self, on_gpu: bool, counted: bool) -> Iterator[None]:
        """Around the wait for an all-to-all."""
        if not counted:
            yield
            return
        if on_gpu:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self.events.append((start, end))
        else:
            begin = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - begin

    def read(self) -> dict[str, float]:
        """Per optimizer step since the last call, over all devices; the time is this one's. {} where no rows travel.

        `ep/bytes_per_step` counts rows that leave their device, forward and backward, without those of the pass that
        counts the load of a step of several micro-batches (`balance.over`); `ep/rows_sent_share` is of all
        slots that were routed and not dropped; `ep/device_load_max_over_mean` compares the FFN rows that devices
        compute, mean over layers; `ep/all_to_all_ms` is how long computing waits for rows, for those of the slowest
        device too.
        """
        if not (self.steps and self.layers):
            return {}
        if self.events:
            self.events[-1][1].synchronize()
        while self.events:
            self._add_first()
        metrics = {
            "ep/bytes_per_step": self.bytes / self.steps,
            "ep/rows_sent_share": self.rows_sent / self.slots,
            "ep/device_load_max_over_mean": self.imbalance / self.layers,
            "ep/all_to_all_ms": self.seconds * 1000 / self.steps,
        }
        self.reset()
        return metrics
