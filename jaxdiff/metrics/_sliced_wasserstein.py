"""The sliced Wasserstein distance."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision
from jaxtyping import Array, Float, PRNGKeyArray, Scalar

from jaxdiff._checks import check_count, check_key, check_number
from jaxdiff.metrics._pair import feature_pair


def sliced_wasserstein(
    key: PRNGKeyArray,
    x: Float[Array, "n *event"],
    y: Float[Array, "m *event"],
    *,
    num_projections: int = 128,
    p: float = 2.0,
) -> Scalar:
    """Sliced p-Wasserstein distance between two empirical distributions.

    (mean over directions theta of W_p(theta.x, theta.y)^p)^(1/p), theta uniform on the sphere; W_p
    on the line is exact for any n and m (see `wasserstein_1d`).

    Args:
        key: typed PRNG key; direction j is drawn from `fold_in(key, j)`.
        x: (n, *event) samples; events are flattened to d numbers.
        y: (m, *event); n and m may differ.
        num_projections: number of directions; the Monte Carlo error falls as its square root.
        p: order, >= 1.

    Returns:
        The distance, a scalar in the units of x.

    Raises:
        ValueError: for events of different shapes, p < 1, or no projections.
        TypeError: if `key` is no typed key.

    Examples:
        >>> x = jax.random.normal(jax.random.key(0), (1000, 1))
        >>> round(float(metrics.sliced_wasserstein(jax.random.key(1), x, x + 2)), 3)
        2.0

    Reference: Rabin, Peyre, Delon, Bernot, "Wasserstein Barycenter and its Application to Texture
    Mixing", 2011; Bonneel, Rabin, Peyre, Pfister, "Sliced and Radon Wasserstein Barycenters of
    Measures", 2015, section 2.
    """
    check_key(key)
    num_projections = check_count("num_projections", num_projections)
    x, y = feature_pair(x, y, minimum=1)

    def direction(index):
        theta = jax.random.normal(jax.random.fold_in(key, index), x.shape[1:], x.dtype)
        return theta / jnp.linalg.norm(theta)

    thetas = jax.vmap(direction)(jnp.arange(num_projections))
    x, y = (jnp.matmul(thetas, sample.T, precision=Precision.HIGHEST) for sample in (x, y))
    cost = jax.vmap(lambda a, b: _transport_cost(a, b, p))(x, y)
    return _root(jnp.mean(cost), p)


def wasserstein_1d(x: Float[Array, "n"], y: Float[Array, "m"], *, p: float = 2.0) -> Scalar:
    """Exact p-Wasserstein distance between two empirical distributions on the line.

    (integral over u in (0, 1) of |F_x^-1(u) - F_y^-1(u)|^p)^(1/p). The quantile functions are
    steps, at i / n and j / m; between two steps of either the integrand is constant.

    Args:
        x: (n,) numbers.
        y: (m,) numbers; n and m may differ.
        p: order, >= 1.

    Returns:
        The distance, a scalar.

    Raises:
        ValueError: for shapes that are not (n,) and (m,), or p < 1.

    Reference: Peyre, Cuturi, "Computational Optimal Transport", 2019, arXiv 1803.00567, remark
    2.30.
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    if jnp.ndim(x) != 1 or jnp.ndim(y) != 1 or len(x) == 0 or len(y) == 0:
        raise ValueError(
            f"`x` and `y` must have the shapes (n,) and (m,), got {jnp.shape(x)} and "
            f"{jnp.shape(y)}. Use sliced_wasserstein for vectors."
        )
    return _root(_transport_cost(x, y, p), p)


def _transport_cost(x: Array, y: Array, p: float) -> Scalar:
    check_number("p", p, least=1.0)
    i, j, mass = _monotone_coupling(len(x), len(y))
    gap = jnp.abs(jnp.sort(x)[i] - jnp.sort(y)[j])
    return jnp.sum(jnp.asarray(mass, gap.dtype) * gap**p)


def _monotone_coupling(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which order statistics meet, and how much mass each pair moves."""
    # In units of 1 / (n m) every step lies on an integer, so that common steps merge exactly.
    steps = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
    return (steps - 1) // m, (steps - 1) // n, np.diff(steps, prepend=0) / (n * m)


def _root(cost: Scalar, p: float) -> Scalar:
    # The root has no slope at 0: a distance of exactly 0 gets the gradient 0, not NaN.
    zero = cost == 0
    return jnp.where(zero, 0, jnp.where(zero, 1, cost) ** (1 / p))
