"""Kernels on vectors, and the distances and bandwidths they share."""

import math
from abc import abstractmethod
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from jaxdiff._checks import check_count, check_key, check_kind, check_number
from jaxdiff._tree import Number, dots, number
from jaxdiff.metrics._pair import feature_pair


class Kernel(eqx.Module):
    """A kernel on vectors: positive definite, or so up to constants, as `Energy` is."""

    @abstractmethod
    def __call__(self, x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
        """The Gram matrix k(x_i, y_j)."""


class FiniteKernel(Kernel):
    """A kernel k(u, v) = phi(u).phi(v) with finitely many features, never formed for a row.

    The mean of phi over a law, its `moments`, is all that the kernel sees of it; see
    `mean_embedding`.
    """

    @abstractmethod
    def moments(self, x: Float[Array, "n d"]) -> PyTree:
        """Means over the rows, of which phi's mean is made; batches of them average."""

    @abstractmethod
    def against(self, x: Float[Array, "n d"], moments: PyTree) -> Float[Array, "n"]:
        """E_y k(x_i, y) for the law of these moments."""

    @abstractmethod
    def product(self, moments: PyTree, others: PyTree) -> Scalar:
        """E k(x, y) for two laws of these moments, x and y independent."""


class Polynomial(FiniteKernel):
    """k(u, v) = (gamma u.v + offset)^degree; the defaults are those of KID.

    Its moments are E[x], E[x (x) x], ..., `d^degree` numbers: use `mean_embedding` where that is
    small.

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

    def _gamma(self, dimension: int) -> Number:
        return 1 / dimension if self.gamma is None else self.gamma

    def __call__(self, x: Array, y: Array) -> Array:
        """The Gram matrix."""
        return (self._gamma(x.shape[1]) * dots(x, y.T) + self.offset) ** self.degree

    def moments(self, x: Array) -> tuple[Array, ...]:
        """E[x], E[x (x) x], ..., each of shape (d,) * order."""
        found, power = [], jnp.ones((len(x), 1), x.dtype)
        for order in range(1, self.degree + 1):
            found.append((dots(power.T, x) / len(x)).reshape((x.shape[1],) * order))
            if order < self.degree:
                power = (power[:, :, None] * x[:, None, :]).reshape(len(x), -1)
        return tuple(found)

    def against(self, x: Array, moments: tuple[Array, ...]) -> Array:
        """E_y k(x_i, y)."""
        n, d = x.shape
        terms = [jnp.ones(n, x.dtype)]
        for moment in moments:
            rest = dots(x, moment.reshape(d, -1))
            while rest.shape[1] > 1:
                rest = jnp.sum(x[:, :, None] * rest.reshape(n, d, -1), 1)
            terms.append(rest[:, 0])
        return self._binomial(terms, d)

    def product(self, moments: tuple[Array, ...], others: tuple[Array, ...]) -> Scalar:
        """E k(x, y)."""
        terms = [jnp.ones((), moments[0].dtype)]
        terms += [jnp.sum(a * b) for a, b in zip(moments, others, strict=True)]
        return self._binomial(terms, len(moments[0]))

    def _binomial(self, terms: Sequence[Array], dimension: int) -> Array:
        """E (gamma u.v + offset)^degree, of the means of the powers of u.v."""
        gamma, p = self._gamma(dimension), self.degree
        return sum(
            math.comb(p, j) * gamma**j * self.offset ** (p - j) * term
            for j, term in enumerate(terms)
        )  # type: ignore[return-value]


class RBF(Kernel):
    """k(u, v) = exp(-|u - v|^2 / (2 bandwidth^2)).

    Args:
        bandwidth: > 0; `median_bandwidth(x, y)` is a usual choice, `multi_rbf` takes several.

    Reference: Gretton, Borgwardt, Rasch, Schoelkopf, Smola, "A Kernel Two-Sample Test", 2012,
    JMLR 13.
    """

    bandwidth: Number = number(1.0)

    def __check_init__(self):
        check_number("bandwidth", self.bandwidth, above=0.0)

    def __call__(self, x: Array, y: Array) -> Array:
        """The Gram matrix."""
        return jnp.exp(-squared_distances(x, y) / (2 * self.bandwidth**2))


class RationalQuadratic(Kernel):
    """k(u, v) = (1 + |u - v|^2 / (2 alpha bandwidth^2))^-alpha: `RBF`s of all bandwidths.

    With alpha = 1/2 it is the inverse multiquadric, 1 / sqrt(1 + |u - v|^2 / bandwidth^2).

    Args:
        bandwidth: > 0.
        alpha: > 0; the smaller, the heavier the tails.

    Reference: Binkowski, Sutherland, Arbel, Gretton, "Demystifying MMD GANs", 2018, arXiv
    1801.01401, section 4.
    """

    bandwidth: Number = number(1.0)
    alpha: Number = number(1.0)

    def __check_init__(self):
        check_number("bandwidth", self.bandwidth, above=0.0)
        check_number("alpha", self.alpha, above=0.0)

    def __call__(self, x: Array, y: Array) -> Array:
        """The Gram matrix."""
        ratio = squared_distances(x, y) / (2 * self.alpha * self.bandwidth**2)
        return jnp.exp(-self.alpha * jnp.log1p(ratio))


class Energy(Kernel):
    """k(u, v) = -|u - v|^power, whose squared MMD is the energy distance.

    2 E|x - y| - E|x - x'| - E|y - y'| for power 1. No bandwidth is to be chosen. Negative, and
    positive definite up to constants alone: good for all that compares two laws, not for the
    Vendi score.

    Args:
        power: in (0, 2).

    Reference: Sejdinovic, Sriperumbudur, Gretton, Fukumizu, "Equivalence of distance-based and
    RKHS-based statistics in hypothesis testing", 2013, arXiv 1207.6076, section 3.
    """

    power: Number = number(1.0)

    def __check_init__(self):
        check_number("power", self.power, above=0.0, below=2.0)

    def __call__(self, x: Array, y: Array) -> Array:
        """The Gram matrix."""
        squares = squared_distances(x, y)
        # Where two points are one the distance has no derivative: 0, as between symmetric ones.
        apart = ~(squares <= 0)  # NaN is, too
        return -jnp.where(apart, jnp.where(apart, squares, 1.0) ** (self.power / 2), 0.0)


class Mixture(Kernel):
    """k = sum_i weight_i k_i.

    Args:
        kernels: any.
        weights: >= 0, one for each; all 1 / count if None.
    """

    kernels: tuple[Kernel, ...]
    weights: tuple[float | Array, ...] | None = None

    def __check_init__(self):
        for kernel in self.kernels:
            check_kind("kernels", kernel, Kernel, "(RBF(1.0), RBF(2.0))")
        counts = len(self.kernels), len(self.weights or self.kernels)
        if not counts[0] == counts[1] > 0:
            raise ValueError(
                f"`weights` must be one for each of the kernels, at least one, got {counts[1]} for "
                f"{counts[0]}."
            )

    def __call__(self, x: Array, y: Array) -> Array:
        """The Gram matrix."""
        weights = self.weights or (1 / len(self.kernels),) * len(self.kernels)
        grams = (kernel(x, y) for kernel in self.kernels)
        return sum(w * gram for w, gram in zip(weights, grams, strict=True))  # type: ignore[return-value]


def multi_rbf(
    bandwidth: float | Array, factors: Sequence[float] = (0.25, 0.5, 1.0, 2.0, 4.0)
) -> Mixture:
    """The mean of `RBF` kernels of several bandwidths, for laws of unknown scale.

    Args:
        bandwidth: the middle one, e.g. `median_bandwidth(x, y)`.
        factors: of each kernel's bandwidth.

    Returns:
        A `Mixture`.

    Reference: Li, Swersky, Zemel, "Generative Moment Matching Networks", 2015, arXiv 1502.02761,
    section 3.
    """
    return Mixture(tuple(RBF(bandwidth * factor) for factor in factors))


class RandomFeatures(FiniteKernel):
    """k(u, v) = mean_i cos(w_i.(u - v)): an `RBF` kernel from random frequencies, in linear time.

    The error of a kernel value is O(1 / sqrt(count)), the same for all pairs of one draw. The
    MMD that it gives is 0 for some different laws, and that of an RBF kernel on average.

    Args:
        frequencies: (d, count); `RandomFeatures.draw` makes them.

    Reference: Rahimi, Recht, "Random Features for Large-Scale Kernel Machines", 2007, algorithm 1.
    """

    frequencies: Float[Array, "d count"]

    @classmethod
    def draw(
        cls, key: PRNGKeyArray, dimension: int, count: int = 1024, *, bandwidth: float | Array = 1.0
    ) -> "RandomFeatures":
        """Frequencies of `RBF(bandwidth)`: normal, of standard deviation 1 / bandwidth.

        Args:
            key: typed key.
            dimension: d of the vectors.
            count: of frequencies.
            bandwidth: > 0.

        Returns:
            The kernel.
        """
        check_key(key)
        check_number("bandwidth", bandwidth, above=0.0)
        shape = (check_count("dimension", dimension), check_count("count", count))
        return cls(jax.random.normal(key, shape) / bandwidth)

    def __call__(self, x: Array, y: Array) -> Array:
        """The Gram matrix."""
        return dots(self._features(x), self._features(y).T)

    def moments(self, x: Array) -> Array:
        """The mean features, (2 * count,)."""
        return jnp.mean(self._features(x), 0)

    def against(self, x: Array, moments: Array) -> Array:
        """E_y k(x_i, y)."""
        return dots(self._features(x), moments)

    def product(self, moments: Array, others: Array) -> Scalar:
        """E k(x, y)."""
        return jnp.sum(moments * others)

    def _features(self, x: Array) -> Array:
        angles = dots(x, self.frequencies.astype(x.dtype))
        waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], 1)
        return waves / self.frequencies.shape[1] ** 0.5


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
    return jnp.median(jnp.sqrt(squared_distances(pooled, pooled)[pairs]))


def squared_distances(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """|x_i - y_j|^2."""
    # |u|^2 + |v|^2 - 2 u.v cancels for points far from the origin: move it to their centre.
    centre = jnp.mean(y, 0)
    x, y = x - centre, y - centre
    squares = jnp.sum(x**2, 1)[:, None] + jnp.sum(y**2, 1) - 2 * dots(x, y.T)
    return jnp.maximum(squares, 0)
