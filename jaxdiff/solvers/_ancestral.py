"""Ancestral sampling."""

import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, number
from jaxdiff.denoiser import Estimate
from jaxdiff.processes import GaussianProcess
from jaxdiff.solvers._base import GaussianSolver, Problem
from jaxdiff.stepwise import Step


def ancestral_kernel(
    problem: Problem, step: Step, estimate: Estimate, variance: Array | float
) -> tuple[Array, Array]:
    """Mean and standard deviation of p(x_s | x_t), `variance` as in `Ancestral`."""
    process, t, s = problem.process, step.t, step.s
    mean, _ = process.posterior(estimate.x0, estimate.eps, t, s)
    return mean, ancestral_std(process, t, s, variance)


def ancestral_std(process: GaussianProcess, t: Array, s: Array, variance: Array | float) -> Array:
    """Standard deviation of the noise of a step from t to s, `variance` as in `Ancestral`."""
    # The interpolated std is that of the posterior times (sigma_t / sigma_s)^v; 0 at sigma_s = 0.
    sigma = process.sigma(s)
    ratio = process.sigma(t) / jnp.where(sigma > 0, sigma, 1.0)
    return process.posterior_std(t, s) * ratio**variance


class Ancestral(GaussianSolver):
    """DDPM's sampler: one draw of q(x_s | x_t, x0_hat) a step, weak order one.

    x_s = alpha_s x0_hat + sigma_s e^-h eps_hat + std n with
    e^-h = alpha_t sigma_s / (alpha_s sigma_t), and std between beta-tilde,
    sigma_s^2 (1 - e^-2h), and beta, sigma_t^2 (1 - e^-2h), by interpolation of logarithms. No
    noise is added by a step that ends at sigma = 0.

    Args:
        variance: 0 for beta-tilde ("small"), optimal for point-mass data; 1 for beta
            ("large"), optimal for unit-variance data; in between, iDDPM's interpolation.

    Reference: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020,
    arXiv 2006.11239, algorithm 2 and section 3.2; Nichol, Dhariwal, "Improved Denoising
    Diffusion Probabilistic Models", 2021, arXiv 2102.09672, equation 15.
    """

    variance: Number = number(0.0)

    def __check_init__(self):
        check_number("variance", self.variance)

    @property
    def stochastic(self) -> bool:
        """True."""
        return True

    def transition(
        self, problem: Problem, x: Array, step: Step, estimate: Estimate
    ) -> tuple[Array, Array]:
        """See `GaussianSolver`."""
        return ancestral_kernel(problem, step, estimate, self.variance)


class LearnedAncestral(GaussianSolver):
    """`Ancestral` with the interpolation the network predicts, element by element.

    The denoiser must estimate a variance: a `LearnedVarianceDenoiser`, or guidance and other maps
    of one. v is clipped to [0, 1].

    Reference: Nichol, Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021,
    arXiv 2102.09672, section 3.1.
    """

    @property
    def stochastic(self) -> bool:
        """True."""
        return True

    def transition(
        self, problem: Problem, x: Array, step: Step, estimate: Estimate
    ) -> tuple[Array, Array]:
        """See `GaussianSolver`.

        Raises:
            TypeError: if no variance is estimated.
        """
        if estimate.variance is None:
            raise TypeError(
                "`LearnedAncestral` needs a LearnedVarianceDenoiser, or maps of one that keep its "
                f"variance, got {type(problem.denoiser).__name__}, which estimates none. Use "
                "Ancestral for other denoisers."
            )
        return ancestral_kernel(problem, step, estimate, jnp.clip(estimate.variance, 0.0, 1.0))
