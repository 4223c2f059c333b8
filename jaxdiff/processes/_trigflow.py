"""TrigFlow: time is the angle between data and noise."""

import math
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, number
from jaxdiff.processes._base import GaussianProcess


class TrigFlow(GaussianProcess):
    """alpha = cos t, sigma = sigma_data sin t: the time of this process is an angle, [0, pi/2].

    Args:
        sigma_data: standard deviation of the data; the noise has the same.

    Reference:
        Lu, Song, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models",
        2024, arXiv 2410.11081, section 3. There z ~ N(0, sigma_data^2 I); here eps ~ N(0, I)
        and sigma carries sigma_data.
    """

    horizon: ClassVar[float] = math.pi / 2

    sigma_data: Number = number(0.5)
    t_min: Number = number(1e-4)
    t_max: Number = number(math.pi / 2 - 1e-4)

    def __check_init__(self):
        check_number("sigma_data", self.sigma_data, above=0.0)

    def alpha(self, t: Array) -> Array:
        """cos t."""
        return jnp.cos(t)

    def sigma(self, t: Array) -> Array:
        """sigma_data sin t."""
        return self.sigma_data * jnp.sin(t)

    def log_snr(self, t: Array) -> Array:
        """-2 log(sigma_data tan t)."""
        return -2 * (jnp.log(self.sigma_data) + jnp.log(jnp.tan(t)))

    def unbounded_time(self, log_snr: Array) -> Array:
        """Inverse of `log_snr`: arctan(exp(-log_snr / 2) / sigma_data)."""
        return jnp.arctan(jnp.exp(-0.5 * log_snr) / self.sigma_data)
