"""Fidelity and variety by nearest neighbours: precision, recall, density, coverage, copies."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from jaxdiff._checks import check_count, check_number
from jaxdiff._tree import batched
from jaxdiff.metrics._pair import feature_pair, features


class PrecisionRecall(NamedTuple):
    """Precision and recall, of `precision_recall`."""

    precision: Scalar
    recall: Scalar


class DensityCoverage(NamedTuple):
    """Density and coverage, of `density_coverage`."""

    density: Scalar
    coverage: Scalar


def precision_recall(
    samples: Float[Array, "n *event"],
    reference: Float[Array, "m *event"],
    *,
    k: int = 3,
    block_size: int | None = None,
) -> PrecisionRecall:
    """How many samples lie where data are, and how many data where samples are.

    Precision is the share of samples in a closed ball around some example of the reference, with
    the distance to its k-th nearest neighbour as radius; recall is the same the other way round.

    Args:
        samples: (n, *event) generated features, n > k.
        reference: (m, *event) features of real examples, m > k.
        k: which neighbour, itself not counted.
        block_size: rows of distances in memory at once; None for all.

    Returns:
        Two scalars in [0, 1]. For equal laws they are below 1, and depend on n, m and the
        dimension: compare figures of equal sizes alone. An outlier has a large ball.

    Raises:
        ValueError: for too few samples, events of different shapes, or numbers that are not finite.

    Reference: Kynkaanniemi, Karras, Laine, Lehtinen, Aila, "Improved Precision and Recall Metric
    for Assessing Generative Models", 2019, arXiv 1904.06991, eqs. 1 and 2.
    """
    y, x = feature_pair(samples, reference, minimum=check_count("k", k) + 1)

    def share(rows, centres):
        radii = _radii(centres, k, block_size)

        def covered(row):
            return jnp.any(_distances(row, centres) <= radii)

        return jnp.mean(batched(covered, block_size)(rows), dtype=rows.dtype)

    return PrecisionRecall(share(y, x), share(x, y))


def density_coverage(
    samples: Float[Array, "n *event"],
    reference: Float[Array, "m *event"],
    *,
    k: int = 5,
    block_size: int | None = None,
) -> DensityCoverage:
    """How many balls of data a sample lies in, and how many balls hold a sample.

    Balls are open, around examples of the reference, with the distance to their k-th nearest
    neighbour as radius. Density is the mean number of balls around a sample over k, coverage the
    share of balls with a sample. For equal laws E density = 1 and E coverage is
    1 - prod_{j=1..k} (n - j) / (2 n - j), nearly 1 - 2^-k, in any dimension.

    Args:
        samples: (n, *event) generated features, at least one.
        reference: (m, *event) features of real examples, m > k.
        k: which neighbour, itself not counted.
        block_size: as in `precision_recall`.

    Returns:
        Two scalars >= 0; density may exceed 1.

    Raises:
        ValueError: as `precision_recall`.

    Reference: Naeem, Oh, Uh, Choi, Yoo, "Reliable Fidelity and Diversity Metrics for Generative
    Models", 2020, arXiv 2002.09797, eqs. 3 and 6.
    """
    y, x = (
        features("samples", samples),
        features("reference", reference, minimum=check_count("k", k) + 1),
    )
    feature_pair(y[:1], x[:1], minimum=1)
    radii = _radii(x, k, block_size)

    def balls(row):
        return jnp.sum(_distances(row, x) < radii, dtype=x.dtype)

    density = jnp.mean(batched(balls, block_size)(y)) / k
    nearest = _nearest(x, y, 1, block_size)[:, 0]
    return DensityCoverage(density, jnp.mean(nearest < radii, dtype=x.dtype))


def copied_share(
    samples: Float[Array, "n *event"],
    training: Float[Array, "m *event"],
    *,
    ratio: float = 1 / 3,
    block_size: int | None = None,
) -> Scalar:
    """The share of samples far nearer to one training example than to any other: memorisation.

    d1 / d2 < ratio, for the distances to the two nearest training examples. A smooth law of
    intrinsic dimension d gives ratio^d by chance, much in few dimensions: compare with the same
    figure of held-out real examples. Of duplicates among the training examples it sees nothing.

    Args:
        samples: (n, *event) generated samples or features.
        training: (m, *event) what was trained on, m >= 2.
        ratio: of distances, not of their squares; in (0, 1).
        block_size: as in `precision_recall`.

    Returns:
        The share, a scalar in [0, 1].

    Raises:
        ValueError: as `precision_recall`.

    Reference: Yoon, Choi, Kwon, Ryu, "Diffusion Probabilistic Models Generalize when They Fail to
    Memorize", 2023, section 3; the ratio is theirs.
    """
    check_number("ratio", ratio, above=0.0, below=1.0)
    y, x = features("samples", samples), features("training", training, minimum=2)
    feature_pair(y[:1], x[:1], minimum=1)
    nearest = _nearest(y, x, 2, block_size)
    return jnp.mean(nearest[:, 0] < ratio**2 * nearest[:, 1], dtype=y.dtype)


def _distances(u: Array, y: Array) -> Array:
    """|u - y_j|^2 for each row of y."""
    # By differences: the form with a product loses those within clusters that are far apart.
    return jnp.sum((u - y) ** 2, 1)


def _radii(x: Array, k: int, block_size: int | None) -> Array:
    """Squared distance to the k-th nearest of the others."""
    return _nearest(x, x, k, block_size, same=True)[:, -1]


def _nearest(x: Array, y: Array, k: int, block_size: int | None, same: bool = False) -> Array:
    """Squared distances to the k nearest rows of y, ascending, (n, k); not to itself."""

    def row(i, u):
        distances = _distances(u, y)
        if same:
            distances = jnp.where(jnp.arange(len(y)) == i, jnp.inf, distances)
        return -jax.lax.top_k(-distances, k)[0]

    return batched(row, block_size)(jnp.arange(len(x)), x)
