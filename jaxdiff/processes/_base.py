"""The forward process: everything follows from alpha(t) and sigma(t)."""

from abc import abstractmethod
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff._tree import derivative


class Process(eqx.Module):
    """A Gaussian noising process, x_t = alpha(t) x0 + sigma(t) eps with eps ~ N(0, I).

    Time grows with noise. A process defines `alpha`, `sigma` and the range
    `[t_min, t_max]` on which its log-SNR, drift and diffusion are finite in float32; the
    rest is derived. alpha and sigma themselves are defined on all of `[0, horizon]`, so that a
    sampler may start and end there. `log_snr` must decrease strictly.

    The equivalent SDE is dx = f(t) x dt + g(t) dw with f = `drift` and g = `diffusion`:
    f = d log alpha / dt and g^2 = -sigma^2 d log_snr / dt.

    All methods are elementwise over `t`.

    Reference:
        Kingma, Salimans, Poole, Ho, "Variational Diffusion Models", 2021, arXiv 2107.00630,
        section 3.1; Song et al., "Score-Based Generative Modeling through Stochastic
        Differential Equations", 2021, arXiv 2011.13456, section 3.
    """

    horizon: ClassVar[float] = 1.0

    t_min: eqx.AbstractVar[float]
    t_max: eqx.AbstractVar[float]

    @abstractmethod
    def alpha(self, t: Array) -> Array:
        """Signal scale alpha(t)."""

    @abstractmethod
    def sigma(self, t: Array) -> Array:
        """Noise standard deviation sigma(t)."""

    def log_snr(self, t: Array) -> Array:
        """log(alpha^2 / sigma^2); twice DPM-Solver's lambda."""
        return 2 * (jnp.log(self.alpha(t)) - jnp.log(self.sigma(t)))

    def time(self, log_snr: Array) -> Array:
        """The t in [t_min, t_max] of a log-SNR: the inverse of `log_snr`.

        By bisection to the resolution of the dtype. One closing Newton step gives the exact
        derivative; values outside the range of `log_snr` return the nearer end.
        """
        log_snr = jnp.asarray(log_snr)
        low = jnp.full_like(log_snr, self.t_min)
        high = jnp.full_like(log_snr, self.t_max)

        def halve(_, bounds):
            low, high = bounds
            middle = (low + high) / 2
            noisier = self.log_snr(middle) < log_snr
            return jnp.where(noisier, low, middle), jnp.where(noisier, middle, high)

        low, high = jax.lax.fori_loop(0, jnp.finfo(low.dtype).nmant + 12, halve, (low, high))
        t = jax.lax.stop_gradient((low + high) / 2)
        newton = t - (self.log_snr(t) - log_snr) / derivative(self.log_snr, t)
        return jnp.clip(newton, self.t_min, self.t_max)

    def drift(self, t: Array) -> Array:
        """f(t) = d log alpha / dt of the SDE dx = f x dt + g dw."""
        return derivative(self.alpha, t) / self.alpha(t)

    def diffusion(self, t: Array) -> Array:
        """g(t) >= 0 of the SDE dx = f x dt + g dw: g^2 = -sigma^2 d log_snr / dt."""
        return self.sigma(t) * jnp.sqrt(-derivative(self.log_snr, t))

    def marginal(self, x0: Array, eps: Array, t: Array) -> Array:
        """x_t = alpha(t) x0 + sigma(t) eps for one example: x0 and eps `(*event)`, t scalar."""
        return self.alpha(t) * x0 + self.sigma(t) * eps

    def times(self, num_steps: int, t_end: float = 0.0) -> Array:
        """The grid customary for this process: uniform in t, from t_max down to `t_end`.

        Args:
            num_steps: number of steps, >= 1.
            t_end: last time.

        Returns:
            Decreasing times, `(num_steps + 1,)`.
        """
        return jnp.linspace(self.t_max, t_end, num_steps + 1)
