"""Fixed-point inversion of DDIM."""

from abc import abstractmethod
from collections.abc import Callable

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from jaxdiff._checks import check_count
from jaxdiff.processes import GaussianProcess
from jaxdiff.solvers._base import DiffusionSolver, Moved, Problem
from jaxdiff.solvers._ddim import DDIM
from jaxdiff.stepwise import Step


def transfer(process: GaussianProcess, x: Array, eps: Array, t: Array, s: Array) -> Array:
    """DDIM's step from x_t to s with a given noise: A x + B eps.

    A = alpha_s / alpha_t, B = sigma_s - A sigma_t. With the same eps, the step from s to t is its
    inverse.
    """
    ratio = process.alpha(s) / process.alpha(t)
    return ratio * x + (process.sigma(s) - ratio * process.sigma(t)) * eps


def implicit_map(problem: Problem, x: Array, step: Step) -> Callable[[Array], Array]:
    """G, whose fixed point z at time s is the state that DDIM's step from s to t takes to x.

    G(z) = A x + B eps_hat(z, s), one evaluation.

    Args:
        problem: holds the denoiser.
        x: the state at `step.t`, the less noisy time.
        step: the times.
    """

    def apply(z: Array) -> Array:
        eps = problem.eps(z, step.s, problem.x0(z, step.s))
        return transfer(problem.process, x, eps, step.t, step.s).astype(x.dtype)

    return apply


class ImplicitInversion(DiffusionSolver):
    """Base of the methods that invert the steps of DDIM themselves, by iterating.

    A step of sampling is DDIM's. A method defines `num_iterations`, evaluations for each step of
    inverting, and `solve`.
    """

    num_iterations: eqx.AbstractVar[int]

    def __check_init__(self):
        remedy = "Use DDIM() to invert without iterations."
        check_count("num_iterations", self.num_iterations, instead=remedy)

    @abstractmethod
    def solve(self, problem: Problem, x: Array, step: Step) -> Array:
        """The state at `step.s` that a step of DDIM takes to x."""

    @property
    def stochastic(self) -> bool:
        """No noise is drawn."""
        return False

    def check_start(self, process: GaussianProcess, times: Array, memory: PyTree) -> None:
        """Anywhere: evaluations are at the noisier end of a step."""

    def update(self, problem: Problem, x: Array, step: Step) -> Moved:
        """See `DiffusionSolver`."""
        if problem.direction == -1:
            return DDIM().update(problem, x, step)
        nfe = self.num_iterations * problem.cost
        return Moved(self.solve(problem, x, step), step.memory, nfe)


class FixedPointInversion(ImplicitInversion):
    """Inverts the steps of DDIM themselves, by fixed-point iteration.

    The step of DDIM from the noisier s to t ends at x iff it starts at the fixed point of

    G(z) = A x + B eps_hat(z, s),    A = alpha_s / alpha_t, B = sigma_s - A sigma_t.

    A step of inverting iterates z <- G(z) from z = x, one evaluation each time; DDIM inversion
    is one such iteration with eps_hat(x, t). The error shrinks geometrically where |B| times the
    Lipschitz constant of eps_hat is below 1. For Gaussian data it always is: the factor is at
    most 1 - sigma_t alpha_s / (sigma_s alpha_t).

    A step of sampling is DDIM's, so that `denoise` on the same times in reverse returns to the
    start of `invert`, to the accuracy of the fixed points. No evaluation is at the first time of
    `invert`, so that it may start at sigma = 0.

    Args:
        num_iterations: evaluations for each step of inverting, >= 1.

    Raises:
        ValueError: for `num_iterations` below 1.

    Reference: Pan, Gherardi, Xie, Huang, "Effective Real Image Editing with Accelerated
    Iterative Diffusion Inversion", 2023, arXiv 2309.04907, section 3, without the Anderson
    acceleration.
    """

    num_iterations: int = eqx.field(default=5, static=True)

    def solve(self, problem: Problem, x: Array, step: Step) -> Array:
        """See `ImplicitInversion`."""
        improve = implicit_map(problem, x, step)
        return jax.lax.fori_loop(0, self.num_iterations, lambda _, z: improve(z), x)
