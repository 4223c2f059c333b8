"""DDIM."""

from jaxtyping import Array

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, number, root
from jaxdiff.denoiser import Estimate
from jaxdiff.solvers._base import GaussianSolver, Problem
from jaxdiff.stepwise import Step


class DDIM(GaussianSolver):
    """Denoising diffusion implicit model: first order, one evaluation a step.

    x_s = alpha_s x0_hat + sqrt(sigma_s^2 - c^2) eps_hat + c n,
    c = eta sigma_s sqrt(1 - (alpha_t sigma_s / (alpha_s sigma_t))^2).

    Args:
        eta: None for the deterministic sampler (no noise is drawn); a number scales the
            standard deviation of the noise, 1 being ancestral sampling.

    Reference: Song, Meng, Ermon, "Denoising Diffusion Implicit Models", 2020,
    arXiv 2010.02502, equations 12 and 16.
    """

    eta: Number | None = number(None)

    def __check_init__(self):
        check_number("eta", self.eta, least=0.0)

    @property
    def stochastic(self) -> bool:
        """Whether `eta` is given."""
        return self.eta is not None

    def transition(
        self, problem: Problem, x: Array, step: Step, estimate: Estimate
    ) -> tuple[Array, Array | float]:
        """See `GaussianSolver`."""
        process, s = problem.process, step.s
        sigma = process.sigma(s)
        std = 0.0 if self.eta is None else self.eta * process.posterior_std(step.t, s)
        # The difference of squares may round below zero at eta = 1.
        carried = sigma if self.eta is None else root(sigma**2 - std**2)
        return process.alpha(s) * estimate.x0 + carried * estimate.eps, std
