"""The variational bound in continuous time."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._tree import as_float_array
from jaxdiff.denoiser import Denoiser
from jaxdiff.losses._batch import wide
from jaxdiff.losses._denoising import denoising_error
from jaxdiff.losses._time_laws import TimeLaw, UniformLogSNR
from jaxdiff.losses._weightings import ELBO
from jaxdiff.processes import GaussianProcess


def prior_kl(process: GaussianProcess, x0: Array) -> Array:
    """KL(q(x_T | x0) || N(0, sigma_T^2 I)) = alpha_T^2 ||x0||^2 / (2 sigma_T^2), in nats."""
    t = as_float_array(process.t_max)
    return 0.5 * jnp.exp(process.log_snr(t)) * jnp.sum(wide(x0) ** 2)


def gaussian_reconstruction(process: GaussianProcess, key: PRNGKeyArray, x0: Array) -> Array:
    """-E log N(x0; x_t / alpha, (sigma / alpha)^2 I) at t_min: d/2 log(2 pi e sigma^2 / alpha^2).

    The decoder for continuous data; exact in expectation as t_min -> 0. Draws nothing.

    Args:
        process: the forward process.
        key: typed PRNG key, which is not used.
        x0: one example, `(*event)`, of which the size d alone matters.

    Returns:
        Nats, a scalar.
    """
    del key
    t = as_float_array(process.t_min)
    return 0.5 * x0.size * (math.log(2 * math.pi) + 1 - process.log_snr(t))


def discrete_reconstruction(
    process: GaussianProcess, key: PRNGKeyArray, x0: Array, *, levels: int = 256
) -> Array:
    """-log p(x0 | x_t) at t_min, for data on `levels` equally spaced values in [-1, 1].

    p(x0 = v | x_t) is proportional to N(x_t; alpha v, sigma^2), pixel by pixel.

    Args:
        process: the forward process.
        key: typed PRNG key, for x_t.
        x0: one example, `(*event)`, on the values.
        levels: how many values there are.

    Returns:
        Nats, a scalar.

    Reference: Kingma, Salimans, Poole, Ho, "Variational Diffusion Models", 2021,
    arXiv 2107.00630, section 3.3.
    """
    t, x0 = as_float_array(process.t_min), wide(x0)
    noisy = process.noise(key, x0, t)
    values = jnp.linspace(-1.0, 1.0, levels, dtype=x0.dtype)
    deviation = (noisy[..., None] - process.alpha(t) * values) / process.sigma(t)
    log_probs = jax.nn.log_softmax(-0.5 * deviation**2, axis=-1)
    index = jnp.round((x0 + 1) * (levels - 1) / 2).astype(jnp.int32)
    return -jnp.sum(jnp.take_along_axis(log_probs, index[..., None], axis=-1))


def variational_bound(
    denoiser: Denoiser,
    key: PRNGKeyArray,
    x0: Array,
    u: Array,
    cond: PyTree = None,
    *,
    time_law: TimeLaw = UniformLogSNR(),
    reconstruction: Callable[
        [GaussianProcess, PRNGKeyArray, Array], Array
    ] = gaussian_reconstruction,
) -> Array:
    """An unbiased estimate of the negative ELBO of one example, in nats.

    prior KL + reconstruction at t_min + 1/2 (-dlog_snr/dt) ||eps - eps_hat||^2 / p(t), with
    t ~ `time_law`. With the exact denoiser its mean over data is their entropy. The law changes
    the variance alone: uniform in log-SNR, the integrand is bounded by the size of the example;
    with times uniform on a schedule that spends little time at low noise, such as `VP`, single
    estimates are off by hundreds.

    Args:
        denoiser: the denoiser.
        key: typed key.
        x0: clean example, `(*event)`.
        u: level of the time in [0, 1], a scalar: t = time_law.quantile(process, u). Uniform; from
            `stratified_uniform` for a batch.
        cond: its condition.
        time_law: law of the time; its density divides.
        reconstruction: `gaussian_reconstruction` for continuous data, or
            `discrete_reconstruction` for 8-bit images.

    Returns:
        A scalar; divide by `x0.size * log(2)` for bits per dimension.

    Reference: Kingma, Salimans, Poole, Ho, "Variational Diffusion Models", 2021,
    arXiv 2107.00630, equations 11 and 17.
    """
    reconstruction_key, error_key = jax.random.split(key)
    process = denoiser.process
    t = time_law.quantile(process, as_float_array(u))
    weight = ELBO()(process, t, time_law.density(process, t))
    diffusion = weight * x0.size * denoising_error(denoiser, error_key, x0, t, cond)
    return prior_kl(process, x0) + reconstruction(process, reconstruction_key, x0) + diffusion
