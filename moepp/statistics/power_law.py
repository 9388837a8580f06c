"""Loss against size and tokens, L(N, D) = E + A (N / N0)^-a + B (D / D0)^-b (Hoffmann et al. 2022, Eq. 2), N0 and D0
being the geometric means of what was trained. Intervals come from residuals drawn anew in blocks: runs of one block
(the lengths of one trunk) share their deviation.

Shape suffixes: R runs, P the five parameters (E, A, a, B, b).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moepp.statistics.resampling import Interval, percentile_interval

DRAWS = 200
LOWEST, HIGHEST = (0.0, 0.0, 0.01, 0.0, 0.01), (np.inf, np.inf, 2.0, np.inf, 2.0)


@dataclass(frozen=True)
class PowerLaw:
    """`draws_P` are the fits of the bootstrap."""

    scale: tuple[float, float]  # N0, D0
    fit_P: np.ndarray
    draws_P: np.ndarray

    def loss(self, size: float, tokens: float) -> Interval:
        """Of a model of this size after so many tokens: the law's own interval, without the noise of a single run."""
        at = np.array([size / self.scale[0]]), np.array([tokens / self.scale[1]])
        draws = np.array([_law(draw_P, *at)[0] for draw_P in self.draws_P])
        return percentile_interval(float(_law(self.fit_P, *at)[0]), draws)


def tokens_ratio(base: PowerLaw, ours: PowerLaw, base_size: float, size: float, tokens: float) -> Interval:
    """Tokens that a model of `base` needs to end as low as one of `ours` after `tokens`, over these; infinite where
    none suffice. The two laws are independent.
    """
    n_base, at = np.array([base_size / base.scale[0]]), (np.array([size / ours.scale[0]]), tokens / ours.scale[1])

    def ratio(base_P: np.ndarray, ours_P: np.ndarray) -> float:
        floor, a_size, exponent, a_tokens, of_tokens = base_P
        left = float((_law(ours_P, *at) - floor - a_size * n_base**-exponent)[0])
        return base.scale[1] * (a_tokens / left) ** (1 / of_tokens) / tokens if left > 0 else np.inf

    draws = [ratio(*pair) for pair in zip(base.draws_P, ours.draws_P, strict=True)]
    low, high = np.quantile(draws, (0.025, 0.975), method="nearest")
    return Interval(ratio(base.fit_P, ours.fit_P), float(low), float(high))


def fit_power_law(
    size_R: np.ndarray, tokens_R: np.ndarray, loss_R: np.ndarray, block_R: Sequence[object], seed: int = 0
) -> PowerLaw:
    """Raises ValueError with fewer than three sizes or three token counts: they leave the exponents open."""
    if min(len(np.unique(size_R)), len(np.unique(tokens_R))) < 3:
        raise ValueError("a power law in size and tokens needs three of each")
    scale = tuple(float(np.exp(np.log(of_R).mean())) for of_R in (size_R, tokens_R))
    n_R, d_R = size_R / scale[0], tokens_R / scale[1]
    fit_P = _fit(n_R, d_R, loss_R, np.array([0.6 * loss_R.min(), 0.2 * loss_R.min(), 0.3, 0.2 * loss_R.min(), 0.3]))
    expected_R = _law(fit_P, n_R, d_R)
    spread = np.sqrt(len(loss_R) / max(1, len(loss_R) - len(fit_P)))  # residuals of a fit are smaller than the noise
    residual_R, generator = spread * (loss_R - expected_R), np.random.default_rng(seed)
    blocks = [np.flatnonzero([other == block for other in block_R]) for block in dict.fromkeys(block_R)]
    draws = []
    for _ in range(DRAWS):
        drawn_R = np.empty_like(residual_R)
        for rows in blocks:
            other = blocks[generator.integers(len(blocks))]
            drawn_R[rows] = generator.choice([-1, 1]) * residual_R[np.resize(other, len(rows))]
        draws.append(_fit(n_R, d_R, expected_R + drawn_R, fit_P))
    return PowerLaw(scale, fit_P, np.array(draws))


def _law(fit_P: np.ndarray, n_R: np.ndarray, d_R: np.ndarray) -> np.ndarray:
    floor, a_size, size, a_tokens, tokens = fit_P
    return floor + a_size * n_R**-size + a_tokens * d_R**-tokens


def _fit(n_R: np.ndarray, d_R: np.ndarray, loss_R: np.ndarray, start_P: np.ndarray) -> np.ndarray:
    from scipy.optimize import least_squares

    inside_P = np.clip(start_P, np.add(LOWEST, 1e-6), np.subtract(HIGHEST, 1e-6))
    return least_squares(lambda p: _law(p, n_R, d_R) - loss_R, inside_P, bounds=(LOWEST, HIGHEST), x_scale=inside_P).x
