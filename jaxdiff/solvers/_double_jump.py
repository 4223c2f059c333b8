"""The stochastic sampler of distilled students: two steps down, one back up."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff.solvers._base import DiffusionSolver, Moved, Problem, check_base
from jaxdiff.solvers._ddim import DDIM
from jaxdiff.solvers._wrapper import SolverWrapper, WrapperPlan
from jaxdiff.stepwise import Step


class DoubleJump(SolverWrapper):
    """Another solver's steps over two steps of the grid, each followed by noise for one of them.

    From t_i the base steps to t_{i+2}, and the forward process back to t_{i+1},

        x <- r x + sqrt(sigma_{i+1}^2 - (r sigma_{i+2})^2) n,    r = alpha_{i+1} / alpha_{i+2};

    the last step is the base's alone. With a base that is exact over such jumps every marginal is
    exact. It is made for students of half as many steps that learned to start from all times of
    this grid, `distillation.ProgressiveDistillation(shifts=2)`: jumps are twice as long as the
    grid's steps, and with a teacher that was not distilled the result is worse than without noise.

    The base's evaluations, for DDIM one a step.

    Args:
        base: a deterministic solver of single steps; `DDIM()` for denoisers, `FlowMapSteps()` for
            maps between two times.

    Raises:
        ValueError: for a base with a memory, or one that draws.

    Reference: Meng, Rombach, Gao, Kingma, Ermon, Ho, Salimans, "On Distillation of Guided
    Diffusion Models", 2022, arXiv 2210.03142, section 3.3.
    """

    base: DiffusionSolver = DDIM()

    def __check_init__(self):
        check_base(self, self.base)
        self._check_single_steps()
        if self.base.stochastic:
            raise ValueError(
                f"`base` of DoubleJump must be deterministic, got {self.base}. Its own noise is "
                "what is added."
            )

    @property
    def stochastic(self) -> bool:
        """True."""
        return True

    def plan(self, problem: Problem) -> WrapperPlan:
        """The base's plan of every jump, and where it ends."""
        times = problem.times
        ends = jnp.append(times[2:], times[-1])

        def jump(t, s):
            alone = dataclasses.replace(problem, times=jnp.stack([t, s]))
            return jax.tree.map(lambda rows: rows[0], self.base.plan(alone))

        return WrapperPlan(jax.vmap(jump)(times[:-1], ends), ends)

    def update(self, problem: Problem, x: Array, step: Step) -> Moved:
        """See `DiffusionSolver`."""
        end = step.plan.own
        moved = self.move_base(problem, x, dataclasses.replace(step, s=end))
        noise = jax.random.normal(step.key, x.shape, x.dtype)
        return moved._replace(x=problem.process.renoise(moved.x, noise, end, step.s))
