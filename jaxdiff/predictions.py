"""What a network's output means, and how it becomes E[x0 | x_t].

Every prediction is affine in the noisy input and the output,

    x0 = c_skip(t) x_t + c_out(t) output,

so two coefficients define one, and any prediction converts into any other through the one
pivot x0. Conversions are exact wherever their coefficients are finite:

    prediction  output                     x0 from the output       ill-posed at
    X0          x0                         output                   nowhere
    Eps         eps                        (x_t - sigma eps)/alpha  alpha = 0 (sigma = 0 for eps)
    V           alpha eps - sigma x0       (alpha x_t - sigma v)    sigma = 0 (for v)
                                           / (alpha^2 + sigma^2)
    Score       -eps / sigma               (x_t + sigma^2 score)    alpha = 0 (sigma = 0 for score)
                                           / alpha
    Velocity    alpha' x0 + sigma' eps     see `Velocity`           sigma = 0 (for the velocity)
    F           EDM's unit-variance F      see `F`                  sigma = 0 (for F)

The error of a round trip grows like the condition number of the map: 1/alpha for Eps and
Score at low SNR, 1/sigma at high SNR for all but X0.
"""

from abc import abstractmethod

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, derivative, number
from jaxdiff.processes import GaussianProcess


class Prediction(eqx.Module):
    """The meaning of a network's output: x0 = c_skip x_t + c_out output."""

    @abstractmethod
    def coefficients(self, process: GaussianProcess, t: Array) -> tuple[Array, Array]:
        """(c_skip, c_out) at time t, both scalars."""

    def to_x0(self, process: GaussianProcess, x: Array, t: Array, output: Array) -> Array:
        """E[x0 | x_t] of an output. x and output `(*event)`, t scalar."""
        c_skip, c_out = self.coefficients(process, t)
        return c_skip * x + c_out * output

    def from_x0(self, process: GaussianProcess, x: Array, t: Array, x0: Array) -> Array:
        """The output that means x0: the inverse of `to_x0` in `output`."""
        c_skip, c_out = self.coefficients(process, t)
        return (x0 - c_skip * x) / c_out


class X0(Prediction):
    """The clean example itself."""

    def coefficients(self, process: GaussianProcess, t: Array) -> tuple[Array, Array]:
        """(0, 1)."""
        one = jnp.ones_like(process.alpha(t))
        return 0 * one, one


class Eps(Prediction):
    """The noise eps = (x_t - alpha x0) / sigma.

    Reference: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020,
    arXiv 2006.11239, equation 11.
    """

    def coefficients(self, process: GaussianProcess, t: Array) -> tuple[Array, Array]:
        """(1, -sigma) / alpha."""
        alpha = process.alpha(t)
        return 1 / alpha, -process.sigma(t) / alpha

    def from_x0(self, process: GaussianProcess, x: Array, t: Array, x0: Array) -> Array:
        """See `Prediction`; finite where alpha is 0, too."""
        return (x - process.alpha(t) * x0) / process.sigma(t)


class V(Prediction):
    """v = alpha eps - sigma x0.

    Reference: Salimans, Ho, "Progressive Distillation for Fast Sampling of Diffusion Models",
    2022, arXiv 2202.00512, section 4. There alpha^2 + sigma^2 = 1; the division extends it to
    every process.
    """

    def coefficients(self, process: GaussianProcess, t: Array) -> tuple[Array, Array]:
        """(alpha, -sigma) / (alpha^2 + sigma^2)."""
        alpha, sigma = process.alpha(t), process.sigma(t)
        square = alpha**2 + sigma**2
        return alpha / square, -sigma / square


class Score(Prediction):
    """The score, grad log p_t(x_t) = -eps / sigma.

    Reference: Vincent, "A Connection Between Score Matching and Denoising Autoencoders",
    2011; Efron, "Tweedie's Formula and Selection Bias", 2011.
    """

    def coefficients(self, process: GaussianProcess, t: Array) -> tuple[Array, Array]:
        """(1, sigma^2) / alpha."""
        alpha = process.alpha(t)
        return 1 / alpha, process.sigma(t) ** 2 / alpha

    def from_x0(self, process: GaussianProcess, x: Array, t: Array, x0: Array) -> Array:
        """See `Prediction`; finite where alpha is 0, too."""
        return (process.alpha(t) * x0 - x) / process.sigma(t) ** 2


class Velocity(Prediction):
    """The flow velocity u = alpha' x0 + sigma' eps, primes being d/dt.

    x0 = (sigma' x_t - sigma u) / (alpha sigma' - sigma alpha'). With t towards noise; papers
    that put data at t = 1 have the opposite sign.

    Reference: Lipman et al., "Flow Matching for Generative Modeling", 2022, arXiv 2210.02747,
    equation 15.
    """

    def coefficients(self, process: GaussianProcess, t: Array) -> tuple[Array, Array]:
        """(sigma', -sigma) / (alpha sigma' - sigma alpha')."""
        alpha, sigma = process.alpha(t), process.sigma(t)
        d_alpha, d_sigma = derivative(process.alpha, t), derivative(process.sigma, t)
        determinant = alpha * d_sigma - sigma * d_alpha
        return d_sigma / determinant, -sigma / determinant


class F(Prediction):
    """EDM's F: the output that has unit variance when the data have sigma_data.

    x0 = (alpha sigma_data^2 / S) x_t + (sigma sigma_data / sqrt(S)) F with
    S = alpha^2 sigma_data^2 + sigma^2: EDM's preconditioning, for every process.

    Args:
        sigma_data: standard deviation of the data.

    Reference: Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based
    Generative Models", 2022, arXiv 2206.00364, table 1 (there alpha = 1).
    """

    sigma_data: Number = number(0.5)

    def __check_init__(self):
        check_number("sigma_data", self.sigma_data, above=0.0)

    def coefficients(self, process: GaussianProcess, t: Array) -> tuple[Array, Array]:
        """(alpha sigma_data^2 / S, sigma sigma_data / sqrt(S))."""
        alpha, sigma = process.alpha(t), process.sigma(t)
        total = (alpha * self.sigma_data) ** 2 + sigma**2
        return alpha * self.sigma_data**2 / total, sigma * self.sigma_data / jnp.sqrt(total)
