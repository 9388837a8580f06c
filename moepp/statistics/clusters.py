"""The standard error of a mean over examples that come in clusters, such as the windows of one document."""

import numpy as np

from moepp.statistics.seeds import NO_ERROR, SharedError


def cluster_error(
    value_N: np.ndarray, cluster_N: np.ndarray | None = None, size_N: np.ndarray | None = None
) -> SharedError:
    """Of `sum(value) / sum(size)`, of independent clusters (each example is one unless given, and `size` 1): linear in
    the residuals (Liang and Zeger 1986). Nothing is known of it where all is one cluster: `NO_ERROR`.
    """
    size_N = np.ones(len(value_N)) if size_N is None else size_N
    residual_N = value_N - value_N.sum() / size_N.sum() * size_N
    if cluster_N is not None:
        residual_N = np.bincount(np.unique(cluster_N, return_inverse=True)[1], weights=residual_N)
    count = len(residual_N)
    if count < 2:
        return NO_ERROR
    error = np.sqrt(count / (count - 1) * (residual_N**2).sum()) / size_N.sum()
    return SharedError(float(error), count - 1)
