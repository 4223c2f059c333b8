"""Predictor-corrector sampling."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._tree import number
from jaxdiff.solvers._ancestral import Ancestral
from jaxdiff.solvers._base import DiffusionSolver, Problem, Step


class PredictorCorrector(DiffusionSolver):
    """Langevin steps at the current noise level, then a step of another solver.

    Each of the M corrections at time t is

        x <- x + e score + sqrt(2 e) n,    e = 2 (snr |n| / |score|)^2,

    which moves x towards the marginal of t, with norms over one example. For n of d dimensions
    and a Gaussian of variance v, e is about 2 snr^2 v: the variance comes out as
    (1 + snr^2) v. M + 1 evaluations a step, when the predictor takes one.

    Args:
        predictor: the solver.
        num_corrections: M, >= 0.
        snr: size of the Langevin steps relative to the noise, > 0; the authors take 0.16 for
            CIFAR-10 and VE.

    Raises:
        ValueError: for a negative number of corrections.

    Reference: Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole, "Score-Based Generative Modeling
    through Stochastic Differential Equations", 2021, arXiv 2011.13456, algorithms 2 to 5. As in
    the authors' code, corrections come before the prediction, so that no step is left at
    sigma = 0. There norms are averaged over the batch, which makes samples depend on each
    other, and e has a further factor of 1 - beta for VP, which is 0.98 to 1.
    """

    predictor: DiffusionSolver = Ancestral()
    num_corrections: int = eqx.field(default=1, static=True)
    snr: float = number(0.16)

    def __check_init__(self):
        if self.num_corrections < 0:
            raise ValueError(f"`num_corrections` must be >= 0, got {self.num_corrections}.")

    @property
    def stochastic(self) -> bool:
        """True."""
        return True

    def plan(self, problem: Problem) -> PyTree:
        """The predictor's."""
        return self.predictor.plan(problem)

    def init_memory(self, problem: Problem, x: Array) -> PyTree:
        """The predictor's."""
        return self.predictor.init_memory(problem, x)

    def correct(self, problem: Problem, x: Array, t: Array, key: PRNGKeyArray) -> Array:
        """One Langevin step at time t."""
        score = -problem.eps(x, t, problem.x0(x, t)) / problem.process.sigma(t)
        noise = jax.random.normal(key, x.shape, x.dtype)
        step_size = 2 * self.snr**2 * jnp.sum(noise**2) / jnp.sum(score**2)
        return (x + step_size * score + jnp.sqrt(2 * step_size) * noise).astype(x.dtype)

    def update(self, problem: Problem, x: Array, step: Step) -> tuple[Array, PyTree, Array | int]:
        """See `DiffusionSolver`."""
        predictor_key, key = jax.random.split(step.key)

        def correct(i, x):
            return self.correct(problem, x, step.t, jax.random.fold_in(key, i))

        x = jax.lax.fori_loop(0, self.num_corrections, correct, x)
        step = dataclasses.replace(step, key=predictor_key)
        x, memory, nfe = self.predictor.update(problem, x, step)
        return x, memory, nfe + self.num_corrections
