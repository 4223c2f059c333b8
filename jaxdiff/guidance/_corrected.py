"""Reduce, reuse, recycle: corrections by Markov chain Monte Carlo at every noise level."""

import dataclasses
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff._checks import check_count
from jaxdiff.guidance._mcmc import Kernel, Langevin, Target
from jaxdiff.solvers import Ancestral, DiffusionSolver, SolverWrapper
from jaxdiff.solvers._base import Moved, Problem
from jaxdiff.stepwise import Step


class Corrected(SolverWrapper):
    """`count` steps of a Markov kernel at time t, then the step of another solver from there.

    The law that a composition of models stands for at t is not the one that a sampler brings to
    t: the kernel takes states there. At small noise that is the composition of the clean laws
    themselves. A solver around one of single steps, whose step goes on from the last estimate of
    the chain: 1 + count kernel.evaluations a step.

    Args:
        base: a solver that steps from an estimate.
        kernel: such as `Langevin()` or `Hamiltonian(adjusted=True)`.
        count: steps of it at each noise level; 0 is the base.

    Raises:
        TypeError: when called, for an adjusted kernel and a denoiser that knows no density.

    Reference: Du, Durkan, Strudel, Tenenbaum, Dieleman, Fergus, Sohl-Dickstein, Doucet, Grathwohl,
    "Reduce, Reuse, Recycle: Compositional Generation with Energy-Based Diffusion Models and MCMC",
    2023, arXiv 2302.11552. There the steps come after that of the solver, here before the next one:
    the same but at the ends, where the prior is corrected, too, and nothing at sigma = 0.
    """

    base: DiffusionSolver = Ancestral()
    kernel: Kernel = Langevin()
    count: int = eqx.field(static=True, default=3)

    inserts_steps: ClassVar[bool] = True

    def __check_init__(self):
        check_count("count", self.count, least=0)
        if not isinstance(self.kernel, Kernel):
            raise TypeError(
                f"`kernel` must be a Kernel, such as Langevin(), got {type(self.kernel).__name__}."
            )

    @property
    def stochastic(self) -> bool:
        """Whether anything is corrected, or the base draws."""
        return self.base.stochastic or self.count > 0

    def update(self, problem: Problem, x: Array, step: Step) -> Moved:
        """See `DiffusionSolver`."""
        if self.count == 0:
            return self.move_base(problem, x, step)
        base_key, start_key, key = jax.random.split(step.key, 3)
        target = Target(problem.denoiser, step.t, problem.cond)
        start = self.kernel.init(start_key, target, x)

        def one(k, chain):
            return self.kernel.step(jax.random.fold_in(key, k), target, chain)[0]

        point = jax.lax.fori_loop(0, self.count, one, start).point
        # What the first evaluation of the step remembers counts.
        found = point.estimate.replace(notes=start.point.estimate.notes)
        own = dataclasses.replace(step, key=base_key)
        moved = self.advance_base(problem, point.x, own, found)
        spent = self.count * self.kernel.evaluations * problem.cost
        return moved._replace(nfe=jnp.asarray(moved.nfe) + spent)
