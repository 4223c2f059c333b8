"""Euler-Maruyama on the reverse SDE in the process's own time."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, number
from jaxdiff.denoiser import Estimate
from jaxdiff.solvers._base import GaussianSolver, Problem
from jaxdiff.stepwise import Step


class EulerMaruyama(GaussianSolver):
    """Euler-Maruyama for the reverse-SDE family with noise level eta: weak order 1.

    dx = [f x - (1 + eta^2) / 2 g^2 score] dt + eta g dw, run backwards in t. Every eta keeps the
    marginals; eta = 1 is Anderson's reverse SDE and eta = 0 the probability-flow ODE. Unlike the
    exponential steps of `Ancestral` and `SEEDS`, it keeps not even the mean of a Gaussian
    exactly: a baseline.

    Args:
        eta: noise level, >= 0; a number, or swept.
        last_noise: whether the last step adds noise; False returns its mean, as is customary.

    Reference: Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole, "Score-Based Generative Modeling
    through Stochastic Differential Equations", 2021, arXiv 2011.13456, equations 6 and 13; the
    family: Huang, Lim, Courville, "A Variational Perspective on Diffusion-Based Generative Models
    and Score Matching", 2021, arXiv 2106.02808, section 5.
    """

    eta: Number = number(1.0)
    last_noise: bool = eqx.field(default=False, static=True)

    def __check_init__(self):
        check_number("eta", self.eta, least=0.0)

    @property
    def bounded_start(self) -> bool:
        """True."""
        return True

    @property
    def stochastic(self) -> bool:
        """True."""
        return True

    def transition(
        self, problem: Problem, x: Array, step: Step, estimate: Estimate
    ) -> tuple[Array, Array]:
        """See `GaussianSolver`."""
        process, t, h = problem.process, step.t, step.s - step.t
        score = -estimate.eps / process.sigma(t)
        g = process.diffusion(t)
        mean = x + h * (process.drift(t) * x - (1 + self.eta**2) / 2 * g**2 * score)
        std = self.eta * g * jnp.sqrt(jnp.abs(h))
        if not self.last_noise:
            std = jnp.where(step.s == problem.times[-1], 0.0, std)
        return mean, std
