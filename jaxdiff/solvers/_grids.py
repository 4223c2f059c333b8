"""Time grids: decreasing times from noise to data."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from jaxdiff._checks import check_count, check_kind, check_number
from jaxdiff.processes import GaussianProcess
from jaxdiff.solvers._times import check_times, clip_times


class Schedule(eqx.Module):
    """A grid that was searched for.

    Attributes:
        times: decreasing times, `(num_steps + 1,)`.
        value: what was minimised, at these times.
        history: its course, one entry per iteration or generation.
    """

    times: Array
    value: Array
    history: Array


def _checked(process: GaussianProcess, num_steps: int) -> int:
    """The number of steps, after checking it and the process."""
    check_kind("process", process, GaussianProcess, "VP()")
    return check_count("num_steps", num_steps)


def uniform_times(
    process: GaussianProcess, num_steps: int, *, t_end: float = 0.0
) -> Float[Array, "{num_steps}+1"]:
    """Times uniform in t, from t_max to `t_end`.

    Args:
        process: the forward process.
        num_steps: number of steps, >= 1.
        t_end: last time; 0 returns the denoiser's answer itself at the last step.

    Returns:
        Decreasing times, `(num_steps + 1,)`.
    """
    num_steps = _checked(process, num_steps)
    return jnp.linspace(process.t_max, t_end, num_steps + 1)


def log_snr_times(process: GaussianProcess, num_steps: int) -> Float[Array, "{num_steps}+1"]:
    """Times uniform in log-SNR, from t_max to t_min.

    Args:
        process: the forward process.
        num_steps: number of steps, >= 1.

    Returns:
        Decreasing times, `(num_steps + 1,)`.

    Reference: Lu et al., "DPM-Solver", 2022, arXiv 2206.00927, section 3.4.
    """
    num_steps = _checked(process, num_steps)
    ends = process.log_snr(jnp.asarray([process.t_max, process.t_min], jnp.result_type(float)))
    times = process.unbounded_time(jnp.linspace(ends[0], ends[1], num_steps + 1))
    return times.at[0].set(process.t_max).at[-1].set(process.t_min)


def karras_times(
    process: GaussianProcess,
    num_steps: int,
    *,
    rho: float = 7.0,
    t_start: ArrayLike | None = None,
    t_end: ArrayLike | None = None,
) -> Float[Array, "{num_steps}+1"]:
    """Noise levels k = sigma / alpha uniform in k^(1/rho), from t_max to t_min, then 0.

    Args:
        process: the forward process.
        num_steps: number of steps N: N levels down to t_min, and the last step to 0; for a
            process whose t_min is 0, N + 1 levels.
        rho: 7 for quality; 3 equalises the truncation error.
        t_start: first time; None for t_max.
        t_end: last time, where sigma > 0, by N + 1 levels; None for t_min and 0.

    Returns:
        Decreasing times, `(num_steps + 1,)`.

    Examples:
        >>> [round(float(t), 3) for t in solvers.karras_times(processes.EDM(), 3)]
        [80.0, 2.515, 0.002, 0.0]

    Reference: Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based
    Generative Models", 2022, arXiv 2206.00364, equation 5.
    """

    def log_level(ramp, high, low):
        high, low = jnp.exp(high / rho), jnp.exp(low / rho)
        return rho * jnp.log(high + ramp * (low - high))

    return _by_level(process, num_steps, log_level, t_start, t_end)


def polyexponential_times(
    process: GaussianProcess, num_steps: int, *, rho: float = 1.0
) -> Float[Array, "{num_steps}+1"]:
    """log k falls as a power of the remaining steps, from t_max to t_min, then 0.

    log k_i = log k_min + (1 - i / (N - 1))^rho log(k_max / k_min), with k = sigma / alpha.

    Args:
        process: the forward process.
        num_steps: number of steps N, counted as in `karras_times`.
        rho: > 0; 1 is the exponential grid, the limit of `karras_times` for rho to infinity:
            `log_snr_times` of N - 1 steps, then 0. Larger values crowd levels at t_min, where
            float32 stops telling 50 of them apart beyond rho of about 3.

    Reference: Crowson, "k-diffusion", 2022, github.com/crowsonkb/k-diffusion,
    `get_sigmas_polyexponential`.
    """
    return _by_level(
        process, num_steps, lambda ramp, high, low: low + (1 - ramp) ** rho * (high - low)
    )


def _by_level(
    process: GaussianProcess,
    num_steps: int,
    log_level: Callable,
    t_start: ArrayLike | None = None,
    t_end: ArrayLike | None = None,
) -> Array:
    """Levels between two times by `log_level(ramp, log k_first, log k_last)`, then t = 0.

    A process whose t_min is 0 has no level below it: there, as where `t_end` is given, one level
    more takes its place.
    """
    num_steps = _checked(process, num_steps)
    first = process.t_max if t_start is None else t_start
    last = process.t_min if t_end is None else t_end
    dtype = jnp.result_type(float, first, last)
    ends = jnp.stack([jnp.asarray(first, dtype), jnp.asarray(last, dtype)])
    high, low = -process.log_snr(ends) / 2
    lowest = isinstance(process.t_min, float) and process.t_min == 0
    to_zero = t_end is None and not lowest
    count = max(num_steps, 2) if to_zero else num_steps + 1
    levels = log_level(jnp.linspace(0.0, 1.0, count), high, low)
    times = process.unbounded_time(-2 * levels).at[0].set(ends[0]).at[-1].set(ends[1])
    return jnp.append(times[:num_steps], 0.0) if to_zero else times


def quadratic_times(process: GaussianProcess, num_steps: int) -> Float[Array, "{num_steps}+1"]:
    """Times uniform in sqrt(t), from t_max to 0.

    Args:
        process: the forward process.
        num_steps: number of steps, >= 1.

    Returns:
        Decreasing times, `(num_steps + 1,)`.

    Reference: Song, Meng, Ermon, "Denoising Diffusion Implicit Models", 2020,
    arXiv 2010.02502, appendix D.2.
    """
    num_steps = _checked(process, num_steps)
    return jnp.linspace(jnp.sqrt(process.t_max), 0.0, num_steps + 1) ** 2


def cosine_times(
    process: GaussianProcess, num_steps: int, *, sigma_data: float = 1.0
) -> Float[Array, "{num_steps}+1"]:
    """Times uniform in the angle arctan(k / sigma_data), k = sigma / alpha, from t_max to 0.

    With sigma_data = 1 and a variance-preserving process the angle is that of the cosine
    schedule, alpha = cos(angle): the grid has the noise levels that uniform steps of `Cosine`
    would have. Below t_min, where noise levels are no longer told apart, t is linear in the
    angle.

    Args:
        process: the forward process.
        num_steps: number of steps, >= 1.
        sigma_data: > 0; where the levels are densest on a logarithmic scale.

    Returns:
        Decreasing times, `(num_steps + 1,)`.

    Reference: Nichol, Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021,
    arXiv 2102.09672, equation 17 (without its offset); the angle of Salimans, Ho, "Progressive
    Distillation for Fast Sampling of Diffusion Models", 2022, arXiv 2202.00512, appendix D.
    """
    num_steps = _checked(process, num_steps)
    ends = jnp.asarray([process.t_max, process.t_min, 0.0], jnp.result_type(float))
    first, lowest, last = jnp.arctan2(process.sigma(ends), sigma_data * process.alpha(ends))
    angle = jnp.linspace(first, last, num_steps + 1)
    inside = jnp.maximum(angle, lowest)
    times = process.unbounded_time(
        2 * (jnp.log(jnp.cos(inside)) - jnp.log(sigma_data * jnp.sin(inside)))
    )
    below = process.t_min * (angle - last) / jnp.where(lowest > last, lowest - last, 1.0)
    times = jnp.where(angle < lowest, below, times)
    return times.at[0].set(ends[0]).at[-1].set(0.0)


def shifted_times(times: ArrayLike, shift: float) -> Float[Array, "points"]:
    """t -> shift t / (1 + (shift - 1) t): more steps at high noise for shift > 1.

    For `RectifiedFlow` this multiplies every noise level sigma / alpha by `shift`, as suits data
    with shift^2 times the pixels. The ends 0 and 1 stay.

    Args:
        times: a grid inside [0, 1], `(points,)`.
        shift: > 0; 1 changes nothing, 3 is Stable Diffusion 3's.

    Returns:
        The shifted grid, `(points,)`.

    Raises:
        ValueError: for a shift that is not positive.

    Reference: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image
    Synthesis", 2024, arXiv 2403.03206, equation 23, whose sqrt(m / n) is `shift`.
    """
    check_number("shift", shift, above=0.0, instead="Use 1 for no shift.")
    times = jnp.asarray(times)
    return shift * times / (1 - times + shift * times)


def interpolate_times(
    process: GaussianProcess, times: ArrayLike, num_steps: int
) -> Float[Array, "{num_steps}+1"]:
    """A grid resampled to another number of steps: log k is linear in between, k = sigma / alpha.

    Args:
        process: the forward process.
        times: a decreasing grid, `(points,)`. Ends beyond [t_min, t_max], such as 0, count as
            t_min and t_max and are put back afterwards; of a grid of levels down to t_min and then
            0, such as `karras_times`, pass the levels alone, `times[:-1]`.
        num_steps: number of steps of the result, >= 1.

    Returns:
        Decreasing times, `(num_steps + 1,)`, with the ends of `times`.

    Raises:
        ValueError: if the grid is not one, or has several times at or beyond t_min or t_max.

    Reference: Sabour, Fidler, Kreis, "Align Your Steps: Optimizing Sampling Schedules in
    Diffusion Models", 2024, arXiv 2404.14507, and its page of published schedules.
    """
    num_steps = _checked(process, num_steps)
    times = check_times(process, times)
    levels = process.log_snr(clip_times(process, times))
    old, new = (jnp.linspace(0, 1, n, dtype=times.dtype) for n in (len(times), num_steps + 1))
    resampled = process.unbounded_time(jnp.interp(new, old, levels))
    return resampled.at[0].set(times[0]).at[-1].set(times[-1])


def monotone(logits: Array, first: ArrayLike, last: ArrayLike) -> Array:
    """A strictly monotone grid from unconstrained numbers: gaps (last - first) softmax(logits).

    Summed from the last entry, near which grids of times are finest.

    Args:
        logits: log gaps up to a constant, `(num_steps,)`.
        first: first entry.
        last: last entry, on either side.

    Returns:
        `(num_steps + 1,)`.
    """
    gaps = jnp.cumsum(jax.nn.softmax(logits)[::-1])[:-1][::-1]
    first, last = jnp.asarray(first), jnp.asarray(last)
    interior = last + (first - last) * gaps
    ends = [jnp.full(1, end, interior.dtype) for end in (first, last)]
    return jnp.concatenate([ends[0], interior, ends[1]])
