"""What the routers did: FFN experts per token, the share of each expert type, load balance, entropy, dropped slots."""

import csv
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics import Metric

from moepp.layers.moe import MoEStats
from moepp.layers.settings import MoEConfig


class RoutingStatistics(Metric):
    """Sums over batches and devices of what every MoE layer reports."""

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.experts, self.kinds, self.limited = config.experts, config.experts.kinds(), config.ffn_rows is not None
        self.drops = config.capacity_factor is not None
        self.add_state("chosen_LN", torch.zeros(0, config.experts.total, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("dropped_L", torch.zeros(0, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("dropped_ffn", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("recomputed", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        # Mean over layers, summed over tokens: batches of devices need not be equal.
        self.add_state("entropy", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, stats: list[MoEStats]) -> None:
        """A model without MoE layers has no `stats` and leaves nothing."""
        if not stats:
            return
        chosen_LN, dropped_L = (
            torch.stack([getattr(layer, name) for layer in stats]) for name in ("chosen_N", "dropped")
        )
        first = self.chosen_LN.numel() == 0
        self.chosen_LN = chosen_LN if first else self.chosen_LN + chosen_LN
        self.dropped_L = dropped_L if first else self.dropped_L + dropped_L
        self.tokens += len(stats[0].logits_TN)
        if self.drops:
            self.dropped_ffn += torch.stack([layer.dropped_ffn for layer in stats]).sum()
        if self.limited and stats[0].recomputed is not None:  # which it is outside training: nothing is kept there
            self.recomputed += torch.stack([layer.recomputed for layer in stats]).sum()
        self.entropy += torch.stack([layer.entropy for layer in stats]).mean() * len(stats[0].logits_TN)

    def share_LN(self) -> Tensor:
        """Share of a layer's routed slots that each expert got; a row sums to 1, or to 0 where no slot was used."""
        return self.chosen_LN / self.chosen_LN.sum(1, keepdim=True).clamp(min=1)

    def compute(self) -> dict[str, Tensor]:
        """Means over layers. `ffn_per_token` counts routed FFN experts, not shared ones, as chosen: before any were
        dropped; `load_max_over_mean` compares FFN experts with each other; `dropped_share` is of all slots,
        `dropped_ffn_share` (where capacity limits them) and `recomputed_share` (where `ffn_rows` limits what is kept)
        of those that chose FFN experts. Without MoE layers only what is then 0.
        """
        if not len(self.chosen_LN):
            return {name: torch.zeros(()) for name in ("ffn_per_token", "entropy")}
        share_LN, ffn = self.share_LN(), self.experts.ffn
        metrics = {"ffn_per_token": (self.chosen_LN[:, :ffn].sum(1) / self.tokens).mean()}
        counts = self.experts.by_kind()
        for kind, share_LC in zip(counts, share_LN.split(list(counts.values()), 1), strict=True):
            metrics[f"{kind}_share"] = share_LC.sum(1).mean()
        load_LE = share_LN[:, :ffn]
        metrics["load_max_over_mean"] = (load_LE.amax(1) / load_LE.mean(1).clamp(min=1e-12)).mean()
        metrics["entropy"] = (self.entropy / self.tokens).float()
        metrics["dropped_share"] = self.dropped_L.sum() / self.chosen_LN.sum().clamp(min=1)
        chosen_ffn = self.chosen_LN[:, :ffn].sum().clamp(min=1)
        if self.drops:
            metrics["dropped_ffn_share"] = self.dropped_ffn / chosen_ffn
        if self.limited:
            metrics["recomputed_share"] = self.recomputed / chosen_ffn
        return metrics

    def write_table(self, path: Path) -> None:
        """One CSV row per layer and expert: layer, expert, kind, share of the layer's slots."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["layer", "expert", "kind", "share"])
            for layer, shares in enumerate(self.share_LN().tolist()):
                rows.writerows([layer, e, self.kinds[e], f"{share:.6f}"] for e, share in enumerate(shares))
