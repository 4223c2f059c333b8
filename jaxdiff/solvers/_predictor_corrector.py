"""Predictor-corrector sampling."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jaxdiff._checks import check_count, check_number
from jaxdiff._tree import Number, number
from jaxdiff.solvers._ancestral import Ancestral
from jaxdiff.solvers._base import DiffusionSolver, Moved, Problem
from jaxdiff.solvers._wrapper import SolverWrapper
from jaxdiff.stepwise import Step


class PredictorCorrector(SolverWrapper):
    """Langevin steps at the current noise level, then a step of another solver.

    Each of the M corrections at time t is

        x <- x + e score + sqrt(2 e) n,    e = 2 (snr |n| / |score|)^2,

    which moves x towards the marginal of t, with norms over one example. For n of d dimensions
    and a Gaussian of variance v, e is about 2 snr^2 v: the variance comes out as
    (1 + snr^2) v. M + 1 evaluations a step, when the predictor takes one.

    Args:
        base: the predictor.
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

    base: DiffusionSolver = Ancestral()
    num_corrections: int = eqx.field(default=1, static=True)
    snr: Number = number(0.16)

    def __check_init__(self):
        check_count("num_corrections", self.num_corrections, least=0)
        check_number("snr", self.snr, above=0.0)

    @property
    def stochastic(self) -> bool:
        """True."""
        return True

    def langevin(self, problem: Problem, x: Array, t: Array, key: PRNGKeyArray) -> Moved:
        """One Langevin step at time t."""
        x, found = problem.settle(x, t, problem.estimate(x, t))
        score = -found.eps / problem.process.sigma(t)
        noise = jax.random.normal(key, x.shape, x.dtype)
        length = 2 * self.snr**2 * jnp.sum(noise**2) / jnp.sum(score**2)
        moved = x + length * score + jnp.sqrt(2 * length) * noise
        return Moved(moved.astype(x.dtype), None, problem.cost, found.notes)

    def update(self, problem: Problem, x: Array, step: Step) -> Moved:
        """See `DiffusionSolver`."""
        base_key, key = jax.random.split(step.key)
        notes = step.notes

        def correct(i, carry):
            x, notes = carry
            moved = self.langevin(problem, x, step.t, jax.random.fold_in(key, i))
            # What the first evaluation of the step remembers counts.
            first = jax.tree.map(lambda new, old: jnp.where(i == 0, new, old), moved.notes, notes)
            return moved.x, first

        x, notes = jax.lax.fori_loop(0, self.num_corrections, correct, (x, notes))
        moved = self.move_base(problem, x, dataclasses.replace(step, key=base_key))
        nfe = moved.nfe + self.num_corrections * problem.cost
        return moved._replace(nfe=nfe, notes=notes if self.num_corrections else moved.notes)
