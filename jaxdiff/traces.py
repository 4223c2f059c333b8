"""The divergence of a vector field, exactly or by random probes."""

import math
from abc import abstractmethod
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_count, check_key
from jaxdiff._tree import batched


class TraceEstimator(eqx.Module):
    """The divergence of a vector field, exactly or estimated with random probes.

    Probes are drawn once and serve the whole solve, so that the integrand stays smooth. The
    field is linearised once: all products with its Jacobian share one evaluation.
    """

    @property
    @abstractmethod
    def stochastic(self) -> bool:
        """Whether it draws probes."""

    @abstractmethod
    def probes(self, key: PRNGKeyArray | None, w: Array) -> PyTree:
        """What is drawn for the solve of one example.

        Args:
            key: the example's typed key.
            w: a state, `(*event)`, for its shape and dtype.
        """

    @abstractmethod
    def __call__(
        self, f: Callable[[Array], Array], w: Array, probes: PyTree
    ) -> tuple[Array, Array]:
        """The field and its divergence.

        Args:
            f: vector field, `(*event)` to `(*event)`.
            w: the state, `(*event)`.
            probes: what `probes` drew.

        Returns:
            f(w), and estimates of tr(df/dw), `(num_estimates,)`, each unbiased and independent
            of the others given the state.
        """


class ExactTrace(TraceEstimator):
    """tr(J) = sum_i e_i^T J e_i, with as many Jacobian products as dimensions.

    Args:
        chunk: products computed at a time, to bound memory; None for all at once.

    Raises:
        ValueError: if `chunk` < 1.
    """

    chunk: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if self.chunk is not None:
            check_count("chunk", self.chunk, instead="Leave it out for all at once.")

    @property
    def stochastic(self) -> bool:
        """No."""
        return False

    def probes(self, key: PRNGKeyArray | None, w: Array) -> None:
        """Nothing."""
        del key, w

    def __call__(self, f: Callable, w: Array, probes: None) -> tuple[Array, Array]:
        """See `TraceEstimator`; one estimate, the exact value."""
        del probes
        value, product = _linearize(f, w)

        def diagonal(i):
            return product(jnp.zeros(w.size, w.dtype).at[i].set(1.0))[i]

        entries = batched(diagonal, self.chunk)(jnp.arange(w.size))
        return value, jnp.sum(entries, keepdims=True)


_DISTRIBUTIONS = {"rademacher": jax.random.rademacher, "gaussian": jax.random.normal}


class Hutchinson(TraceEstimator):
    """tr(J) = E v^T J v for probes v of unit covariance.

    The variance of one Gaussian probe is 2 ||A||^2, with A = (J + J^T) / 2 and the Frobenius norm;
    that of a Rademacher probe leaves out the diagonal of A, and so is smaller, 0 for a diagonal
    J.

    Args:
        num_probes: number of probes, one estimate each; two or more give a standard error.
        distribution: "rademacher" (entries -1 or 1) or "gaussian".

    Raises:
        ValueError: for `num_probes` < 1 or an unknown distribution.

    Reference: Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud, "FFJORD: Free-form Continuous
    Dynamics for Scalable Reversible Generative Models", 2018, arXiv 1810.01367, equation 8.
    """

    num_probes: int = eqx.field(static=True, default=1)
    distribution: str = eqx.field(static=True, default="rademacher")

    def __check_init__(self):
        check_count("num_probes", self.num_probes)
        if self.distribution not in _DISTRIBUTIONS:
            raise ValueError(
                f'`distribution` must be "rademacher" or "gaussian", got {self.distribution!r}.'
            )

    @property
    def stochastic(self) -> bool:
        """Yes."""
        return True

    def probes(self, key: PRNGKeyArray | None, w: Array) -> Array:
        """The probes, `(num_probes, d)`."""
        assert key is not None  # checked before
        return _DISTRIBUTIONS[self.distribution](key, (self.num_probes, w.size), w.dtype)

    def __call__(self, f: Callable, w: Array, probes: Array) -> tuple[Array, Array]:
        """See `TraceEstimator`; one estimate per probe."""
        value, product = _linearize(f, w)
        return value, jnp.sum(probes * jax.vmap(product)(probes), axis=1)


class HutchPlusPlus(TraceEstimator):
    """Exact on a sketch of the range of J, Hutchinson's estimate on what is left.

    With S and G of k = num_probes / 3 Rademacher probes, Q an orthonormal basis of the range of
    J S and P = I - Q Q^T,

        tr(J) = tr(Q^T J Q) + E g^T P J P g,    g in G.

    Exact for a J of rank up to k, and better than Hutchinson where few eigenvalues dominate;
    where many are alike it is worse than Rademacher probes, because P J P is no longer nearly
    diagonal. S and G are fixed for the whole solve, while Q follows the state. Q is a constant
    to derivatives: the estimate is unbiased whatever Q is, hence its derivative as well (but not
    exact where the value is).

    Args:
        num_probes: products with J per evaluation, a multiple of 3. There are num_probes / 3
            estimates, which share the exact part; two or more give a standard error.

    Raises:
        ValueError: if `num_probes` is not a positive multiple of 3.

    Reference: Meyer, Musco, Musco, Woodruff, "Hutch++: Optimal Stochastic Trace Estimation",
    2020, arXiv 2010.09649, algorithm 1.
    """

    num_probes: int = eqx.field(static=True, default=6)

    def __check_init__(self):
        if self.num_probes < 1 or self.num_probes % 3:
            raise ValueError(
                f"`num_probes` must be a positive multiple of 3, got {self.num_probes}: a third "
                "each for the sketch, its basis and the remainder."
            )

    @property
    def stochastic(self) -> bool:
        """Yes."""
        return True

    def probes(self, key: PRNGKeyArray | None, w: Array) -> Array:
        """S and G, `(2, num_probes / 3, d)`."""
        assert key is not None  # checked before
        return jax.random.rademacher(key, (2, self.num_probes // 3, w.size), w.dtype)

    @jax.default_matmul_precision("highest")
    def __call__(self, f: Callable, w: Array, probes: Array) -> tuple[Array, Array]:
        """See `TraceEstimator`; one estimate per probe of G."""
        sketch, remainder = probes
        value, product = _linearize(f, w)
        products = jax.vmap(product)
        basis = jnp.linalg.qr(jax.lax.stop_gradient(products(sketch)).T)[0].T
        captured = jnp.sum(basis * products(basis))
        remainder -= (remainder @ basis.T) @ basis
        return value, captured + jnp.sum(remainder * products(remainder), axis=1)


def _linearize(f: Callable[[Array], Array], w: Array) -> tuple[Array, Callable[[Array], Array]]:
    """f(w), and the product of its Jacobian with a flat vector `(d,)`."""
    value, product = jax.linearize(f, w)
    return value, lambda v: product(v.reshape(w.shape)).reshape(-1)


def check_probe_key(key: PRNGKeyArray | None, trace: TraceEstimator) -> None:
    """Reject a missing key where probes are drawn.

    Raises:
        TypeError: if `key` is not a typed key.
        ValueError: for an estimator that draws probes, without a key.
    """
    if not trace.stochastic:
        return
    if key is None:
        raise ValueError(
            f"`key` must be given to {type(trace).__name__}, which draws probes, got None. Pass "
            "jax.random.key(seed), or trace=ExactTrace()."
        )
    check_key(key)


def draw_probes(key: PRNGKeyArray | None, trace: TraceEstimator, w: Array) -> PyTree:
    """The probes of an estimator for one example; None for the exact trace.

    Args:
        key: typed PRNG key, or None for the exact trace.
        trace: the estimator.
        w: the example, `(*event)`.

    Returns:
        A pytree of arrays with a leading axis of probes, or None.

    Raises:
        TypeError: as `check_probe_key`.
        ValueError: as `check_probe_key`.
    """
    check_probe_key(key, trace)
    return trace.probes(key if trace.stochastic else None, w)


def standard_error(estimates: Array, stochastic: bool) -> Array:
    """Standard error of the mean of `(num_estimates,)`: 0 if exact, NaN for a single probe."""
    if not stochastic:
        return jnp.zeros((), estimates.dtype)
    count = estimates.shape[0]
    if count == 1:
        return jnp.full((), jnp.nan, estimates.dtype)
    # The square root has no derivative where all probes agree.
    return jax.lax.stop_gradient(estimates.std(ddof=1)) / math.sqrt(count)
