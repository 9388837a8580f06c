"""Counts what a training step of one MoE layer launches and moves on a GPU, from shapes alone: nothing is computed.

    python scripts/layer_traffic.py --tokens 65536

Forward and backward under bfloat16 autocast, capacity factor 1.1. Every operator of ATen that is no view is a launch,
and moves each of its tensors once; so is and does every Triton kernel. Products and the rest are counted apart. The
counts are predictions: caches, and tiles that are read again, are left out.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moepp.layers import experts
from moepp.layers.kernels import grouped, triton_experts, triton_kernels, triton_rows
from moepp.layers.moe import MoELayer
from moepp.layers.settings import BalanceConfig, ExpertCounts, MoEConfig

PRODUCTS = {"_grouped_mm", "mm", "addmm", "bmm", "swiglu_in_kernel", "rows_matmul_kernel", "rows_outer_kernel"}
PRODUCTS |= {"swiglu_out_backward_kernel"}
NO_LAUNCH = {"device", "promote_types", "scalar_tensor", "detach", "split", "split_with_sizes", "unbind", "chunk"}
NO_LAUNCH |= {"empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided", "slice", "select", "t"}
NO_LAUNCH |= {"_unsafe_view", "_reshape_alias", "alias", "as_strided", "expand", "permute", "reshape", "squeeze"}
NO_LAUNCH |= {"transpose", "unsqueeze", "view", "lift_fresh"}


class Traffic(TorchDispatchMode):
    """Launches and bytes by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.add(function.overloadpacket.__name__, (args, kwargs, result))
        return result

    def add(self, name: str, values: Any) -> None:
        if name not in NO_LAUNCH:
            self.launches[name] += 1
            self.bytes[name] += sum(_size(t) for t in tree_leaves(values) if isinstance(t, Tensor))

    def moved(self, products: bool) -> float:
        """Gigabytes of the products, or of all else."""
        return sum(size for name, size in self.bytes.items() if (name in PRODUCTS) == products) / 1e9


def _size(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())  # less where expanded


@dataclass
class _Counted:
    """Stands for a Triton kernel."""

    name: str
    traffic: Traffic
    launch: Callable[..., None] = field(init=False)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: self.traffic.add(self.name, args)


@contextmanager
def gpu_paths(traffic: Traffic) -> Iterator[None]:
    """The backends as on a GPU, with Triton kernels that are counted instead of run."""
    names = [name for name in vars(triton_kernels) if name.endswith("_kernel")]
    kernels = {name: _Counted(name, traffic) for name in names}
    with (
        mock.patch.multiple(triton_kernels, **kernels),
        mock.patch.object(grouped, "_row_passes", lambda weights: triton_rows),
        mock.patch.object(triton_experts, "_refuse_unsupported", lambda weights: None),
        mock.patch.object(experts, "takes_triton", lambda gate_TK: True),
    ):
        yield


def layer_traffic(tau: float | None, backend: str, tokens: int) -> Traffic:
    """Of one training step; `tau` None is vanilla MoE."""
    counts = ExpertCounts(8, 1, 1, 2) if tau else ExpertCounts(8, 0, 0, 0)
    balance = BalanceConfig(tau=tau or 1.0)
    config = MoEConfig(768, 2048, counts, balance=balance, backend=backend, gating_residual=tau is not None)
    traffic = Traffic()
    with FakeTensorMode(), gpu_paths(traffic):
        layer = MoELayer(config, first=tau is None)
        x_BSD = torch.empty(1, tokens, config.dim, requires_grad=True)
        previous_TN = torch.empty(tokens, counts.total, requires_grad=True) if tau else None
        with traffic:
            with torch.autocast("cpu", torch.bfloat16):
                y_BSD, stats = layer(x_BSD, previous_TN)
            (y_BSD.sum() + stats.balance_loss + (stats.carried.sum() if tau else 0)).backward()
    return traffic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--operators", action="store_true", help="the ten that move most, of each row")
    options = parser.parse_args()
    print("| backend | tau | launches | products, GB | all else, GB |\n|---|---:|---:|---:|---:|")
    for backend in ("grouped", "triton"):
        for tau in (None, 0.75, 0.25, 0.1):
            traffic = layer_traffic(tau, backend, options.tokens)
            products, rest = traffic.moved(True), traffic.moved(False)
            print(f"| {backend} | {tau or 'vanilla'} | {traffic.launches.total()} | {products:.1f} | {rest:.1f} |")
            if options.operators:
                for name, size in traffic.bytes.most_common(12):
                    print(f"    {name:28} {traffic.launches[name]:3} {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
