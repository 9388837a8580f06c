"""What a family's router does between its logits and its gates, with new experts beside its own.

Shape suffixes: T tokens, K slots of a token, E the family's own experts, Z new ones, N = E + Z, C candidates for a
token's slots.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SILENT = -1e4  # the offset at which a new expert is never chosen and takes no probability: float32 rounds it to 0
INDEPENDENT = {  # scores of one expert's logit each
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": lambda logits: F.softplus(logits).sqrt(),
}


@dataclass(frozen=True)
class Form:
    """What a family's router does between its logits and its gates.

    `score` is `softmax` (over all), `top_k_softmax` (over the chosen), `sigmoid` or `sqrt_softplus`; scores are taken
    in float32 or in the logits' own dtype. The choice is by `chooses` (scores or logits), plus a `bias` per expert if
    there is one, which is the name of a tensor of the router, or `argument` where the block hands it over. `groups` is
    (all, kept). `expert_scale` is the name of a tensor with a factor for each expert's gate. `matrix` is the path of
    the module that turns its input into logits, None where the router does that with its own; the router's first
    answer is what it `says`, logits or scores.
    """

    score: str
    float_scores: bool = True
    chooses: str = "scores"
    bias: str | None = None
    groups: tuple[int, int] | None = None
    group_score: str = "max"
    group_fill: float = 0.0
    normed: bool = False
    epsilon: float = 0.0  # added to the sum that gates are divided by, or its least value where `clamped`
    clamped: bool = False
    scale: float = 1.0
    expert_scale: str | None = None
    out: str = "scores"  # whose dtype the gates have: scores, logits or input
    sorted: bool = True
    matrix: str | None = None
    says: str = "logits"

    @property
    def offset_in_logits(self) -> bool:
        """Where scores are independent of each other, an offset enters the choice alone."""
        return self.score not in INDEPENDENT

    def route(
        self,
        logits_TN: Tensor,
        offset_Z: Tensor,
        bias_E: Tensor | None,
        top_k: int,
        dtype: torch.dtype,
        scale_E: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Gates and ids [T, K]. The family's own choice among its experts competes with the new ones, and what is kept
        of it keeps its order: ties and sums fall as they did. Each token may have offsets of its own, [T, Z].
        """
        new = offset_Z.shape[-1]
        own = logits_TN.shape[1] - new
        logits_TE, logits_TZ = logits_TN.split([own, new], 1)
        if self.offset_in_logits:
            logits_TZ = logits_TZ + offset_Z
        logits_TE, logits_TZ = self.prepared(logits_TE, logits_TZ, dtype)
        scores_TE, scores_TZ = self.scores(logits_TE, logits_TZ)
        choice_TE, choice_TZ = (logits_TE, logits_TZ) if self.chooses == "logits" else (scores_TE, scores_TZ)
        if bias_E is not None:
            choice_TE = choice_TE + bias_E
        own_TK = self.allowed(choice_TE).topk(top_k, -1, sorted=self.sorted).indices
        silent_Z = offset_Z <= SILENT
        choice_TZ = (choice_TZ if self.offset_in_logits else choice_TZ + offset_Z).masked_fill(silent_Z, float("-inf"))
        place_TK = winners(torch.cat([choice_TE.gather(1, own_TK), choice_TZ], 1), top_k)
        new_TZ = torch.arange(own, own + new, device=own_TK.device).expand(own_TK.shape[0], -1)
        if self.chooses == "logits":
            scores_TE, scores_TZ = logits_TE, logits_TZ
        values_TK = torch.cat([scores_TE.gather(1, own_TK), scores_TZ], 1).gather(1, place_TK)
        gates_TK, expert_TK = self.gates(values_TK), torch.cat([own_TK, new_TZ], 1).gather(1, place_TK)
        if scale_E is not None:
            gates_TK = gates_TK * torch.cat([scale_E, scale_E.new_ones(new)])[expert_TK]
        return gates_TK, expert_TK

    def prepared(self, logits_TE: Tensor, logits_TZ: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """In the dtype of scores, contiguous as the family's own: elementwise kernels round strided rows otherwise."""
        dtype = torch.float32 if self.float_scores else dtype
        return logits_TE.to(dtype).contiguous(), logits_TZ.to(dtype)

    def answer(self, logits_TN: Tensor, own: int, dtype: torch.dtype) -> Tensor:
        """What the family's router says first, [T, N], of logits with the offsets that softmaxes see."""
        if self.says == "logits":
            return logits_TN
        return torch.cat(self.scores(*self.prepared(*logits_TN.tensor_split([own], 1), dtype)), 1)

    def scores(self, logits_TE: Tensor, logits_TZ: Tensor) -> tuple[Tensor, Tensor]:
        """A softmax over all is two softmaxes and each one's share of the mass; the own experts' is exactly 1 while the
        new ones are silent, where one softmax over N columns would round otherwise than one over E.
        """
        if score := INDEPENDENT.get(self.score):
            return score(logits_TE), score(logits_TZ)
        if self.score == "top_k_softmax":
            return logits_TE, logits_TZ
        if not logits_TZ.shape[1]:
            return logits_TE.softmax(-1), logits_TZ
        odds_T1 = logits_TE.logsumexp(-1, keepdim=True) - logits_TZ.logsumexp(-1, keepdim=True)
        return logits_TE.softmax(-1) * odds_T1.sigmoid(), logits_TZ.softmax(-1) * (-odds_T1).sigmoid()

    def allowed(self, choice_TE: Tensor) -> Tensor:
        """Experts outside the best groups are out of the choice."""
        if self.groups is None:
            return choice_TE
        groups, kept = self.groups
        grouped = choice_TE.unflatten(1, (groups, -1))
        best = grouped.amax(-1) if self.group_score == "max" else grouped.topk(2, -1).values.sum(-1)
        mask = torch.ones_like(best, dtype=torch.bool).scatter(1, best.topk(kept, -1, sorted=False).indices, False)
        return choice_TE.masked_fill(mask.repeat_interleave(grouped.shape[-1], 1), self.group_fill)

    def gates(self, scores_TK: Tensor) -> Tensor:
        if self.score == "top_k_softmax":
            scores_TK = scores_TK.softmax(-1)
        elif self.score in INDEPENDENT and self.chooses == "logits":
            scores_TK = INDEPENDENT[self.score](scores_TK)
        if self.normed:
            total_T1 = scores_TK.sum(-1, keepdim=True)
            scores_TK = scores_TK / (total_T1.clamp(min=self.epsilon) if self.clamped else total_T1 + self.epsilon)
        return scores_TK if self.scale == 1 else scores_TK * self.scale


def winners(choice_TC: Tensor, top_k: int) -> Tensor:
    """The columns of each row's `top_k` largest, ascending [T, K]; of equal ones the first."""
    return choice_TC.argsort(dim=-1, descending=True, stable=True)[:, :top_k].sort(-1).values
