"""The three SDEs of score-based generative modelling: VP, sub-VP and VE.

Reference: Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole, "Score-Based Generative
Modeling through Stochastic Differential Equations", 2021, arXiv 2011.13456, section 3.4 and
appendix B.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, number, root
from jaxdiff.processes._base import GaussianProcess


def _integrated_beta(beta_min: Number, beta_max: Number, t: Array) -> Array:
    return t * (beta_min + 0.5 * (beta_max - beta_min) * t)


def _time_of_integrated_beta(beta_min: Number, beta_max: Number, integral: Array) -> Array:
    # The root of the quadratic in the form that does not cancel at small t.
    slope = beta_max - beta_min
    return 2 * integral / (beta_min + jnp.sqrt(beta_min**2 + 2 * slope * integral))


class VP(GaussianProcess):
    """Variance preserving: alpha = exp(-B/2), sigma^2 = 1 - exp(-B), B = int_0^t beta.

    beta(t) = beta_min + t (beta_max - beta_min): the continuous limit of DDPM's linear
    schedule. t in [0, 1].

    Args:
        beta_min: beta(0) > 0.
        beta_max: beta(1) > beta_min.
    """

    beta_min: Number = number(0.1)
    beta_max: Number = number(20.0)
    t_min: Number = number(1e-5)
    t_max: Number = number(1.0)

    def __check_init__(self):
        check_number("beta_min", self.beta_min, above=0.0)
        if isinstance(self.beta_min, float):
            check_number("beta_max", self.beta_max, above=self.beta_min)

    def alpha(self, t: Array) -> Array:
        """exp(-B/2)."""
        return jnp.exp(-0.5 * _integrated_beta(self.beta_min, self.beta_max, t))

    def sigma(self, t: Array) -> Array:
        """sqrt(1 - exp(-B))."""
        return root(-jnp.expm1(-_integrated_beta(self.beta_min, self.beta_max, t)))

    def log_snr(self, t: Array) -> Array:
        """-log(exp(B) - 1)."""
        integral = _integrated_beta(self.beta_min, self.beta_max, t)
        return -integral - jnp.log(-jnp.expm1(-integral))

    def unbounded_time(self, log_snr: Array) -> Array:
        """Inverse of `log_snr`: B = softplus(-log_snr), then a quadratic in t."""
        return _time_of_integrated_beta(self.beta_min, self.beta_max, jax.nn.softplus(-log_snr))


class SubVP(GaussianProcess):
    """Sub-variance preserving: alpha = exp(-B/2), sigma = 1 - exp(-B), with VP's B.

    t in [0, 1].

    Args:
        beta_min: beta(0) > 0.
        beta_max: beta(1) > beta_min.
    """

    beta_min: Number = number(0.1)
    beta_max: Number = number(20.0)
    t_min: Number = number(1e-3)
    t_max: Number = number(1.0)

    def __check_init__(self):
        check_number("beta_min", self.beta_min, above=0.0)
        if isinstance(self.beta_min, float):
            check_number("beta_max", self.beta_max, above=self.beta_min)

    def alpha(self, t: Array) -> Array:
        """exp(-B/2)."""
        return jnp.exp(-0.5 * _integrated_beta(self.beta_min, self.beta_max, t))

    def sigma(self, t: Array) -> Array:
        """1 - exp(-B)."""
        return -jnp.expm1(-_integrated_beta(self.beta_min, self.beta_max, t))

    def log_snr(self, t: Array) -> Array:
        """-B - 2 log(1 - exp(-B))."""
        integral = _integrated_beta(self.beta_min, self.beta_max, t)
        return -integral - 2 * jnp.log(-jnp.expm1(-integral))

    def unbounded_time(self, log_snr: Array) -> Array:
        """Inverse of `log_snr`.

        alpha / sigma = 1 / (2 sinh(B/2)), hence B = 2 asinh(exp(-log_snr / 2) / 2).
        """
        integral = 2 * jnp.arcsinh(jnp.exp(-0.5 * log_snr) / 2)
        return _time_of_integrated_beta(self.beta_min, self.beta_max, integral)


class VE(GaussianProcess):
    """Variance exploding: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t.

    t in [0, 1]; at t = 0 a noise of sigma_min remains.

    Args:
        sigma_min: sigma(0) > 0.
        sigma_max: sigma(1) > sigma_min.
    """

    sigma_min: Number = number(0.01)
    sigma_max: Number = number(50.0)
    t_min: Number = number(0.0)
    t_max: Number = number(1.0)

    def __check_init__(self):
        check_number("sigma_min", self.sigma_min, above=0.0)
        if isinstance(self.sigma_min, float):
            check_number("sigma_max", self.sigma_max, above=self.sigma_min)

    def alpha(self, t: Array) -> Array:
        """1."""
        return jnp.ones_like(t)

    def sigma(self, t: Array) -> Array:
        """sigma_min (sigma_max / sigma_min)^t."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def log_snr(self, t: Array) -> Array:
        """-2 log sigma."""
        return -2 * (jnp.log(self.sigma_min) + t * jnp.log(self.sigma_max / self.sigma_min))

    def unbounded_time(self, log_snr: Array) -> Array:
        """Inverse of `log_snr`: linear."""
        log_sigma = -0.5 * log_snr
        return (log_sigma - jnp.log(self.sigma_min)) / jnp.log(self.sigma_max / self.sigma_min)
