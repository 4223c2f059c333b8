"""Laws of the training time, each given by its quantile function.

t = quantile(u) with u uniform on [0, 1]; whatever lowers the variance of u (strata) therefore
works with every law.
"""

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import logit, ndtr, ndtri
from jaxtyping import Array

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, derivative, number
from jaxdiff.processes import GaussianProcess


class TimeLaw(eqx.Module):
    """A distribution on the time range [t_min, t_max] of a process."""

    @abstractmethod
    def quantile(self, process: GaussianProcess, u: Array) -> Array:
        """The time at level u in [0, 1], clipped to [t_min, t_max]."""

    @abstractmethod
    def density(self, process: GaussianProcess, t: Array) -> Array:
        """p(t)."""

    def level(self, process: GaussianProcess, t: Array) -> Array:
        """The level u of a time: the inverse of `quantile`, by bisection.

        A law that `quantile` clips has a closed form instead, which at t_min and t_max is the
        share of the law below them.
        """
        t = jnp.asarray(t)

        def halve(_, bounds):
            low, high = bounds
            middle = (low + high) / 2
            above = self.quantile(process, middle) > t
            return jnp.where(above, low, middle), jnp.where(above, middle, high)

        ends = jnp.zeros_like(t), jnp.ones_like(t)
        low, high = jax.lax.fori_loop(0, jnp.finfo(t.dtype).nmant + 4, halve, ends)
        return (low + high) / 2


class UniformTime(TimeLaw):
    """t uniform on [t_min, t_max]."""

    def quantile(self, process: GaussianProcess, u: Array) -> Array:
        """t_min + u (t_max - t_min)."""
        return process.t_min + u * (process.t_max - process.t_min)

    def level(self, process: GaussianProcess, t: Array) -> Array:
        """(t - t_min) / (t_max - t_min)."""
        return (t - process.t_min) / (process.t_max - process.t_min)

    def density(self, process: GaussianProcess, t: Array) -> Array:
        """1 / (t_max - t_min)."""
        return jnp.ones_like(t) / (process.t_max - process.t_min)


class UniformLogSNR(TimeLaw):
    """log-SNR uniform between those of t_min and t_max.

    Reference: Kingma, Salimans, Poole, Ho, "Variational Diffusion Models", 2021,
    arXiv 2107.00630, section 4.3: the integral of the bound is one over log-SNR.
    """

    def quantile(self, process: GaussianProcess, u: Array) -> Array:
        """Time of log-SNR l(t_min) + u (l(t_max) - l(t_min))."""
        clean, noisy = self._ends(process)
        return process.time(clean + u * (noisy - clean))

    def density(self, process: GaussianProcess, t: Array) -> Array:
        """|d log_snr / dt| over the range of log-SNR."""
        clean, noisy = self._ends(process)
        return derivative(process.log_snr, t) / (noisy - clean)

    def _ends(self, process: GaussianProcess) -> tuple[Array, Array]:
        dtype = jnp.result_type(float)
        t_min, t_max = (jnp.asarray(end, dtype) for end in (process.t_min, process.t_max))
        return process.log_snr(t_min), process.log_snr(t_max)


class Karras(TimeLaw):
    """(sigma / alpha)^(1 / rho) uniform between its ends: EDM's grid, as a law.

    Args:
        rho: 7 in the paper; 1 is uniform in the noise level, and a large one in its logarithm.

    Reference: Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based
    Generative Models", 2022, arXiv 2206.00364, equation 5.
    """

    rho: Number = number(7.0)

    def __check_init__(self):
        check_number("rho", self.rho, above=0.0)

    def quantile(self, process: GaussianProcess, u: Array) -> Array:
        """Time of noise level (a + u (b - a))^rho, a and b the roots of those of the ends."""
        clean, noisy = self._ends(process)
        return process.time(-2 * self.rho * jnp.log(clean + u * (noisy - clean)))

    def level(self, process: GaussianProcess, t: Array) -> Array:
        """Where the root of the noise level is between its ends."""
        clean, noisy = self._ends(process)
        return (self._root(process, t) - clean) / (noisy - clean)

    def density(self, process: GaussianProcess, t: Array) -> Array:
        """The derivative of `level`."""
        return derivative(lambda t: self.level(process, t), t)

    def _root(self, process: GaussianProcess, t: Array) -> Array:
        return jnp.exp(-0.5 * process.log_snr(t) / self.rho)

    def _ends(self, process: GaussianProcess) -> tuple[Array, Array]:
        dtype = jnp.result_type(float)
        t_min, t_max = (jnp.asarray(end, dtype) for end in (process.t_min, process.t_max))
        return self._root(process, t_min), self._root(process, t_max)


class LogNormal(TimeLaw):
    """log(sigma / alpha) ~ N(mean, std^2).

    Args:
        mean: P_mean of EDM.
        std: P_std of EDM, > 0.

    Reference: Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based
    Generative Models", 2022, arXiv 2206.00364, section 5.
    """

    mean: Number = number(-1.2)
    std: Number = number(1.2)

    def __check_init__(self):
        check_number("mean", self.mean)
        check_number("std", self.std, above=0.0)

    def quantile(self, process: GaussianProcess, u: Array) -> Array:
        """Time of log-SNR -2 (mean + std ndtri(u))."""
        return process.time(-2 * (self.mean + self.std * ndtri(u)))

    def level(self, process: GaussianProcess, t: Array) -> Array:
        """Phi((log(sigma / alpha) - mean) / std)."""
        return ndtr((-0.5 * process.log_snr(t) - self.mean) / self.std)

    def density(self, process: GaussianProcess, t: Array) -> Array:
        """N(log(sigma / alpha); mean, std^2) |d log(sigma / alpha) / dt|."""
        log_noise = -0.5 * process.log_snr(t)
        slope = -0.5 * derivative(process.log_snr, t)
        return jax.scipy.stats.norm.pdf(log_noise, self.mean, self.std) * slope


class LogitNormal(TimeLaw):
    """logit(t) ~ N(mean, std^2), for processes on [0, 1].

    Args:
        mean: location; > 0 favours noise.
        std: scale, > 0.

    Raises:
        ValueError: when used, for a process on another range, such as `EDM`.

    Reference: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image
    Synthesis", 2024, arXiv 2403.03206, section 3.1.
    """

    mean: Number = number(0.0)
    std: Number = number(1.0)

    def __check_init__(self):
        check_number("mean", self.mean)
        check_number("std", self.std, above=0.0)

    def quantile(self, process: GaussianProcess, u: Array) -> Array:
        """sigmoid(mean + std ndtri(u)).

        Raises:
            ValueError: for a process whose time is not in [0, 1].
        """
        if process.horizon != 1:
            raise ValueError(
                f"`LogitNormal` is a law on [0, 1], got the process {type(process).__name__} on "
                f"[0, {process.horizon:g}]. Use LogNormal, a law of the noise level."
            )
        t = jax.nn.sigmoid(self.mean + self.std * ndtri(u))
        return jnp.clip(t, process.t_min, process.t_max)

    def level(self, process: GaussianProcess, t: Array) -> Array:
        """Phi((logit t - mean) / std)."""
        return ndtr((logit(t) - self.mean) / self.std)

    def density(self, process: GaussianProcess, t: Array) -> Array:
        """N(logit t; mean, std^2) / (t (1 - t))."""
        logit = jnp.log(t) - jnp.log1p(-t)
        return jax.scipy.stats.norm.pdf(logit, self.mean, self.std) / (t * (1 - t))
