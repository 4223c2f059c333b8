"""The Jacobian of the score: intrinsic dimension.

alpha dD/dx = I + sigma^2 d score / dx, the posterior covariance of the signal in units of the
noise, (alpha / sigma)^2 Cov(x0 | x). At low noise it projects on the tangent space of the data:
its eigenvalues are near 1 along the data and near 0 across.

Reference: Horvat, Pfister, "On Gauge Freedom, Conservativity and Intrinsic Dimensionality
Estimation in Diffusion Models", 2024, arXiv 2402.03845.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff.denoiser import Denoiser
from jaxdiff.geometry._normal_bundle import largest_gap
from jaxdiff.geometry._ritz import GolubKahanLanczos, SpectralMethod
from jaxdiff.geometry._spectrum import Spectrum, jacobian_svd
from jaxdiff.predictions import Eps
from jaxdiff.traces import ExactTrace, TraceEstimator, draw_probes, standard_error


class Estimate(eqx.Module):
    """A number estimated with random probes.

    Attributes:
        value: the estimate, a scalar.
        standard_error: over the probes: 0 where it is exact, NaN for a single probe.
    """

    value: Array
    standard_error: Array


class ScaledDenoiser(eqx.Module):
    """x -> alpha D(x, t, cond) = x + sigma^2 score(x): the part of x that is signal.

    A pytree: new weights, times and conditions do not recompile what is computed from it.

    Args:
        denoiser: the denoiser.
        t: scalar time.
        cond: condition, or None.
    """

    denoiser: Denoiser
    t: Array
    cond: PyTree = None

    def __call__(self, x: Array) -> Array:
        """alpha E[x0 | x_t = x, cond], `(*event)`."""
        scaled = self.denoiser.process.alpha(self.t) * self.denoiser(x, self.t, self.cond)
        return scaled.astype(x.dtype)


def effective_dimension(
    denoiser: Denoiser,
    x: Array,
    t: Array,
    cond: PyTree = None,
    *,
    key: PRNGKeyArray | None = None,
    trace: TraceEstimator = ExactTrace(),
) -> Estimate:
    """How many dimensions of x_t = x are signal: tr(alpha dD/dx) = d + sigma^2 div score.

    For a true denoiser, (alpha / sigma)^2 E[||x0 - D||^2 | x] >= 0. It tends to the intrinsic
    dimension as the noise vanishes, at noisy x_t and at noiseless alpha x0 alike, needs no gap,
    and is meaningful at every noise level.

    Args:
        denoiser: the denoiser.
        x: noisy example, `(*event)`.
        t: scalar time.
        cond: condition, or None.
        key: typed PRNG key, needed by estimators that draw probes.
        trace: `ExactTrace()` for small events, `Hutchinson(...)` or `HutchPlusPlus(...)`.

    Returns:
        An `Estimate`.

    Raises:
        TypeError: if `key` is not a typed key.
        ValueError: if the estimator needs a key and there is none.

    Reference: Horvat, Pfister, arXiv 2402.03845, relate the Jacobian of the score to the
    dimension; the trace is ours.
    """
    probes = draw_probes(key, trace, x)
    estimates = trace(ScaledDenoiser(denoiser, t, cond), x, probes)[1]
    return Estimate(estimates.mean(), standard_error(estimates, trace.stochastic))


def density_dimension(
    denoiser: Denoiser,
    x0: Array,
    t: Array,
    cond: PyTree = None,
    *,
    key: PRNGKeyArray | None = None,
    trace: TraceEstimator = ExactTrace(),
) -> Estimate:
    """Intrinsic dimension at a clean example, from how fast its density falls with the noise.

        d + sigma^2 (div score + ||score||^2) = tr(alpha dD/dx) + ||eps_hat||^2 at x = alpha x0

    This is d + d log p / d log rho for the density p of data smoothed by noise rho =
    sigma / alpha, which on a manifold goes as rho^(dimension - d). `effective_dimension` lacks the
    second term, which vanishes on the data and grows with the distance from it. At noisy x in
    place of alpha x0 the sum would be d on average, at every noise level.

    Args:
        denoiser: the denoiser.
        x0: clean example, `(*event)`; no noise is added to it.
        t: scalar time with a small sigma(t) > 0.
        cond: condition, or None.
        key: as in `effective_dimension`.
        trace: as in `effective_dimension`.

    Returns:
        An `Estimate`.

    Raises:
        TypeError: as `effective_dimension`.
        ValueError: as `effective_dimension`.

    Reference: Kamkari, Ross, Hosseinzadeh, Cresswell, Loaiza-Ganem, "A Geometric View of Data
    Complexity: Efficient Local Intrinsic Dimension Estimation with Diffusion Models", 2024,
    arXiv 2406.03537.
    """
    x = (denoiser.process.alpha(t) * x0).astype(x0.dtype)
    estimate = effective_dimension(denoiser, x, t, cond, key=key, trace=trace)
    excess = jnp.sum(denoiser.predict(Eps(), x, t, cond) ** 2)
    return Estimate(estimate.value + excess, estimate.standard_error)


class JacobianDimension(eqx.Module):
    """Intrinsic dimension by the spectrum of the denoiser's Jacobian.

    Attributes:
        dimension: how many singular values count, int32.
        spectrum: the `Spectrum` of alpha dD/dx; its first `dimension` right vectors span the
            tangent space.
    """

    dimension: Array
    spectrum: Spectrum


def jacobian_dimension(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    x: Array,
    t: Array,
    cond: PyTree = None,
    *,
    rank: int,
    threshold: float | None = 0.5,
    method: SpectralMethod = GolubKahanLanczos(),
    chunk: int | None = None,
) -> JacobianDimension:
    """Intrinsic dimension at x: the number of large singular values of alpha dD/dx.

    For data N(m, C) they are alpha^2 c / (alpha^2 c + sigma^2) with c the variances: 1/2 where
    signal and noise are equal. For a true denoiser they are eigenvalues. With a gauge field (see
    `gauge_residual`) they are neither, and the count misleads, though sampling and likelihood do
    not change: compare `asymmetry`.

    Args:
        key: typed PRNG key, for the starting block.
        denoiser: the denoiser.
        x: noisy example, or a clean one times alpha, `(*event)`.
        t: scalar time with a small sigma(t) > 0.
        cond: condition, or None.
        rank: how many values to compute, more than the dimension expected; where all of them
            count, the dimension is at least this.
        threshold: values above it count; None to count those above the largest gap, which needs
            rank >= 2.
        method: as in `jacobian_svd`.
        chunk: as in `jacobian_svd`.

    Returns:
        A `JacobianDimension`.

    Raises:
        TypeError: as `jacobian_svd`.
        ValueError: as `jacobian_svd`, or for the largest gap of a single value.

    Reference: Horvat, Pfister, arXiv 2402.03845. They follow the singular values of the flow
    map's Jacobian down to the data, which is `jacobian_svd` of a deterministic sampler; here one
    time is enough.
    """
    if threshold is None and rank < 2:
        raise ValueError(
            f"`rank` must be at least 2 to count by the largest gap, got {rank}. Compute more "
            "values than the dimension expected, or pass a threshold."
        )
    field = ScaledDenoiser(denoiser, t, cond)
    spectrum = jacobian_svd(key, field, x, rank, method=method, chunk=chunk)
    if threshold is None:
        return JacobianDimension(largest_gap(spectrum.values), spectrum)
    return JacobianDimension(jnp.sum(spectrum.values > threshold, dtype=jnp.int32), spectrum)
