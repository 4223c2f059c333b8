"""Time grids: decreasing times from noise to data."""

import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from jaxdiff.processes import Process


def uniform_times(process: Process, num_steps: int, *, t_end: float = 0.0) -> Array:
    """Times uniform in t, from t_max to `t_end`.

    Args:
        process: the forward process.
        num_steps: number of steps, >= 1.
        t_end: last time; 0 returns the denoiser's answer itself at the last step.

    Returns:
        Decreasing times, `(num_steps + 1,)`.
    """
    return jnp.linspace(process.t_max, t_end, num_steps + 1)


def log_snr_times(process: Process, num_steps: int) -> Array:
    """Times uniform in log-SNR, from t_max to t_min.

    Reference: Lu et al., "DPM-Solver", 2022, arXiv 2206.00927, section 3.4.
    """
    ends = process.log_snr(jnp.asarray([process.t_max, process.t_min], jnp.result_type(float)))
    times = process.time(jnp.linspace(ends[0], ends[1], num_steps + 1))
    return times.at[0].set(process.t_max).at[-1].set(process.t_min)


def karras_times(process: Process, num_steps: int, *, rho: float = 7.0) -> Array:
    """Noise levels k = sigma / alpha uniform in k^(1/rho), from t_max to t_min, then 0.

    Args:
        process: the forward process.
        num_steps: number of steps N: N levels down to t_min, and the last step to 0; for a
            process whose t_min is 0, N + 1 levels.
        rho: 7 for quality; 3 equalises the truncation error.

    Reference: Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based
    Generative Models", 2022, arXiv 2206.00364, equation 5.
    """
    ends = jnp.asarray([process.t_max, process.t_min], jnp.result_type(float))
    high, low = jnp.exp(-process.log_snr(ends) / (2 * rho))
    to_zero = not (isinstance(process.t_min, float) and process.t_min == 0)
    count = max(num_steps, 2) if to_zero else num_steps + 1
    levels = high + jnp.linspace(0.0, 1.0, count) * (low - high)
    times = process.time(-2 * rho * jnp.log(levels)).at[0].set(ends[0]).at[-1].set(ends[1])
    return jnp.append(times[:num_steps], 0.0) if to_zero else times


def quadratic_times(process: Process, num_steps: int) -> Array:
    """Times uniform in sqrt(t), from t_max to 0.

    Reference: Song, Meng, Ermon, "Denoising Diffusion Implicit Models", 2020,
    arXiv 2010.02502, appendix D.2.
    """
    return jnp.linspace(jnp.sqrt(process.t_max), 0.0, num_steps + 1) ** 2


def check_times(process: Process, times: ArrayLike, *, increasing: bool = False) -> Array:
    """The grid as an array, after checking what can be known of it.

    Raises:
        ValueError: if it is not one-dimensional with two or more entries, strictly monotone in
            the direction asked for, and inside `[0, horizon]` of the process.
    """
    times = jnp.asarray(times)
    if times.ndim != 1 or times.shape[0] < 2:
        raise ValueError(
            "`times` must be a number of steps or a one-dimensional grid of at least two times, "
            f"got shape {times.shape}."
        )
    if not jnp.issubdtype(times.dtype, jnp.floating):
        times = times.astype(jnp.result_type(float))
    if isinstance(times, jax.core.Tracer):
        return times
    values = np.asarray(times)
    first, last, word = values[0], values[-1], "increase" if increasing else "decrease"
    if not np.all(np.diff(values) > 0 if increasing else np.diff(values) < 0):
        raise ValueError(
            f"`times` must strictly {word} (time grows with noise), got first={first:g}, "
            f"last={last:g}: {np.array2string(values, threshold=6)}."
            + (" Pass times[::-1]." if np.all(np.diff(values[::-1]) > 0) == increasing else "")
        )
    if values.min() < 0 or values.max() > process.horizon * (1 + 1e-6):
        raise ValueError(
            f"`times` must lie inside [0, {process.horizon:g}], the time range of "
            f"{type(process).__name__}, got [{values.min():g}, {values.max():g}]."
        )
    return times


def resolve_times(
    process: Process, times: int | ArrayLike, *, t_end: float = 0.0, increasing: bool = False
) -> Array:
    """A number of steps becomes the grid customary for the process; a grid is checked.

    Args:
        process: the forward process.
        times: number of steps, or a grid.
        t_end: where a customary grid ends.
        increasing: whether the grid runs from data to noise.

    Raises:
        ValueError: see `check_times`.
    """
    if isinstance(times, int):
        if times < 1:
            raise ValueError(f"`times` must be at least one step, got {times}.")
        grid = process.times(times, t_end)
        times = grid[::-1] if increasing else grid
    return check_times(process, times, increasing=increasing)
