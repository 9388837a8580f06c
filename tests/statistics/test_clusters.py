import numpy as np
import pytest

from moepp.statistics.clusters import cluster_error
from moepp.statistics.seeds import NO_ERROR


def test_the_error_of_independent_values_is_that_of_a_mean():
    values = np.array([1.0, 2.0, 3.0, 6.0])
    found = cluster_error(values)
    assert (found.error, found.freedom) == (pytest.approx(values.std(ddof=1) / 2), 3)


def test_of_one_cluster_nothing_is_known():
    assert cluster_error(np.array([1.0, 2.0]), np.array([7, 7])) == NO_ERROR
