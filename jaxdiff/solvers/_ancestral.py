"""Ancestral sampling."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._tree import number
from jaxdiff.denoiser import LearnedVarianceDenoiser
from jaxdiff.solvers._base import DiffusionSolver, Problem, Step
from jaxdiff.solvers._ddim import posterior_std


def ancestral_step(
    problem: Problem,
    x: Array,
    t: Array,
    s: Array,
    x0: Array,
    variance: Array | float,
    key: PRNGKeyArray,
) -> Array:
    """One draw of p(x_s | x_t) around x0, `variance` as in `Ancestral`, scalar or `(*event)`."""
    process = problem.process
    alpha, sigma = process.alpha(s), process.sigma(s)
    decay = process.alpha(t) * sigma / (alpha * process.sigma(t))
    mean = alpha * x0 + sigma * decay * problem.eps(x, t, x0)
    # The interpolated std is posterior_std (sigma_t / sigma_s)^v, which is 0 at sigma_s = 0.
    ratio = process.sigma(t) / jnp.where(sigma > 0, sigma, 1.0)
    std = posterior_std(problem, t, s) * ratio**variance
    return mean + std * jax.random.normal(key, x.shape, x.dtype)


class Ancestral(DiffusionSolver):
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

    variance: float = number(0.0)

    @property
    def stochastic(self) -> bool:
        """True."""
        return True

    def update(self, problem: Problem, x: Array, step: Step) -> tuple[Array, PyTree, int]:
        """See `DiffusionSolver`."""
        t, s = step.t, step.s
        x0 = problem.x0(x, t)
        return ancestral_step(problem, x, t, s, x0, self.variance, step.key), step.memory, 1


class LearnedAncestral(DiffusionSolver):
    """`Ancestral` with the interpolation the network predicts, element by element.

    The denoiser must be a `LearnedVarianceDenoiser`; its v is clipped to [0, 1].

    Reference: Nichol, Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021,
    arXiv 2102.09672, section 3.1.
    """

    @property
    def stochastic(self) -> bool:
        """True."""
        return True

    def update(self, problem: Problem, x: Array, step: Step) -> tuple[Array, PyTree, int]:
        """See `DiffusionSolver`."""
        t, s = step.t, step.s
        if not isinstance(problem.denoiser, LearnedVarianceDenoiser):
            raise TypeError(
                "`LearnedAncestral` needs a LearnedVarianceDenoiser, got "
                f"{type(problem.denoiser).__name__}. Use Ancestral for other denoisers."
            )
        x0, variance = problem.denoiser.with_variance(x, t, problem.cond)
        variance = jnp.clip(variance, 0.0, 1.0)
        return ancestral_step(problem, x, t, s, x0, variance, step.key), step.memory, 1
