"""Time travel: back by noise, and the step again."""

import dataclasses
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff._checks import check_count, check_number
from jaxdiff._tree import Number, number
from jaxdiff.solvers import DDIM, DiffusionSolver, SolverWrapper
from jaxdiff.solvers._base import Moved, Problem
from jaxdiff.stepwise import Step


class Recurrence(SolverWrapper):
    """Another solver, each of whose steps from t to s is made several times.

    After a step, noise is added back, x_t = (alpha_t / alpha_s) x_s + sqrt(...) n, and the step is
    made again, with draws of its own. With an exact step the law does not change; guided steps
    come nearer to what they ask for. A solver around one of single steps.

    Args:
        base: the solver, with guidance around it if there is any.
        count: how often each step is made; 1 is the base.
        t_low: steps that begin below are made once.
        t_high: steps that begin above are made once.

    Raises:
        ValueError: for a base with a memory, whose past would be wrong.

    Reference: Lugmayr, Danelljan, Romero, Yu, Timofte, Van Gool, "RePaint: Inpainting using
    Denoising Diffusion Probabilistic Models", 2022, arXiv 2201.09865, algorithm 1; step by step
    in Bansal et al., "Universal Guidance for Diffusion Models", 2023, arXiv 2302.07121, section
    3.3; in a part of the grid in Yu, Wang, Zhao, Ghanem, Zhang, "FreeDoM: Training-Free
    Energy-Guided Conditional Diffusion Model", 2023, arXiv 2303.09833, algorithm 2.
    """

    base: DiffusionSolver = DDIM()
    count: int = eqx.field(static=True, default=2)
    t_low: Number = number(0.0)
    t_high: Number = number(float("inf"))

    inserts_steps: ClassVar[bool] = True

    def __check_init__(self):
        check_count("count", self.count)
        check_number("t_low", self.t_low)
        check_number("t_high", self.t_high, finite=False)

    @property
    def stochastic(self) -> bool:
        """Whether anything is repeated, or the base draws."""
        return self.base.stochastic or self.count > 1

    def update(self, problem: Problem, x: Array, step: Step) -> Moved:
        """See `DiffusionSolver`."""
        moved = self.move_base(problem, x, step)
        if self.count == 1:
            return moved

        def again(moved):
            def one(k, moved):
                noise_key, key = jax.random.split(jax.random.fold_in(step.key, k))
                noise = jax.random.normal(noise_key, x.shape, x.dtype)
                back = problem.process.renoise(moved.x, noise, step.s, step.t).astype(x.dtype)
                own = dataclasses.replace(step, key=key, notes=moved.notes)
                next_ = self.repeat_base(problem, back, own)
                return next_._replace(nfe=moved.nfe + next_.nfe)

            return jax.lax.fori_loop(0, self.count - 1, one, moved)

        inside = (step.t >= self.t_low) & (step.t <= self.t_high)
        moved = moved._replace(nfe=jnp.asarray(moved.nfe, jnp.int32))
        return jax.lax.cond(inside, again, lambda moved: moved, moved)
