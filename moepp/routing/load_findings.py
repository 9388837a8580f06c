"""The paper's observations on task-level expert load (Section 4 and appendix), each as a statistic with a test.

Examples of every task are split at random into two halves. Variances and correlations between tasks are products of one
half with the other, so that noise of the examples, which both sides of a product would share, does not pass for a
difference between tasks; their expectation without any difference is 0. The tasks themselves are taken as they are:
what is found holds for these, and other examples of them.

Shape suffixes: H the two halves, K groups (tasks or topics), L MoE layers, M columns, N experts, D draws; `...` is
nothing or D.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import rankdata

from moepp.routing.loads import KINDS, ExpertLoad
from moepp.statistics.hypotheses import Effect
from moepp.statistics.resampling import (
    DRAWS,
    bootstrap_sums,
    chance,
    correlation,
    correlation_of_moments,
    moments,
    rank_correlation,
    shuffled_sums,
)

Statistic = Callable[[np.ndarray], np.ndarray]  # sums [..., H, K, M] -> [...]
FFN, ZERO = KINDS.index("ffn"), KINDS.index("zero")


class HalvedSums:
    """Sums over the examples of every half of every group, as observed, bootstrapped within halves, and with chance
    deciding the group of each example.
    """

    def __init__(self, load: ExpertLoad, columns_XM: np.ndarray, seed: int = 0, draws: int = DRAWS):
        generator = np.random.default_rng(seed)
        self.seed, self.draws, self.groups = seed, draws, len(load.groups)
        cells = []
        for group in load.groups:
            rows = generator.permutation(load.rows(group))
            cells.append((rows[: len(rows) // 2], rows[len(rows) // 2 :]))
        self.cells = [columns_XM[cell[half]].astype(float) for half in (0, 1) for cell in cells]  # halves outermost

    def observed(self) -> np.ndarray:
        return self._shaped(np.stack([cell.sum(0) for cell in self.cells]))

    def bootstrapped(self) -> np.ndarray:
        drawn = [bootstrap_sums(cell, self.draws, (self.seed, index)) for index, cell in enumerate(self.cells)]
        return self._shaped(np.stack(drawn, axis=1))

    def shuffled(self) -> np.ndarray:
        rows, sizes = np.concatenate(self.cells), [len(cell) for cell in self.cells]
        return self._shaped(shuffled_sums(rows, sizes, self.draws, self.seed))

    def _shaped(self, sums: np.ndarray) -> np.ndarray:
        return sums.reshape(*sums.shape[:-2], 2, self.groups, sums.shape[-1])

    def effect(self, statistic: Statistic, bound: float = 0.0, p: float | None = None) -> Effect:
        return Effect.of(float(statistic(self.observed())), statistic(self.bootstrapped()), bound, p)


def enough_examples(load: ExpertLoad) -> bool:
    """Whether every statistic here is defined: three groups and two examples in each."""
    return len(load.groups) >= 3 and all(len(load.rows(group)) >= 2 for group in load.groups)


def _columns(load: ExpertLoad) -> np.ndarray:
    """FFN experts by layer, zero experts by layer, tokens, nats, bytes: [X, 2L + 3]."""
    rest = np.stack([load.tokens_X, load.nats_X, load.bytes_X], axis=1)
    return np.concatenate([load.by_kind_XLI[:, :, FFN], load.by_kind_XLI[:, :, ZERO], rest], axis=1)


def _ffn(sums: np.ndarray) -> np.ndarray:
    """FFN experts per token, [..., H, K, L]."""
    layers = (sums.shape[-1] - 3) // 2
    return sums[..., :layers] / sums[..., -3, None]


def _zero(sums: np.ndarray) -> np.ndarray:
    """Zero experts per token, mean over layers, [..., H, K]."""
    layers = (sums.shape[-1] - 3) // 2
    return sums[..., layers : 2 * layers].mean(-1) / sums[..., -3]


def _difficulty(sums: np.ndarray) -> np.ndarray:
    """Bits per byte of what the examples ask for, [..., H, K]."""
    return sums[..., -2] / sums[..., -1] / math.log(2)


def _layer_correlation(ffn: np.ndarray, near: Callable[[int, int], bool]) -> np.ndarray:
    """Correlation over groups of the FFN use [..., H, K, L] of two layers, one from either half, mean over pairs."""
    one, other = (np.moveaxis(ffn[..., half, :, :], -1, 0) for half in (0, 1))  # [L, ..., K]
    pairs = [(i, j) for i in range(len(one)) for j in range(len(one)) if i != j and near(i, j)]
    return np.mean([correlation(one[i], other[j]) for i, j in pairs], axis=0)


def _adjacent(i: int, j: int) -> bool:
    return abs(i - j) == 1


def adjacent_layers(load: ExpertLoad, seed: int = 0, draws: int = DRAWS) -> Effect:
    """Correlation over tasks of the FFN experts per token in a layer and the next, mean over such pairs (L >= 2). It is
    one of halves, which noise of the examples draws towards 0.

    p is the larger of two: tasks that differ, but anew in every layer (which task is which is decided in each), and
    tasks that do not differ (examples exchanged between them).
    """
    halved = HalvedSums(load, _columns(load), seed, draws)

    def statistic(sums: np.ndarray) -> np.ndarray:
        return _layer_correlation(_ffn(sums), _adjacent)

    sums = halved.observed()
    orders = np.tile(np.arange(halved.groups)[:, None], (draws, 1, load.layers))
    orders = np.random.default_rng(seed).permuted(orders, axis=1)[:, None]
    unrelated = _layer_correlation(np.take_along_axis(_ffn(sums)[None], orders, axis=2), _adjacent)
    p = max(chance(float(statistic(sums)), null) for null in (unrelated, statistic(halved.shuffled())))
    return halved.effect(statistic, p=p)


def adjacent_over_distant_layers(load: ExpertLoad, seed: int = 0) -> Effect:
    """The same minus the mean over all other pairs: whether it is neighbours that agree (L >= 3)."""

    def statistic(sums: np.ndarray) -> np.ndarray:
        ffn = _ffn(sums)
        return _layer_correlation(ffn, _adjacent) - _layer_correlation(ffn, lambda i, j: not _adjacent(i, j))

    return HalvedSums(load, _columns(load), seed).effect(statistic)


def deviation_between_tasks(sums: np.ndarray) -> np.ndarray:
    """Standard deviation over groups of FFN experts per token, noise of examples taken off, [..., L]; negative where
    the halves disagree.
    """
    ffn = _ffn(sums)
    centred = ffn - ffn.mean(-2, keepdims=True)
    variance = (centred[..., 0, :, :] * centred[..., 1, :, :]).sum(-2) / (ffn.shape[-2] - 1)
    return np.sign(variance) * np.sqrt(abs(variance))


def end_layers(layers: int) -> list[int]:
    """The shallow layers, a quarter of all, and the last one."""
    return [*range(max(1, layers // 4)), layers - 1]


def ends_over_middle(load: ExpertLoad, seed: int = 0, draws: int = DRAWS) -> Effect:
    """Deviation between tasks in the end layers minus that in the layers between (L >= 3)."""
    ends = end_layers(load.layers)
    middle = [layer for layer in range(load.layers) if layer not in ends]

    def statistic(sums: np.ndarray) -> np.ndarray:
        deviation = deviation_between_tasks(sums)
        return deviation[..., ends].mean(-1) - deviation[..., middle].mean(-1)

    return HalvedSums(load, _columns(load), seed, draws).effect(statistic)


def layer_deviations(load: ExpertLoad, seed: int = 0) -> np.ndarray:
    """`deviation_between_tasks` of every layer, [L]."""
    return deviation_between_tasks(HalvedSums(load, _columns(load), seed).observed())


def _over_tasks(load: ExpertLoad, of: Statistic, seed: int, bound: float) -> Effect:
    """Spearman's rho over tasks between difficulty and a use of experts; each side from the other half."""

    def statistic(sums: np.ndarray) -> np.ndarray:
        use, difficulty = of(sums), _difficulty(sums)
        one, other = (rank_correlation(difficulty[..., h, :], use[..., 1 - h, :]) for h in (0, 1))
        return (one + other) / 2

    halved = HalvedSums(load, _columns(load), seed)
    if bound:
        return halved.effect(statistic, bound)
    sums, generator = halved.observed(), np.random.default_rng(seed)
    orders = np.stack([generator.permutation(halved.groups) for _ in range(DRAWS)])
    use, difficulty = of(sums), _difficulty(sums)
    null = sum(rank_correlation(difficulty[h][orders], use[1 - h][None]) for h in (0, 1)) / 2
    return halved.effect(statistic, p=chance(float(statistic(sums)), null))


def difficulty_and_ffn(load: ExpertLoad, seed: int = 0) -> Effect:
    """Rank correlation over tasks of difficulty and FFN experts per token, p against 0.5."""
    return _over_tasks(load, lambda sums: _ffn(sums).mean(-1), seed, bound=0.5)


def ease_and_zero(load: ExpertLoad, seed: int = 0) -> Effect:
    """Rank correlation over tasks of ease (minus difficulty) and zero experts per token, p against 0."""
    return _over_tasks(load, lambda sums: -_zero(sums), seed, bound=0.0)


def ease_and_zero_within_tasks(load: ExpertLoad, seed: int = 0) -> Effect:
    """The same over the examples of each task, mean over tasks: no task's form or length can make it."""
    correlations, drawn = [], []
    for index, group in enumerate(load.groups):
        examples = load.select(load.rows(group))
        ease = -examples.nats_X / np.maximum(examples.bytes_X, 1)
        zero = examples.by_kind_XLI[:, :, ZERO].sum(1) / examples.tokens_X
        of_examples = moments(rankdata(ease), rankdata(zero))
        correlations.append(correlation_of_moments(of_examples.sum(0)))
        drawn.append(correlation_of_moments(bootstrap_sums(of_examples, seed=(seed, index))))
    return Effect.of(float(_mean_of_defined(correlations)), _mean_of_defined(drawn))


def _mean_of_defined(values: Sequence[np.ndarray]) -> np.ndarray:
    """Over the first axis; NaN where none is defined, as of tasks whose examples are all alike."""
    defined = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(defined, values, 0.0).sum(0) / defined.sum(0)


def ffn_difference(load: ExpertLoad, group: str, other: str, layers: slice, seed: int = 0) -> Effect:
    """FFN experts per token of a task minus another's, mean over `layers`; p by exchanging their examples."""

    def statistic(sums: np.ndarray) -> np.ndarray:
        per_token = sums[..., 0] / sums[..., 1]
        return per_token[..., 0] - per_token[..., 1]

    used = load.by_kind_XLI[:, layers, FFN].mean(1)
    cells = [np.stack([used, load.tokens_X], axis=1)[load.rows(name)] for name in (group, other)]
    observed = float(statistic(np.stack([cell.sum(0) for cell in cells])))
    drawn = statistic(np.stack([bootstrap_sums(cell, seed=(seed, i)) for i, cell in enumerate(cells)], axis=1))
    null = statistic(shuffled_sums(np.concatenate(cells), [len(cell) for cell in cells], seed=seed))
    return Effect.of(observed, drawn, p=chance(observed, null))


def topics_differ(load: ExpertLoad, seed: int = 0, draws: int = 500) -> Effect:
    """Deviation of an expert's share of slots between topics, as a part of an even share (1 / N), over all layers and
    experts; p by exchanging examples of all topics. Over all experts and layers the arrays of draws are large.
    """
    experts = load.chosen_XLN.shape[-1]
    halved = HalvedSums(load, load.chosen_XLN.reshape(len(load.tokens_X), -1), seed, draws)

    def statistic(sums: np.ndarray) -> np.ndarray:
        chosen = sums.reshape(*sums.shape[:-1], -1, experts)
        share = chosen / chosen.sum(-1, keepdims=True)  # [..., H, K, L, N]
        centred = share - share.mean(-3, keepdims=True)
        variance = (centred[..., 0, :, :, :] * centred[..., 1, :, :, :]).sum(-3).mean((-1, -2)) / (halved.groups - 1)
        return np.sign(variance) * np.sqrt(abs(variance)) * experts

    p = chance(float(statistic(halved.observed())), statistic(halved.shuffled()), two_sided=False)
    return halved.effect(statistic, p=p)


def zero_over_other_kinds(load: ExpertLoad, per_expert: bool, seed: int = 0) -> Effect:
    """Share of all slots of the zero experts minus that of the copy or the constant experts, whichever is larger, mean
    over layers and tasks: of a whole type, or of its experts on average.
    """
    counts = [load.kinds.count(kind) if per_expert else 1 for kind in load.types]
    halved = HalvedSums(load, load.by_kind_XLI.reshape(len(load.tokens_X), -1), seed)

    def statistic(sums: np.ndarray) -> np.ndarray:
        chosen = sums.sum(-3).reshape(*sums.shape[:-3], halved.groups, load.layers, len(load.types))
        share = (chosen / chosen.sum(-1, keepdims=True)).mean((-3, -2)) / np.maximum(counts, 1)
        return share[..., ZERO] - share[..., 1:ZERO].max(-1)

    return halved.effect(statistic)
