"""EDM: time is the noise level itself."""

import math
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, number
from jaxdiff.processes._base import GaussianProcess


class EDM(GaussianProcess):
    """alpha = 1, sigma = t: the time of this process is its noise level.

    Args:
        t_min: smallest noise level a network is trained at, sigma_min.
        t_max: largest noise level, sigma_max.

    Reference:
        Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based
        Generative Models", 2022, arXiv 2206.00364, table 1.
    """

    horizon: ClassVar[float] = math.inf

    t_min: Number = number(0.002)
    t_max: Number = number(80.0)

    def __check_init__(self):
        check_number("t_min", self.t_min, above=0.0)

    def alpha(self, t: Array) -> Array:
        """1."""
        return jnp.ones_like(t)

    def sigma(self, t: Array) -> Array:
        """t."""
        return t

    def log_snr(self, t: Array) -> Array:
        """-2 log t."""
        return -2 * jnp.log(t)

    def unbounded_time(self, log_snr: Array) -> Array:
        """Inverse of `log_snr`: exp(-log_snr / 2)."""
        return jnp.exp(-0.5 * log_snr)

    def unit_time(self, t: Array) -> Array:
        """2 / pi arctan t: the time at which `Cosine` has the noise level t, for t has no end."""
        return 2 / math.pi * jnp.arctan(t)

    def times(self, num_steps: int, t_end: float = 0.0) -> Array:
        """The paper's grid (equation 5) with rho = 7.

        `t_end = 0` gives `num_steps` levels from t_max to t_min, then 0; another `t_end` gives
        `num_steps + 1` levels that end there.
        """
        to_zero = isinstance(t_end, float) and t_end == 0
        low = (self.t_min if to_zero else t_end) ** (1 / 7)
        high = self.t_max ** (1 / 7)
        ramp = jnp.linspace(0.0, 1.0, max(num_steps, 2) if to_zero else num_steps + 1)
        levels = ((high + ramp * (low - high)) ** 7).at[0].set(self.t_max)
        if to_zero:
            return jnp.append(levels[:num_steps], 0.0)
        return levels.at[-1].set(t_end)
