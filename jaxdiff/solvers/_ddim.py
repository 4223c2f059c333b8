"""DDIM."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxdiff._tree import _as_float, root
from jaxdiff.solvers._base import DiffusionSolver, Problem, Step


def posterior_std(problem: Problem, t: Array, s: Array) -> Array:
    """Standard deviation of q(x_s | x_t, x0), s < t: DDPM's sqrt(beta-tilde).

    sigma_s sqrt(1 - (alpha_t sigma_s / (alpha_s sigma_t))^2).
    """
    process = problem.process
    decay = process.alpha(t) * process.sigma(s) / (process.alpha(s) * process.sigma(t))
    return process.sigma(s) * jnp.sqrt(1 - decay**2)


class DDIM(DiffusionSolver):
    """Denoising diffusion implicit model: first order, one evaluation a step.

    x_s = alpha_s x0_hat + sqrt(sigma_s^2 - c^2) eps_hat + c n,
    c = eta sigma_s sqrt(1 - (alpha_t sigma_s / (alpha_s sigma_t))^2).

    Args:
        eta: None for the deterministic sampler (no noise is drawn); a number scales the
            standard deviation of the noise, 1 being ancestral sampling.

    Reference: Song, Meng, Ermon, "Denoising Diffusion Implicit Models", 2020,
    arXiv 2010.02502, equations 12 and 16.
    """

    eta: float | None = eqx.field(default=None, converter=_as_float)

    @property
    def stochastic(self) -> bool:
        """Whether `eta` is given."""
        return self.eta is not None

    def update(self, problem: Problem, x: Array, step: Step) -> tuple[Array, PyTree, int]:
        """See `DiffusionSolver`."""
        t, s = step.t, step.s
        alpha, sigma = problem.process.alpha(s), problem.process.sigma(s)
        x0 = problem.x0(x, t)
        eps = problem.eps(x, t, x0)
        if self.eta is None:
            return alpha * x0 + sigma * eps, step.memory, 1
        std = self.eta * posterior_std(problem, t, s)
        noise = jax.random.normal(step.key, x.shape, x.dtype)
        # The difference of squares may round below zero at eta = 1.
        carried = root(sigma**2 - std**2)
        return alpha * x0 + carried * eps + std * noise, step.memory, 1
