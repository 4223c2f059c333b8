"""The residual of the Fokker-Planck equation, which the scores of all noise levels satisfy."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._tree import derivative
from jaxdiff.denoiser import Denoiser
from jaxdiff.processes import GaussianProcess
from jaxdiff.traces import ExactTrace, TraceEstimator, draw_probes


def fokker_planck_residual(
    denoiser: Denoiser,
    x: Array,
    t: Array,
    cond: PyTree = None,
    *,
    key: PRNGKeyArray | None = None,
    trace: TraceEstimator = ExactTrace(),
) -> Array:
    """By how much a denoiser's score fails the Fokker-Planck equation at (x, t).

        R = d score/dt - grad { g^2/2 (div score + ||score||^2) - f <x, score> - d f }

    for the drift f(t) x and diffusion g(t) of the process. Zero for the true score; fields that
    are not the scores of one diffusion, gauge fields among them, in general have R != 0. Computed
    as

        R = (alpha / sigma^2) { dD/dt - g^2/2 grad div D - (dD/dx)^T (g^2 score - f x) },

    which is the same: what the score has in excess of D cancels, and less is lost to rounding at
    low noise. Both forms still amplify rounding by sigma^-4: R means little where sigma is small.

    Costs a derivative in t, and a reverse pass through the divergence: a Jacobian product and
    its derivative per probe, or per dimension for the exact trace.

    Args:
        denoiser: the denoiser, of any network, twice differentiable in x.
        x: noisy example, `(*event)`.
        t: scalar time in [t_min, t_max].
        cond: condition, or None.
        key: typed PRNG key, needed by estimators that draw probes.
        trace: how div D is computed. Random probes make R unbiased, and its square too large
            by the variance of their mean.

    Returns:
        R, `(*event)`.

    Raises:
        TypeError: if `key` is not a typed key.
        ValueError: if the estimator needs a key and there is none.

    Reference: Lai, Takida, Murata, Uesaka, Mitsufuji, Ermon, "FP-Diffusion: Improving
    Score-based Diffusion Models by Enforcing the Underlying Score Fokker-Planck Equation", 2022,
    arXiv 2210.04296, the score FPE. They take finite differences in t.
    """
    process = denoiser.process
    t = 1.0 * jnp.asarray(t)  # an integer time has no derivative
    alpha, variance = process.alpha(t), process.sigma(t) ** 2
    squared_diffusion = process.diffusion(t) ** 2
    probes = draw_probes(key, trace, x)

    (x0_hat, estimates), pull = jax.vjp(
        lambda x: trace(lambda x: denoiser(x, t, cond), x, probes), x
    )
    score = (alpha * x0_hat - x) / variance
    reverse_drift = (squared_diffusion * score - process.drift(t) * x).astype(x0_hat.dtype)
    weights = jnp.full_like(estimates, squared_diffusion / (2 * estimates.shape[0]))
    change = jax.jvp(lambda t: denoiser(x, t, cond), (t,), (jnp.ones_like(t),))[1]
    return (alpha / variance * (change - pull((reverse_drift, weights))[0])).astype(x.dtype)


def fokker_planck_penalty(
    denoiser: Denoiser,
    x: Array,
    t: Array,
    cond: PyTree = None,
    *,
    weight: Array | float = 1.0,
    key: PRNGKeyArray | None = None,
    trace: TraceEstimator = ExactTrace(),
) -> Array:
    """weight ||R||^2 / d of one noisy example, R = `fokker_planck_residual`, for training.

    Add its mean over examples x = alpha x0 + sigma eps and times to a denoising loss. A gradient
    in the weights goes once more through what the residual costs: with `Hutchinson()` several
    times a denoising loss, with the exact trace some d times.

    Args:
        denoiser: the denoiser that learns.
        x: noisy example, `(*event)`.
        t: scalar time.
        cond: condition, or None.
        weight: scalar >= 0, a function of t if need be; sigma(t)^2 suits the growth of R at low
            noise.
        key: as in `fokker_planck_residual`.
        trace: as in `fokker_planck_residual`; `Hutchinson()` where events are large.

    Returns:
        A scalar.

    Raises:
        TypeError: as `fokker_planck_residual`.
        ValueError: as `fokker_planck_residual`.

    Reference: Lai et al., arXiv 2210.04296: their regulariser with the squared norm; the paper
    allows other powers.
    """
    return weight * jnp.mean(
        fokker_planck_residual(denoiser, x, t, cond, key=key, trace=trace) ** 2
    )


def log_density_residual(
    process: GaussianProcess,
    log_prob: Callable[[Array, Array], Array],
    x: Array,
    t: Array,
    *,
    key: PRNGKeyArray | None = None,
    trace: TraceEstimator = ExactTrace(),
) -> Array:
    """By how much a log density fails the Fokker-Planck equation at (x, t).

    dl/dt - { g^2/2 (div grad l + ||grad l||^2) - f <x, grad l> - d f }, for l = log p_t(x).
    Its gradient is R of `fokker_planck_residual`. A normalising constant that depends on t
    shows.

    Args:
        process: the forward process.
        log_prob: `(x, t) -> scalar`, such as a method of an oracle.
        x: noisy example, `(*event)`.
        t: scalar time in [t_min, t_max].
        key: typed PRNG key, needed by estimators that draw probes.
        trace: how the Laplacian is computed.

    Returns:
        A scalar.

    Raises:
        TypeError: if `key` is not a typed key.
        ValueError: if the estimator needs a key and there is none.

    Reference: Lai et al., arXiv 2210.04296, the FPE of the log density.
    """
    probes = draw_probes(key, trace, x)
    score, estimates = trace(jax.grad(lambda x: log_prob(x, t)), x, probes)
    spread = process.diffusion(t) ** 2 / 2 * (estimates.mean() + jnp.sum(score**2))
    flow = process.drift(t) * (jnp.vdot(x, score) + x.size)
    return derivative(lambda t: log_prob(x, t), t) - spread + flow
