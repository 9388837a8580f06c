"""Loss against size and tokens, L(N, D) = E + A (N / N0)^-a + B (D / D0)^-b (Hoffmann et al. 2022, Eq. 2), N0 and D0
being the geometric means of what was trained. Intervals come from residuals drawn anew in blocks: runs of one block
(the lengths of one trunk) share their deviation.

Shape suffixes: R runs, P the five parameters (E, A, a, B, b), F fits: the law itself, then those of the bootstrap.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moepp.statistics.resampling import Interval

DRAWS = 400
PARAMETERS = ("E", "A", "a", "B", "b")
LOWEST, HIGHEST, START = 0.01, 2.0, 0.3  # exponents


@dataclass(frozen=True)
class PowerLaw:
    scale: tuple[float, float]  # N0, D0
    fits_FP: np.ndarray

    def losses_F(self, size: float, tokens: float) -> np.ndarray:
        """Of a model of this size after so many tokens, by every fit; without the noise of a single run."""
        floor, a_size, size_exponent, a_tokens, tokens_exponent = self.fits_FP.T
        of_size = a_size * (size / self.scale[0]) ** -size_exponent
        return floor + of_size + a_tokens * (tokens / self.scale[1]) ** -tokens_exponent

    def tokens_F(self, size: float, loss_F: np.ndarray) -> np.ndarray:
        """After how many a model of this size has that loss; infinite where it never has."""
        floor, a_size, size_exponent, a_tokens, tokens_exponent = self.fits_FP.T
        left_F = loss_F - floor - a_size * (size / self.scale[0]) ** -size_exponent
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(left_F > 0, self.scale[1] * (a_tokens / left_F) ** (1 / tokens_exponent), np.inf)


def interval(values_F: np.ndarray) -> Interval:
    """The law's own value, and the middle 95 % of the bootstrap's. What is no number, as infinite over infinite,
    may be anything, and counts at both ends.
    """
    value, draws = float(values_F[0]), values_F[1:]
    low, high = (
        np.quantile(np.where(np.isnan(draws), end, draws), level, method="nearest")
        for end, level in ((-np.inf, 0.025), (np.inf, 0.975))
    )
    return Interval(value, float(low), float(high))


def tokens_ratio_F(base: PowerLaw, ours: PowerLaw, base_size: float, size: float, tokens: float) -> np.ndarray:
    """Tokens that a model of `base` needs to end as low as one of `ours` after `tokens`, over these; infinite where
    none suffice. The two laws are independent.
    """
    return base.tokens_F(base_size, ours.losses_F(size, tokens)) / tokens


def fit_power_law(
    size_R: np.ndarray, tokens_R: np.ndarray, loss_R: np.ndarray, block_R: Sequence[object], seed: int = 0
) -> PowerLaw:
    """Raises ValueError with fewer than three sizes or three token counts: they leave the exponents open."""
    if min(len(np.unique(size_R)), len(np.unique(tokens_R))) < 3:
        raise ValueError("a power law in size and tokens needs three of each")
    scale = tuple(float(np.exp(np.log(of_R).mean())) for of_R in (size_R, tokens_R))
    n_R, d_R = size_R / scale[0], tokens_R / scale[1]
    fit_P = _fit(n_R, d_R, loss_R, (START, START))
    exponents = tuple(np.clip(fit_P[[2, 4]], 1.1 * LOWEST, 0.9 * HIGHEST))
    drawn = _redrawn(_law(fit_P, n_R, d_R), loss_R, block_R, np.random.default_rng(seed))
    return PowerLaw(scale, np.array([fit_P, *(_fit(n_R, d_R, drawn_R, exponents) for drawn_R in drawn)]))


def _redrawn(
    expected_R: np.ndarray, loss_R: np.ndarray, block_R: Sequence[object], generator: np.random.Generator
) -> Iterator[np.ndarray]:
    """Losses of other seeds: every block gets the residuals of one that was drawn, with their sign or the other. A
    fit's residuals are less than the noise: they are made larger by what so many blocks leave free.
    """
    blocks = [np.flatnonzero([other == block for other in block_R]) for block in dict.fromkeys(block_R)]
    spread = np.sqrt(len(blocks) / max(1, len(blocks) - len(PARAMETERS)))
    residual_R = spread * (loss_R - expected_R)
    for _ in range(DRAWS):
        drawn_R = expected_R.copy()
        for rows in blocks:
            other = blocks[generator.integers(len(blocks))]
            drawn_R[rows] += generator.choice([-1, 1]) * residual_R[np.resize(other, len(rows))]
        yield drawn_R


def _law(fit_P: np.ndarray, n_R: np.ndarray, d_R: np.ndarray) -> np.ndarray:
    floor, a_size, size, a_tokens, tokens = fit_P
    return floor + a_size * n_R**-size + a_tokens * d_R**-tokens


def _fit(n_R: np.ndarray, d_R: np.ndarray, loss_R: np.ndarray, start: tuple[float, float]) -> np.ndarray:
    """Least squares over the two exponents: for given ones E, A and B, none negative, are a linear problem."""
    from scipy.optimize import least_squares, nnls

    def linear(exponents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        terms_R3 = np.stack([np.ones_like(n_R), n_R ** -exponents[0], d_R ** -exponents[1]], axis=1)
        return terms_R3, nnls(terms_R3, loss_R)[0]

    def residual_R(exponents: np.ndarray) -> np.ndarray:
        terms_R3, weights = linear(exponents)
        return terms_R3 @ weights - loss_R

    size, tokens = least_squares(residual_R, start, bounds=(LOWEST, HIGHEST)).x
    floor, a_size, a_tokens = linear(np.array([size, tokens]))[1]
    return np.array([floor, a_size, size, a_tokens, tokens])
