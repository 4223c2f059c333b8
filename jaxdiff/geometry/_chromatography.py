"""Resolution chromatography: which resolution a diffusion process generates, and when.

Averaging over blocks of m x m pixels keeps the noise white, with standard deviation sigma / m, and
keeps the fraction P_m of the data's variance. A coarse image thus sees the noise schedule at an
earlier, cleaner time. In the same way each band of spatial frequencies has a signal-to-noise ratio
of its own, snr(t) P_k, and appears when that passes 1.

Variances are of the data about its mean image, per pixel or coefficient; that of unit white noise
is 1 at every resolution and in every band.

Reference: Hwang, Park, Jo, "Resolution Chromatography of Diffusion Models", 2023,
arXiv 2401.10247.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff._tree import derivative
from jaxdiff.geometry._frequency import ring_energy, ring_sizes
from jaxdiff.processes import GaussianProcess


def downsample(x: Array, factor: int) -> Array:
    """Means over blocks of factor x factor pixels.

    Args:
        x: `(*, H, W, C)`.
        factor: m, a divisor of H and W.

    Returns:
        `(*, H / m, W / m, C)`.

    Raises:
        ValueError: if `factor` does not divide height and width.
    """
    *batch, height, width, channels = x.shape
    if factor < 1 or height % factor or width % factor:
        raise ValueError(
            f"`factor` must divide height and width, got {factor} for {height} x {width} pixels."
        )
    blocks = (*batch, height // factor, factor, width // factor, factor, channels)
    return jnp.mean(x.reshape(blocks), (-4, -2))


def relative_power(images: Array, factor: int) -> Array:
    """P_m, the fraction of the data's variance per pixel that block means keep.

    1 for images of one colour, 1 / m^2 for white noise.

    Args:
        images: a data set, `(N, H, W, C)`, N >= 2.
        factor: m, a divisor of H and W.

    Returns:
        A scalar in [0, 1].

    Raises:
        ValueError: if `factor` does not divide height and width.
    """
    return jnp.mean(jnp.var(downsample(images, factor), 0)) / jnp.mean(jnp.var(images, 0))


def band_power(images: Array) -> Array:
    """P_k, variance per coefficient of the unitary Fourier transform in each ring.

    Args:
        images: a data set, `(N, H, W, C)`, N >= 2.

    Returns:
        `(K,)`, unbiased; frequencies are `ring_frequencies(H, W)`.

    Raises:
        ValueError: for a single image.
    """
    count, height, width, channels = images.shape
    if count < 2:
        raise ValueError("`images` must be at least two, to have a variance, got one.")
    energy = jnp.sum(ring_energy(images - jnp.mean(images, 0)), 0)
    sizes = jnp.asarray(ring_sizes(height, width), energy.dtype)
    return energy / (sizes * channels * (count - 1))


def adjusted_time(process: GaussianProcess, t: Array, factor: int, power: Array) -> Array:
    """tau_m(t), the time at which coarse data of full variance is as noisy as block means at t.

    snr(tau) = m^2 P_m snr(t).

    Args:
        process: the forward process.
        t: times, `(*)`.
        factor: m.
        power: P_m, see `relative_power`.

    Returns:
        `(*)`, within [t_min, t_max] of the process: the ends stand for what lies beyond.
    """
    return process.time(process.log_snr(t) + 2 * jnp.log(factor) + jnp.log(power))


def coarse_state(
    process: GaussianProcess, x: Array, t: Array, factor: int, power: Array
) -> tuple[Array, Array]:
    """A noisy example at low resolution, as the same process would make it of coarse data.

    Block means of x_t, times the intensity c that gives them the scale of the process at tau_m:

        c D_m[x_t] = alpha(tau) D_m[x0] / sqrt(P_m) + sigma(tau) xi,    xi ~ N(0, I),
        c^2 = (alpha(tau)^2 + sigma(tau)^2) / (alpha(t)^2 P_m + sigma(t)^2 / m^2).

    A denoiser of low-resolution images of the data's full variance can take it.

    Args:
        process: the forward process.
        x: one noisy example, `(H, W, C)`.
        t: its scalar time.
        factor: m, a divisor of H and W.
        power: P_m, see `relative_power`.

    Returns:
        The coarse example, `(H / m, W / m, C)`, and its time tau_m.

    Raises:
        ValueError: if `factor` does not divide height and width.

    Reference: Hwang et al., 2023, arXiv 2401.10247, for alpha^2 + sigma^2 = 1; other processes are
    ours.
    """
    time = adjusted_time(process, t, factor, power)
    total = process.alpha(time) ** 2 + process.sigma(time) ** 2
    now = process.alpha(t) ** 2 * power + (process.sigma(t) / factor) ** 2
    return (jnp.sqrt(total / now) * downsample(x, factor)).astype(x.dtype), time


def signal_fraction(process: GaussianProcess, power: Array, t: Array) -> Array:
    """g_k(t) = snr P_k / (1 + snr P_k), the part of each band that the denoiser knows.

    E |D_k|^2 / P_k for the denoiser D of Gaussian data; from 0 at pure noise to 1 at data.

    Args:
        process: the forward process.
        power: P_k, `(K,)`, > 0; e.g. `band_power(images)`.
        t: times, `(*)`.

    Returns:
        `(*, K)`.
    """
    return jax.nn.sigmoid(_log_ratio(process, power, t))


def generation_rate(process: GaussianProcess, power: Array, t: Array) -> Array:
    """R_k(t) = -dg_k / dt, how fast each band is generated as t falls.

    g (1 - g) |d log snr / dt|: per unit of log snr it peaks, at 1/4, where snr P_k = 1.

    Args:
        process: the forward process.
        power: P_k, `(K,)`, > 0.
        t: times, `(*)`.

    Returns:
        `(*, K)`; the integral over all times is 1.
    """
    known = signal_fraction(process, power, t)
    unknown = jax.nn.sigmoid(-_log_ratio(process, power, t))
    return -known * unknown * derivative(process.log_snr, t)[..., None]


def chromatogram(process: GaussianProcess, power: Array, t: Array) -> Array:
    """R_k / sum_j R_j, the share of each band in what is generated at a time.

    A function of log snr alone: the same for all processes at equal log snr.

    Args:
        process: the forward process.
        power: P_k, `(K,)`, > 0.
        t: times, `(*)`.

    Returns:
        `(*, K)`, with sum 1.
    """
    ratio = _log_ratio(process, power, t)
    # In logarithms, because all rates underflow far from every peak.
    return jax.nn.softmax(jax.nn.log_sigmoid(ratio) + jax.nn.log_sigmoid(-ratio))


def _log_ratio(process: GaussianProcess, power: Array, t: Array) -> Array:
    return process.log_snr(t)[..., None] + jnp.log(power)
