import numpy as np
import pytest

from moepp.statistics.power_law import fit_power_law, tokens_ratio


def runs(noise):
    size, tokens = (of.ravel() for of in np.meshgrid([1e5, 2e5, 4e5, 8e5], [1e6, 2e6, 4e6], indexing="ij"))
    loss = 1.7 + 2.0 * (size / 1e5) ** -0.3 + 1.5 * (tokens / 1e6) ** -0.4
    return size, tokens, loss + np.random.default_rng(0).normal(0, noise, len(loss)), size


def test_a_held_out_size_is_predicted():
    found = fit_power_law(*runs(noise=0.0)).loss(1.6e6, 4e6)
    truth = 1.7 + 2.0 * 16**-0.3 + 1.5 * 4**-0.4
    assert found.value == pytest.approx(truth, abs=0.01)


def test_intervals_widen_with_the_distance():
    law = fit_power_law(*runs(noise=0.005))
    near, far = law.loss(4e5, 2e6), law.loss(4e8, 2e9)
    assert near.low < near.value < near.high and far.high - far.low > 5 * (near.high - near.low)


def test_two_sizes_leave_the_exponents_open():
    size, tokens, loss, block = runs(noise=0.0)
    kept = size < 3e5
    with pytest.raises(ValueError, match="three of each"):
        fit_power_law(size[kept], tokens[kept], loss[kept], block[kept])


def test_tokens_at_equal_loss():
    size, tokens, loss, block = runs(noise=0.0)
    base, ours = fit_power_law(size, tokens, loss, block), fit_power_law(size, tokens / 1.3, loss, block)
    assert tokens_ratio(base, ours, 4e5, 4e5, 2e6).value == pytest.approx(1.3, rel=1e-3)
