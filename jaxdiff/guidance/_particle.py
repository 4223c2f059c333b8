"""Particle guidance: samples that keep apart."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff._checks import check_callable, check_number
from jaxdiff._tree import Number, number
from jaxdiff.processes import GaussianProcess
from jaxdiff.solvers import DDIM, DiffusionSolver, PopulationSolver, bounded_times
from jaxdiff.solvers._base import Moved, Problem
from jaxdiff.stepwise import Step


class ParticleGuidance(PopulationSolver):
    """D_i + sigma^2 / alpha grad_i log Phi, log Phi = -strength / 2 sum_ij exp(-|f_i - f_j|^2 / h).

    A population of `size` consecutive examples, which repel each other: various, and no longer
    independent. The joint law is changed, and with it that of each one. h = median of squared
    distances / log size, shared by all and not differentiated, so that the forces on states add
    up to 0. A population of one, and a strength of 0, is the base.

    Args:
        base: a solver that steps from an estimate.
        size: of a population.
        strength: of the repulsion.
        least: noise level sigma / alpha below which particles are by themselves.
        features: `x0 -> (d,)` of the estimates, differentiated through the denoiser; None keeps
            the states themselves apart, and costs nothing.

    Reference: Corso, Xu, De Bortoli, Barzilay, Jaakkola, "Particle Guidance: non-I.I.D. Diverse
    Sampling with Diffusion Models", 2023, arXiv 2310.13102, section 4.
    """

    base: DiffusionSolver = DDIM()
    size: int = eqx.field(static=True, default=4)
    strength: Number = number(1.0)
    least: Number = number(0.0)
    features: Callable[[Array], Array] | None = None

    def __check_init__(self):
        check_number("strength", self.strength)
        check_number("least", self.least, least=0.0)
        if self.features is not None:
            check_callable("features", self.features, "jax.tree_util.Partial(function, weights)")

    @property
    def needs_signal(self) -> bool:
        """True."""
        return True

    def default_times(self, process: GaussianProcess, num_steps: int, t_end: float) -> Array:
        """The base's, from a noise level of 80 on at most: forces do not vanish with alpha."""
        return bounded_times(process, super().default_times(process, num_steps, t_end))

    def potential(self, f: Array) -> Array:
        """log Phi of the features `(size, d)` of a population."""
        apart = f[:, None] - f[None]
        squares = jnp.sum(apart**2, -1)
        others = squares[jnp.triu_indices(len(f), 1)]
        width = jax.lax.stop_gradient(jnp.median(others)) / jnp.log(float(len(f)))
        near = jnp.exp(-squares / jnp.where(width > 0, width, 1))
        return -self.strength / 2 * jnp.sum(near)

    def update(self, problem: Problem, x: Array, step: Step) -> Moved:
        """See `DiffusionSolver`."""
        if self.size == 1:
            return self.move_base(problem, x, step)
        if self.features is None:
            found = self.estimate(problem, x, step)
            slope = jax.grad(lambda x: self.potential(x.reshape(self.size, -1)))(x)
        else:

            def through(x):
                found = self.estimate(problem, x, step)
                return self.potential(jax.vmap(self.features)(found.x0)), found

            slope, found = jax.grad(through, has_aux=True)(x)
        process = problem.process
        alpha, sigma = process.alpha(step.t), process.sigma(step.t)
        factor = jnp.where(sigma / alpha > self.least, sigma**2 / alpha, 0)
        pushed = found.moved(process, step.t, found.x0 + factor * slope)
        return self.advance(problem, x, step, pushed)
