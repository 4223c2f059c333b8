"""Time grids of tables of steps, such as the 1000 of most checkpoints."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from jaxdiff.processes import Tabulated
from jaxdiff.solvers._times import check_times


def table_times(process: Tabulated, steps: ArrayLike, *, t_end: float = 0.0) -> Array:
    """The times of given steps of a table, then `t_end`: step k of T is t = (k + 1) / T.

    Args:
        process: the tabulated process.
        steps: decreasing integers in [0, T), e.g. `STABLE_DIFFUSION_STEPS`, `(num_steps,)`.
        t_end: last time; 0 is clean data, 1 / T the table's step 0.

    Returns:
        Decreasing times, `(num_steps + 1,)`.

    Raises:
        ValueError: if the times do not decrease strictly or leave the table.
    """
    dtype = jnp.result_type(float)
    times = np.append((np.asarray(steps, dtype) + 1) / process.num_timesteps, t_end)
    return check_times(process, times.astype(dtype))


def discrete_times(
    process: Tabulated,
    num_steps: int,
    spacing: str = "leading",
    *,
    offset: int = 0,
    drop_last: bool = False,
    t_end: float = 0.0,
) -> Array:
    """The customary choices of N of the T steps of a table, then `t_end`.

        "leading"    k_i = i floor(T / N) + offset: what DDPM-style code calls strided steps
        "trailing"   k_i = round(T - i T / N) - 1: starts at pure noise, right for zero
                     terminal SNR
        "linspace"   k_i = round(i (T - 1) / (N - 1)): both ends of the table

    each in decreasing order, with ties rounded to even. A step goes from each time to the next of
    the grid, as those of diffusers' multistep and Euler schedulers do. Its DDIM and DDPM evaluate
    at these times too, but step from k to k - floor(T / N): the same with "leading", and with
    "trailing" where N divides T; otherwise they end a step at one noise level and begin the next
    at another. On a Gaussian of unit size their samples are then off by 0.01 to 0.06 (root mean
    square, "linspace" with 50 to 10 steps), which this library does not reproduce.

    Published schedulers disagree on the
    count: DDIM, PNDM and Euler space N steps; the multistep solvers (DPM-Solver++, UniPC, DEIS,
    SA-Solver) space N + 1 with "leading" and "linspace" and drop the last, `drop_last`. Their
    fractional steps (Euler's "linspace" where N - 1 does not divide T - 1, Karras levels in a
    table) interpolate sigma or log sigma between entries, `Tabulated` log alpha.

    Args:
        process: the tabulated process.
        num_steps: N, in [1, T].
        spacing: "leading", "trailing" or "linspace".
        offset: added to the steps of "leading"; 1 for Stable Diffusion.
        drop_last: whether to space N + 1 steps and drop the one nearest to the data.
        t_end: last time; 0 is clean data, 1 / T the table's step 0 ("sigma_min", or
            `set_alpha_to_one=False`).

    Returns:
        Decreasing times, `(num_steps + 1,)`.

    Raises:
        ValueError: for another spacing, an offset of another spacing, more steps than the table
            has, or a step of length zero, e.g. "leading" with no offset and t_end = 1 / T.

    Reference: Lin, Liu, Li, Yang, "Common Diffusion Noise Schedules and Sample Steps are
    Flawed", 2023, arXiv 2305.08891, table 2; the conventions are those of diffusers 0.37.
    """
    size, count = process.num_timesteps, num_steps + drop_last
    if spacing not in ("leading", "trailing", "linspace"):
        raise ValueError(f'`spacing` must be "leading", "trailing" or "linspace", got {spacing!r}.')
    if offset and spacing != "leading":
        raise ValueError(
            f'`offset` belongs to spacing="leading", got offset={offset} with {spacing!r}.'
        )
    if num_steps < 1 or count > size:
        raise ValueError(
            f"`num_steps` must be between 1 and the {size - drop_last} steps that can be spaced "
            f"in this table, got {num_steps}."
        )
    if spacing == "trailing":
        steps = np.round(np.arange(size, 0, -size / num_steps)) - 1
    elif spacing == "leading":
        steps = np.arange(count)[::-1] * (size // count) + offset
    else:
        steps = np.linspace(0, size - 1, max(count, 2)).round()[::-1]
    return table_times(process, steps[:num_steps], t_end=t_end)
