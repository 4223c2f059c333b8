"""Conservativity and gauge freedom: what of a score is not a gradient, and what of that matters.

Reference: Horvat, Pfister, "On Gauge Freedom, Conservativity and Intrinsic Dimensionality
Estimation in Diffusion Models", 2024, arXiv 2402.03845.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_key
from jaxdiff._tree import jit
from jaxdiff.denoiser import Denoiser
from jaxdiff.geometry._jacobian import Jacobian
from jaxdiff.geometry._score_jacobian import Estimate
from jaxdiff.predictions import Score
from jaxdiff.traces import ExactTrace, TraceEstimator, draw_probes, standard_error


@jit
def _asymmetry(key, f, x, *, num_probes, chunk):
    jacobian = Jacobian(f, x, chunk=chunk)
    if jacobian.in_size != jacobian.out_size:
        raise ValueError(
            f"`f` must be a vector field, with as many outputs as inputs, got {jacobian.in_size} "
            f"inputs and {jacobian.out_size} outputs."
        )
    probes = jax.random.rademacher(key, (jacobian.in_size, num_probes), jacobian.dtype)
    forward, backward = jacobian.forward(probes), jacobian.backward(probes)
    difference = jnp.sum((forward - backward) ** 2, axis=0)
    total = jnp.sum(forward**2 + backward**2, axis=0)
    value = difference.sum() / total.sum()
    # The error of a ratio of means, to first order.
    error = standard_error((difference - value * total) / total.mean(), stochastic=True)
    return Estimate(value, error)


def asymmetry(
    key: PRNGKeyArray,
    f: Callable[[PyTree], PyTree],
    x: PyTree,
    *,
    num_probes: int = 8,
    chunk: int | None = None,
) -> Estimate:
    """How far a field is from a gradient at x: ||J - J^T||^2 / (2 ||J||^2), J = df/dx.

        E ||J v - J^T v||^2 / E (||J v||^2 + ||J^T v||^2),  v of independent signs

    in the Frobenius norm: 0 for symmetric, 1 for triangular with zeros on the diagonal, 2 for
    antisymmetric J; twice the share of the antisymmetric part in ||J||^2; NaN for J = 0.
    Conservative fields have 0 everywhere. Each probe costs one product either way.

    The score's Jacobian holds -I / sigma^2, which hides asymmetry at low noise: compare models by
    the Jacobian of their denoiser.

    Args:
        key: typed PRNG key.
        f: vector field; compiled anew for each plain function, but not for new arrays in an
            `equinox.Module` such as `ScaledDenoiser`.
        x: where, `(*event)` or a pytree.
        num_probes: number of probes; two or more give a standard error.
        chunk: products computed at a time, to bound memory; None for all at once.

    Returns:
        An `Estimate`. As a ratio of means, its bias falls as 1 / num_probes.

    Raises:
        TypeError: if `key` is not a typed key, or as `jacobian_svd`.
        ValueError: if f is not a vector field, or `num_probes` < 1.

    Reference: Horvat, Pfister, arXiv 2402.03845, on why it matters; the normalisation is ours.
    """
    check_key(key)
    if num_probes < 1:
        raise ValueError(f"`num_probes` must be at least 1, got {num_probes}.")
    return _asymmetry(key, f, x, num_probes=num_probes, chunk=chunk)


class GaugeField(eqx.Module):
    """x -> r(x) = score(x) - grad phi(x): what of a denoiser's score is not a gradient.

    Args:
        potential: phi, any callable pytree `(x, t, cond) -> scalar` of one example.
        denoiser: the denoiser.
        t: scalar time.
        cond: condition, or None.
    """

    potential: Callable[..., Array]
    denoiser: Denoiser
    t: Array
    cond: PyTree = None

    def __call__(self, x: Array) -> Array:
        """r(x), `(*event)`."""
        gradient = jax.grad(self.potential)(x, self.t, self.cond)
        return self.denoiser.predict(Score(), x, self.t, self.cond) - gradient


def decomposition_error(
    potential: Callable[..., Array], denoiser: Denoiser, x: Array, t: Array, cond: PyTree = None
) -> Array:
    """The loss that splits a score into a gradient and a gauge field, for one noisy example.

    mean over the event of (sigma (score - grad phi))^2. Averaged over x ~ p_t its minimiser
    over potentials satisfies E <score - grad phi, grad psi> = 0 for every psi, which is
    div(p_t r) = 0 for r = score - grad phi: grad phi and the gauge field r are orthogonal in
    L2(p_t), and the split is unique. sigma^2 only balances the noise levels.

    Args:
        potential: phi, any callable pytree `(x, t, cond) -> scalar`, twice differentiable: the
            log density up to a constant where the model is exact.
        denoiser: the denoiser whose score is split.
        x: example noised to t, `(*event)`.
        t: scalar time with sigma(t) > 0.
        cond: condition, or None.

    Returns:
        A scalar.

    Reference: Horvat, Pfister, arXiv 2402.03845, for the decomposition.
    """
    field = GaugeField(potential, denoiser, t, cond)
    return jnp.mean((denoiser.process.sigma(t) * field(x)) ** 2)


def gauge_residual(
    field: Callable[[Array], Array],
    score: Callable[[Array], Array],
    x: Array,
    *,
    key: PRNGKeyArray | None = None,
    trace: TraceEstimator = ExactTrace(),
) -> Array:
    """div r + <r, grad log p> = div(p r) / p at x, which is 0 for a gauge field r.

    A field r that satisfies it everywhere may be added to the score without changing the law of
    the probability flow: trajectories turn, but no density moves.

    Args:
        field: r, `(*event)` to `(*event)`, such as a `GaugeField`.
        score: grad log p, `(*event)` to `(*event)`.
        x: where, `(*event)`.
        key: typed PRNG key, needed by estimators that draw probes.
        trace: how the divergence is computed.

    Returns:
        A scalar.

    Raises:
        TypeError: if `key` is not a typed key.
        ValueError: if the estimator needs a key and there is none.

    Reference: Horvat, Pfister, arXiv 2402.03845.
    """
    value, estimates = trace(field, x, draw_probes(key, trace, x))
    return estimates.mean() + jnp.vdot(value, score(x))
