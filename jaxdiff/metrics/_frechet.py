"""The Frechet distance between Gaussians, given by samples or by their moments."""

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float, Scalar

from jaxdiff.metrics._pair import feature_pair


def frechet_distance(x: Float[Array, "n *event"], y: Float[Array, "m *event"]) -> Scalar:
    """Squared 2-Wasserstein distance between the Gaussians fitted to two samples; FID on features.

    |mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2), with unbiased covariances C.

    Samples may be fewer than dimensions. No covariance is formed (see
    `frechet_distance_gaussian`): its factors come from a QR decomposition of the centred
    samples, so that float32 resolves distances far below eps * tr C.

    Args:
        x: (n, *event) samples or features, n >= 2; events are flattened to d numbers.
        y: (m, *event), m >= 2.

    Returns:
        The distance, >= 0. Like every such estimate it is biased upwards, by O(1/n): compare
        figures of equal n and m only.

    Raises:
        ValueError: for too few samples, or events of different shapes.

    Examples:
        >>> x = jax.random.normal(jax.random.key(0), (1000, 4))
        >>> bool(metrics.frechet_distance(x, x + 1) > 3.9)  # the mean moves by 1 in each of 4 axes
        True

    Reference: Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter, "GANs Trained by a Two
    Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017, arXiv 1706.08500, eq. 6;
    the bias: Chong, Forsyth, "Effectively Unbiased FID and Inception Score and where to find
    them", 2019, arXiv 1911.07023.
    """
    x, y = feature_pair(x, y, minimum=2)
    (mean1, factor1), (mean2, factor2) = _moments(x), _moments(y)
    return jnp.sum((mean1 - mean2) ** 2) + _bures(factor1, factor2)


def frechet_distance_gaussian(
    mu1: Float[Array, "d"],
    cov1: Float[Array, "d d"],
    mu2: Float[Array, "d"],
    cov2: Float[Array, "d d"],
) -> Scalar:
    """Squared 2-Wasserstein distance between N(mu1, cov1) and N(mu2, cov2).

    With C1 = A A^T and C2 = B B^T the covariance term is min_Q |A - B Q|_F^2 over orthogonal Q
    (a Procrustes problem, solved by one SVD of B^T A). In that form it is a sum of squares: never
    negative, without cancellation for nearly equal laws, and without square roots of eigenvalues
    that are rounding errors. The textbook trace loses half the digits to each.

    Args:
        mu1: (d,) mean.
        cov1: (d, d) symmetric positive semi-definite covariance; may be singular.
        mu2: (d,) mean.
        cov2: (d, d) covariance.

    Returns:
        The distance, >= 0.

    Raises:
        ValueError: for shapes that do not match.

    Reference: Dowson, Landau, "The Frechet distance between multivariate normal distributions",
    1982; the Procrustes form: Bhatia, Jain, Lim, "On the Bures-Wasserstein distance between
    positive definite matrices", 2017, arXiv 1712.01504, theorem 1.
    """
    mu1, cov1, mu2, cov2 = (jnp.asarray(a) for a in (mu1, cov1, mu2, cov2))
    shapes = [jnp.shape(a) for a in (mu1, cov1, mu2, cov2)]
    d = shapes[0][0] if len(shapes[0]) == 1 else None
    if d is None or shapes != [(d,), (d, d)] * 2:
        raise ValueError(
            "`mu1, cov1, mu2, cov2` must have the shapes (d,), (d, d), (d,), (d, d), got "
            f"{', '.join(map(str, shapes))}. Pass full covariance matrices of equal size."
        )
    return jnp.sum((mu1 - mu2) ** 2) + _bures(_factor(cov1), _factor(cov2))


def _moments(x: Array) -> tuple[Array, Array]:
    """Mean, and A with A A^T the unbiased covariance: (d, min(n, d))."""
    mean = jnp.mean(x, 0)
    mean = mean + jnp.mean(x - mean, 0)  # a second pass removes what the long sum rounded away
    centred = (x - mean) / (len(x) - 1) ** 0.5
    if len(x) > x.shape[1]:
        # X^T Q has the derivatives that R has, and has them where a feature is constant, too.
        basis = jax.lax.stop_gradient(jnp.linalg.qr(centred)[0])
        centred = jnp.matmul(basis.T, centred, precision=Precision.HIGHEST)
    return mean, centred.T


def _factor(cov: Array) -> Array:
    """A with A A^T = cov; eigenvalues below the rounding error of the largest count as 0."""
    values, vectors = jnp.linalg.eigh(cov)
    floor = len(cov) * jnp.finfo(values.dtype).eps * values[-1]
    return vectors * jnp.sqrt(jnp.where(values > floor, values, 0))


def _bures(a: Array, b: Array) -> Scalar:
    """min_Q |a - b Q|_F^2, over Q with orthonormal rows or columns, for (d, p) and (d, q)."""
    width = max(a.shape[1], b.shape[1])
    a, b = (jnp.pad(m, ((0, 0), (0, width - m.shape[1]))) for m in (a, b))
    u, _, vt = jnp.linalg.svd(jnp.matmul(b.T, a, precision=Precision.HIGHEST))
    # At the minimum the distance is stationary in Q: a constant Q gives the exact gradient.
    rotation = jax.lax.stop_gradient(jnp.matmul(u, vt, precision=Precision.HIGHEST))
    return jnp.sum((a - jnp.matmul(b, rotation, precision=Precision.HIGHEST)) ** 2)
