"""Errors of metrics: by resampling, by blocks, and the bias of Frechet distances at small n."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from jaxdiff._checks import check_count, check_key, check_number
from jaxdiff.metrics._frechet import frechet_distance
from jaxdiff.metrics._pair import feature_pair


def bootstrap(
    key: PRNGKeyArray,
    statistic: Callable[..., PyTree],
    *samples: Array,
    count: int = 100,
    batch_size: int | None = 1,
) -> PyTree:
    """A statistic of one or several independent samples, on resamples of them.

    Each resample draws every sample anew from itself, with replacement: which rows, `key`, `count`
    and the sizes of the samples alone decide. Statistics that look at pairs of examples see some
    of them twice: a bias of the values, which their spread hardly feels.

    Two methods whose samples have the same noise row by row, and the same reference, are compared
    pair by pair: the values of both under one key, and the spread of their differences, which is
    free of what both have in common.

    Args:
        key: typed key.
        statistic: of the samples, a number or a pytree of numbers.
        *samples: (n, *event) each, of any sizes.
        count: of resamples, 2 at least.
        batch_size: of resamples computed at a time; None for all at once.

    Returns:
        (count,) values, for each leaf of the statistic's structure.

    Raises:
        TypeError: if `key` is not a typed key.

    Reference: Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979.
    """
    check_key(key)
    check_count("count", count, least=2)

    def one(key, *samples):
        keys = jax.random.split(key, len(samples))
        drawn = [
            sample[jax.random.randint(key, (len(sample),), 0, len(sample))]
            for key, sample in zip(keys, samples, strict=True)
        ]
        return statistic(*drawn)

    @jax.jit
    def every(keys, *samples):
        return jax.lax.map(lambda key: one(key, *samples), keys, batch_size=batch_size or count)

    return every(jax.random.split(key, count), *map(jnp.asarray, samples))


def bootstrap_error(
    key: PRNGKeyArray,
    statistic: Callable[..., PyTree],
    *samples: Array,
    count: int = 100,
    batch_size: int | None = 1,
) -> PyTree:
    """Standard error of a statistic of one or several independent samples, by resampling them.

    For U-statistics of kernels there is `mmd2_variance`.

    Args:
        key: typed key.
        statistic: of the samples, a number or a pytree of numbers.
        *samples: (n, *event) each, of any sizes.
        count: of resamples.
        batch_size: of resamples computed at a time; None for all at once.

    Returns:
        The spread of `bootstrap`'s values, of the statistic's structure.

    Raises:
        TypeError: if `key` is not a typed key.

    Reference: Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979.
    """
    values = bootstrap(key, statistic, *samples, count=count, batch_size=batch_size)
    return jax.tree.map(lambda value: jnp.std(value, 0, ddof=1), values)


class FrechetLimit(NamedTuple):
    """A Frechet distance extrapolated to infinitely many samples, and what it was taken from."""

    distance: Scalar
    error: Scalar
    counts: np.ndarray
    distances: Array


def frechet_limit(
    key: PRNGKeyArray,
    samples: Float[Array, "n *event"],
    reference: Float[Array, "m *event"],
    *,
    num_counts: int = 8,
    least: float = 0.25,
) -> FrechetLimit:
    """The Frechet distance without its bias in the number of samples (FID-infinity).

    Distances of the first N of the shuffled samples, N from `least * n` to n in equal steps of
    1 / N, and a line a + b / N through them: a. Of two samples of one d-dimensional standard
    normal law the bias is nearly d / N + d (d + 1) / (4 N); it is linear in 1 / N for N well above
    d alone. The reference is not extrapolated: give it as many examples as there are.

    Args:
        key: typed key; shuffles.
        samples: (n, *event) generated features, n well above 4 d.
        reference: (m, *event) features of real examples.
        num_counts: of different N, at least 3.
        least: the smallest N, as a share of n, in (0, 1).

    Returns:
        The limit a and its standard error by the scatter about the line, which overlapping samples
        make too small; the counts and their distances.

    Raises:
        ValueError: as `frechet_distance`.

    Reference: Chong, Forsyth, "Effectively Unbiased FID and Inception Score and where to find
    them", 2020, arXiv 1911.07023, section 3.1; N equally far in 1 / N here, in N there.
    """
    check_key(key)
    check_count("num_counts", num_counts, least=3)
    check_number("least", least, above=0.0, below=1.0)
    x, y = feature_pair(samples, reference, minimum=8)
    x = x[jax.random.permutation(key, len(x))]
    inverse = np.linspace(1 / (least * len(x)), 1 / len(x), num_counts)
    counts = np.maximum(np.round(1 / inverse).astype(int), 2)
    distances = jnp.stack([frechet_distance(x[:count], y) for count in counts])
    design = np.stack([np.ones(num_counts), 1 / counts], 1)
    inverse_gram = np.linalg.inv(design.T @ design)
    line = inverse_gram @ (design.T @ np.asarray(distances, float))
    spread = np.asarray(distances, float) - design @ line
    error = (spread @ spread / (num_counts - 2) * inverse_gram[0, 0]) ** 0.5
    dtype = distances.dtype
    return FrechetLimit(jnp.asarray(line[0], dtype), jnp.asarray(error, dtype), counts, distances)
