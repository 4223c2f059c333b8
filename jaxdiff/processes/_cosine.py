"""The cosine schedule, in continuous time."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, number, root
from jaxdiff.processes._base import GaussianProcess


class Cosine(GaussianProcess):
    """alpha = cos(u) / cos(u_0), u = (pi/2) (t + offset) / (1 + offset), sigma^2 = 1 - alpha^2.

    t in [0, 1]. `offset=0` is alpha = cos(pi t / 2); `offset=0.008` is iDDPM's, whose
    discrete table additionally clips beta at 0.999 (build that one with `Tabulated`).

    Args:
        offset: the paper's s >= 0: how far from zero the noise starts to grow.

    Reference:
        Nichol, Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021,
        arXiv 2102.09672, equation 17.
    """

    offset: Number = number(0.0)
    t_min: Number = number(1e-4)
    t_max: Number = number(1.0 - 1e-4)

    def __check_init__(self):
        check_number("offset", self.offset, least=0.0)

    def _start(self) -> Array | float:
        return 0.5 * jnp.pi * self.offset / (1 + self.offset)

    def _remaining(self, t: Array) -> Array:
        # pi/2 - u: 1 - t is exact near t = 1, where the cosine would lose all digits.
        return 0.5 * jnp.pi * (1 - t) / (1 + self.offset)

    def alpha(self, t: Array) -> Array:
        """cos(u) / cos(u_0)."""
        return jnp.sin(self._remaining(t)) / jnp.cos(self._start())

    def sigma(self, t: Array) -> Array:
        """sqrt(1 - alpha^2) = sqrt(sin(u - u_0) sin(u + u_0)) / cos(u_0)."""
        start = self._start()
        gained = 0.5 * jnp.pi * t / (1 + self.offset)
        square = jnp.sin(gained) * jnp.sin(gained + 2 * start)
        return root(square) / jnp.cos(start)

    def unbounded_time(self, log_snr: Array) -> Array:
        """Inverse of `log_snr`: u = arccos(alpha cos u_0) with alpha^2 = sigmoid(log_snr)."""
        start = self._start()
        # sin^2 u = 1 - cos^2 u_0 sigmoid(log_snr), without cancellation when it is small.
        cos_u = jnp.exp(0.5 * jax.nn.log_sigmoid(log_snr)) * jnp.cos(start)
        sin_u = jnp.sqrt(jax.nn.sigmoid(-log_snr) * jnp.cos(start) ** 2 + jnp.sin(start) ** 2)
        u = jnp.arctan2(sin_u, cos_u)
        return (u - start) * (1 + self.offset) / (0.5 * jnp.pi)
