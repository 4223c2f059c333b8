"""Rectified flow, also known as the conditional optimal-transport path."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff._tree import Number, number
from jaxdiff.processes._base import GaussianProcess


class RectifiedFlow(GaussianProcess):
    """Straight paths: alpha = 1 - t, sigma = t, t in [0, 1] (data at 0, noise at 1).

    Reference:
        Liu, Gong, Liu, "Flow Straight and Fast: Learning to Generate and Transfer Data with
        Rectified Flow", 2022, arXiv 2209.03003; Lipman et al., "Flow Matching for Generative
        Modeling", 2022, arXiv 2210.02747, section 4.1. Both put data at t = 1.
    """

    t_min: Number = number(1e-4)
    t_max: Number = number(1.0 - 1e-4)

    def alpha(self, t: Array) -> Array:
        """1 - t."""
        return 1 - t

    def sigma(self, t: Array) -> Array:
        """t."""
        return t

    def log_snr(self, t: Array) -> Array:
        """2 log((1 - t) / t)."""
        return 2 * (jnp.log1p(-t) - jnp.log(t))

    def unbounded_time(self, log_snr: Array) -> Array:
        """Inverse of `log_snr`: sigmoid(-log_snr / 2)."""
        return jax.nn.sigmoid(-0.5 * log_snr)
