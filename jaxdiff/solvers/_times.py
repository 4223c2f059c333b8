"""What a time grid must be."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from jaxdiff._checks import check_count
from jaxdiff._tree import as_float_array, is_known
from jaxdiff.processes import GaussianProcess


def check_monotone(times: ArrayLike, *, increasing: bool = False, name: str = "times") -> Array:
    """The grid as an array, after checking what can be known of it without its process.

    Raises:
        ValueError: if it is not one-dimensional with two or more entries and strictly monotone in
            the direction asked for.
    """
    times = as_float_array(times)
    if times.ndim != 1 or times.shape[0] < 2:
        raise ValueError(
            f"`{name}` must be a one-dimensional grid of at least two times, got shape "
            f"{times.shape}."
        )
    if not is_known(times):
        return times
    # In numpy, because jax would trace even a constant inside jit.
    values = np.asarray(times)
    gaps = np.diff(values) * (1 if increasing else -1)
    if not np.all(gaps > 0):
        raise ValueError(
            f"`{name}` must strictly {'increase' if increasing else 'decrease'} (time grows with "
            f"noise), got first={values[0]:g}, last={values[-1]:g}: "
            f"{np.array2string(values, threshold=6)}."
            + (f" Pass {name}[::-1]." if np.all(gaps < 0) else "")
        )
    return times


def check_times(process: GaussianProcess, times: ArrayLike, *, increasing: bool = False) -> Array:
    """The grid as an array, after checking what can be known of it.

    Args:
        process: the forward process.
        times: `(num_steps + 1,)`.
        increasing: whether from data to noise.

    Raises:
        ValueError: if it is not one-dimensional with two or more entries, strictly monotone in
            the direction asked for, and inside `[0, horizon]` of the process.
    """
    times = check_monotone(times, increasing=increasing)
    if not is_known(times):
        return times
    least, most = sorted(np.asarray(times)[[0, -1]])
    if least < 0 or most > process.horizon * (1 + 1e-6):
        raise ValueError(
            f"`times` must lie inside [0, {process.horizon:g}], the time range of "
            f"{type(process).__name__}, got [{least:g}, {most:g}]."
        )
    return times


def check_grids(
    process: GaussianProcess, times: ArrayLike, num_samples: int, *, increasing: bool = False
) -> Array:
    """One grid per example, `(num_samples, num_steps + 1)`, checked like `check_times`.

    Raises:
        ValueError: if there are more or fewer, or one of them is not a grid.
    """
    times = as_float_array(times)
    if times.shape[0] != num_samples:
        raise ValueError(
            f"`times` of two axes must hold one grid per example, {num_samples}, got shape "
            f"{times.shape}."
        )
    if is_known(times):
        values = np.asarray(times)
        gaps = np.diff(values) * (1 if increasing else -1)
        # The worst of them speak for all.
        for row in {gaps.min(1).argmin(), values.min(1).argmin(), values.max(1).argmax()}:
            check_times(process, values[row], increasing=increasing)
    return times


def clip_times(process: GaussianProcess, times: ArrayLike) -> Array:
    """A decreasing grid with its ends clipped to [t_min, t_max], where log-SNR is finite.

    Raises:
        ValueError: see `check_times`; and if more than one time lies at or beyond an end.
    """
    times = check_times(process, times)
    clipped = jnp.clip(times, process.t_min, process.t_max)
    if is_known(clipped) and np.any(np.diff(clipped) == 0):
        raise ValueError(
            f"`times` must have at most one time at or below t_min={process.t_min:g}, and one at "
            f"or above t_max={process.t_max:g}, got "
            f"{np.array2string(np.asarray(times), threshold=6)}. Drop the last 0: times[:-1]."
        )
    return clipped


# Where a grid starts, EDM's largest noise level, that would start at a level beyond the second:
# those of the variance-preserving schedules, about 155, are not.
_FIRST_LEVEL, _UNBOUNDED = 80.0, 200.0


def bounded_times(process: GaussianProcess, times: Array) -> Array:
    """A decreasing grid, shrunk towards its end if it starts where alpha all but vanishes.

    Args:
        process: the forward process.
        times: the grid, `(num_steps + 1,)`.

    Returns:
        The grid, `(num_steps + 1,)`: itself where the noise level sigma / alpha at its start is at
        most 200, and else one with the same relative gaps from where it is 80.
    """
    limit = process.time(-2 * jnp.log(jnp.asarray(_FIRST_LEVEL, times.dtype)))
    unbounded = process.log_snr(times[0]) < -2 * jnp.log(_UNBOUNDED)
    start, end = times[0], times[-1]
    moved = end + (times - end) * ((limit - end) / (start - end))
    moved = moved.at[0].set(limit).at[-1].set(end)
    return jnp.where(unbounded, moved, times)


def resolve_times(
    process: GaussianProcess,
    times: int | ArrayLike,
    *,
    t_end: float = 0.0,
    increasing: bool = False,
    customary: Callable[[GaussianProcess, int, float], Array] | None = None,
) -> Array:
    """A number of steps becomes a customary grid; a grid is checked.

    Args:
        process: the forward process.
        times: number of steps, an integer of any kind, or a grid.
        t_end: where a customary grid ends.
        increasing: whether the grid runs from data to noise.
        customary: `(process, num_steps, t_end) -> grid`, such as a solver's `default_times`; None
            for the process's own.

    Raises:
        ValueError: see `check_times`.
    """
    if np.ndim(times) == 0:
        count = check_count("times", times, instead="Pass a number of steps, or a grid of times.")
        grid = (
            process.times(count, t_end) if customary is None else customary(process, count, t_end)
        )
        times = grid[::-1] if increasing else grid
    return check_times(process, times, increasing=increasing)
