"""Weightings of the denoising loss, all in one space: factors on ||x0 - x0_hat||^2.

An error e in x0 is an error e / c_out(t) in any other prediction, so a weight w on a
prediction's squared error is the weight w / c_out^2 on x0's: ||eps - eps_hat||^2 =
SNR ||x0 - x0_hat||^2, and so on. One identity serves every prediction and every process.
"""

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, derivative, number
from jaxdiff.predictions import Eps, Prediction
from jaxdiff.processes import GaussianProcess


class Weighting(eqx.Module):
    """A factor on ||x0 - x0_hat||^2 at time t."""

    @abstractmethod
    def __call__(self, process: GaussianProcess, t: Array, density: Array) -> Array:
        """The weight.

        Args:
            process: the forward process.
            t: scalar time.
            density: p(t) of the time law; weightings that define an integral over noise levels
                divide by it, so that the integral does not depend on the law.

        Returns:
            A scalar >= 0.
        """


def _snr(process: GaussianProcess, t: Array) -> Array:
    return jnp.exp(process.log_snr(t))


class Uniform(Weighting):
    """Weight 1 on the squared error of a prediction: 1 / c_out^2 on x0's.

    `Uniform(Eps())` is DDPM's simple loss, `Uniform(Velocity())` flow matching,
    `Uniform(F(sigma_data))` EDM's weighting, `Uniform(V())` that of v-prediction, and
    `Uniform(X0())` the plain error.

    Args:
        prediction: whose error is weighted by 1.

    Reference: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020,
    arXiv 2006.11239, equation 14; Karras et al., arXiv 2206.00364, section 5; Lipman et al.,
    arXiv 2210.02747, equation 9.
    """

    prediction: Prediction = Eps()

    def __call__(self, process: GaussianProcess, t: Array, density: Array) -> Array:
        """1 / c_out(t)^2."""
        return 1 / self.prediction.coefficients(process, t)[1] ** 2


class TruncatedSNR(Weighting):
    """max(SNR, floor) on x0.

    Args:
        floor: 1 in the paper; 0 gives SNR weighting, which is `Uniform(Eps())`.

    Reference: Salimans, Ho, "Progressive Distillation for Fast Sampling of Diffusion Models",
    2022, arXiv 2202.00512, equation 9.
    """

    floor: Number = number(1.0)

    def __check_init__(self):
        check_number("floor", self.floor, least=0.0)

    def __call__(self, process: GaussianProcess, t: Array, density: Array) -> Array:
        """max(SNR, floor)."""
        return jnp.maximum(_snr(process, t), self.floor)


class MinSNR(Weighting):
    """min(SNR, gamma) on x0.

    Args:
        gamma: 5 in the paper.

    Reference: Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy",
    2023, arXiv 2303.09556, section 3.4.
    """

    gamma: Number = number(5.0)

    def __check_init__(self):
        check_number("gamma", self.gamma, above=0.0)

    def __call__(self, process: GaussianProcess, t: Array, density: Array) -> Array:
        """min(SNR, gamma)."""
        return jnp.minimum(_snr(process, t), self.gamma)


class P2(Weighting):
    """1 / (k + SNR)^gamma on eps, SNR / (k + SNR)^gamma on x0.

    Args:
        k: 1 in the paper.
        gamma: 1, or 0.5.

    Reference: Choi et al., "Perception Prioritized Training of Diffusion Models", 2022,
    arXiv 2204.00227, equation 8.
    """

    k: Number = number(1.0)
    gamma: Number = number(1.0)

    def __check_init__(self):
        check_number("k", self.k, least=0.0)
        check_number("gamma", self.gamma, least=0.0)

    def __call__(self, process: GaussianProcess, t: Array, density: Array) -> Array:
        """SNR / (k + SNR)^gamma."""
        snr = _snr(process, t)
        return snr / (self.k + snr) ** self.gamma


def _integral_weight(process: GaussianProcess, t: Array, density: Array) -> Array:
    """x0-weight of 1/2 int ||eps - eps_hat||^2 dlog_snr, estimated at t ~ density."""
    return -0.5 * derivative(process.log_snr, t) * _snr(process, t) / density


class Sigmoid(Weighting):
    """1/2 int w ||eps - eps_hat||^2 dlog_snr with w = sigmoid(bias - log_snr).

    Monotone in the noise level, hence an ELBO of noise-augmented data. Independent of the time
    law up to the ends of its range.

    Args:
        bias: b in the paper, 2 there; larger trains lower noise levels.

    Reference: Kingma, Gao, "Understanding Diffusion Objectives as the ELBO with Simple Data
    Augmentation", 2023, arXiv 2303.00848, equation 3 and appendix D.
    """

    bias: Number = number(2.0)

    def __check_init__(self):
        check_number("bias", self.bias)

    def __call__(self, process: GaussianProcess, t: Array, density: Array) -> Array:
        """1/2 sigmoid(bias - log_snr) SNR |dlog_snr/dt| / p(t)."""
        weight = jax.nn.sigmoid(self.bias - process.log_snr(t))
        return weight * _integral_weight(process, t, density)


class ELBO(Weighting):
    """1/2 int ||eps - eps_hat||^2 dlog_snr: the likelihood weighting g^2 / 2 on the score.

    Reference: Kingma, Salimans, Poole, Ho, "Variational Diffusion Models", 2021,
    arXiv 2107.00630, equation 17; Song, Durkan, Murray, Ermon, "Maximum Likelihood Training of
    Score-Based Diffusion Models", 2021, arXiv 2101.09258, theorem 1.
    """

    def __call__(self, process: GaussianProcess, t: Array, density: Array) -> Array:
        """1/2 SNR |dlog_snr/dt| / p(t)."""
        return _integral_weight(process, t, density)
