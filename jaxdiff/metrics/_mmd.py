"""Maximum mean discrepancy, and its kernels."""

from abc import abstractmethod

import equinox as eqx
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float, Scalar

from jaxdiff._checks import check_count, check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.metrics._pair import feature_pair


class Kernel(eqx.Module):
    """A positive definite kernel on vectors."""

    @abstractmethod
    def __call__(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
        """The Gram matrix k(x_i, y_j)."""


class Polynomial(Kernel):
    """k(u, v) = (gamma u.v + offset)^degree; the defaults are those of KID.

    Args:
        degree: integer >= 1.
        gamma: > 0; 1 / d if None.
        offset: >= 0.

    Reference: Binkowski, Sutherland, Arbel, Gretton, "Demystifying MMD GANs", 2018, arXiv
    1801.01401, section 4.
    """

    degree: int = eqx.field(default=3, static=True)
    gamma: Number | None = number(None)
    offset: Number = number(1.0)

    def __check_init__(self):
        check_count("degree", self.degree)
        check_number("gamma", self.gamma, above=0.0)
        check_number("offset", self.offset, least=0.0)

    def __call__(self, x: Array, y: Array) -> Array:
        """The Gram matrix."""
        gamma = 1 / x.shape[1] if self.gamma is None else self.gamma
        # The differences that matter are a thousandth of the entries: no TF32 or bfloat16 here.
        products = jnp.matmul(x, y.T, precision=Precision.HIGHEST)
        return (gamma * products + self.offset) ** self.degree


class RBF(Kernel):
    """k(u, v) = exp(-|u - v|^2 / (2 bandwidth^2)).

    Args:
        bandwidth: > 0; `median_bandwidth(x, y)` is a usual choice.

    Reference: Gretton, Borgwardt, Rasch, Schoelkopf, Smola, "A Kernel Two-Sample Test", 2012,
    JMLR 13.
    """

    bandwidth: Number = number(1.0)

    def __check_init__(self):
        check_number("bandwidth", self.bandwidth, above=0.0)

    def __call__(self, x: Array, y: Array) -> Array:
        """The Gram matrix."""
        return jnp.exp(-_squared_distances(x, y) / (2 * self.bandwidth**2))


def median_bandwidth(x: Float[Array, "n *event"], y: Float[Array, "m *event"]) -> Scalar:
    """The median distance between two different points of the pooled samples.

    Args:
        x: (n, *event).
        y: (m, *event).

    Returns:
        The bandwidth, a scalar.

    Raises:
        ValueError: for events of different shapes.

    Reference: Gretton et al., "A Kernel Two-Sample Test", 2012, JMLR 13, section 8.
    """
    pooled = jnp.concatenate(feature_pair(x, y, minimum=1))
    pairs = jnp.triu_indices(len(pooled), 1)
    return jnp.median(jnp.sqrt(_squared_distances(pooled, pooled)[pairs]))


def mmd2_unbiased(
    x: Float[Array, "n *event"], y: Float[Array, "m *event"], kernel: Kernel = Polynomial()
) -> Scalar:
    """Unbiased estimate of the squared MMD (a U-statistic); may be negative.

    sum_{i != j} k(x_i, x_j) / (n (n - 1)) + the same for y - 2 mean_ij k(x_i, y_j).

    Args:
        x: (n, *event) samples or features, n >= 2; events are flattened.
        y: (m, *event), m >= 2.
        kernel: with the default, and Inception features, this is KID on one block.

    Returns:
        The estimate, a scalar. Memory is that of the three Gram matrices.

    Raises:
        ValueError: for too few samples, or events of different shapes.

    Examples:
        >>> x, y = jax.random.normal(jax.random.key(0), (2, 500, 3))
        >>> kernel = metrics.RBF(metrics.median_bandwidth(x, y))
        >>> bool(abs(metrics.mmd2_unbiased(x, y, kernel)) < 0.01)
        True

    Reference: Gretton et al., "A Kernel Two-Sample Test", 2012, JMLR 13, lemma 6.
    """
    check_kind("kernel", kernel, Kernel, "Polynomial()")
    x, y = feature_pair(x, y, minimum=2)
    xx, yy, xy = _shifted_grams(kernel, x, y)
    return _mean_off_diagonal(xx) + _mean_off_diagonal(yy) - 2 * _mean(xy)


def mmd2_biased(
    x: Float[Array, "n *event"], y: Float[Array, "m *event"], kernel: Kernel = Polynomial()
) -> Scalar:
    """Squared MMD of the two empirical distributions (a V-statistic), >= 0 up to rounding.

    mean_ij k(x_i, x_j) + mean_ij k(y_i, y_j) - 2 mean_ij k(x_i, y_j).

    Args:
        x: (n, *event) samples or features; events are flattened.
        y: (m, *event).
        kernel: a positive definite kernel.

    Returns:
        The squared MMD, a scalar, 0 for x = y. Memory is that of the three Gram matrices.

    Raises:
        ValueError: for no samples, or events of different shapes.

    Reference: Gretton et al., "A Kernel Two-Sample Test", 2012, JMLR 13, eq. 5.
    """
    check_kind("kernel", kernel, Kernel, "Polynomial()")
    x, y = feature_pair(x, y, minimum=1)
    xx, yy, xy = _shifted_grams(kernel, x, y)
    return _mean(xx) + _mean(yy) - 2 * _mean(xy)


def _shifted_grams(kernel: Kernel, x: Array, y: Array) -> tuple[Array, Array, Array]:
    # A constant added to the kernel changes no MMD; without its mean the sums round less.
    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    shift = _mean(xy)
    return xx - shift, yy - shift, xy - shift


def _mean(gram: Array) -> Scalar:
    return jnp.mean(jnp.mean(gram, 1))


def _mean_off_diagonal(gram: Array) -> Scalar:
    n = len(gram)
    return jnp.sum(jnp.mean(jnp.where(jnp.eye(n, dtype=bool), 0, gram), 1)) / (n - 1)


def _squared_distances(x: Array, y: Array) -> Array:
    # |u|^2 + |v|^2 - 2 u.v cancels for points far from the origin: move it to their centre.
    centre = jnp.mean(y, 0)
    x, y = x - centre, y - centre
    products = jnp.matmul(x, y.T, precision=Precision.HIGHEST)
    return jnp.maximum(jnp.sum(x**2, 1)[:, None] + jnp.sum(y**2, 1) - 2 * products, 0)
