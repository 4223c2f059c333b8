"""Ancestral noise around any single-step solver."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, number, root
from jaxdiff.predictions import X0
from jaxdiff.solvers._base import DiffusionSolver, Moved, Problem
from jaxdiff.solvers._dpm_solver import DPMSolver
from jaxdiff.solvers._wrapper import SolverWrapper, WrapperPlan
from jaxdiff.stepwise import Step


class AncestralNoise(SolverWrapper):
    """Each step of another solver goes further down, and noise makes up for it.

    With noise levels k = sigma / alpha, the base goes from k_t to k_down and noise k_up is added,

        k_up = min(k_s, eta k_s sqrt(1 - k_s^2 / k_t^2)),    k_down^2 = k_s^2 - k_up^2,

    in y = x / alpha. The exact flow followed by this noise keeps every marginal, so that the weak
    order is the base's. Known as

        DPM++ 2S a     AncestralNoise(DPMSolver(2, X0()))
        DPM2 a         AncestralNoise(DPMSolver(2, Eps()))
        Euler a        AncestralNoise(DDIM()), the same as `DDIM(eta)`

    Args:
        base: a solver of single steps.
        eta: noise relative to ancestral sampling; 0 is the base.

    Raises:
        ValueError: for a base with a memory, which assumes that its steps join.

    Reference: Crowson, "k-diffusion", 2022, github.com/crowsonkb/k-diffusion,
    `get_ancestral_step`; the noise is that of Song, Meng, Ermon, "Denoising Diffusion Implicit
    Models", 2020, arXiv 2010.02502, equation 16.
    """

    base: DiffusionSolver = DPMSolver(2, X0())
    eta: Number = number(1.0)

    inserts_steps: ClassVar[bool] = True

    def __check_init__(self):
        check_number("eta", self.eta, least=0.0)

    @property
    def stochastic(self) -> bool:
        """True."""
        return True

    def own_plan(self, problem: Problem) -> tuple[Array, Array]:
        """Where the base's steps end, and the noise that makes up for it."""
        process = problem.process
        levels = process.sigma(problem.times) / process.alpha(problem.times)
        k, target = levels[:-1], levels[1:]
        up = jnp.minimum(target, self.eta * target * jnp.sqrt(1 - (target / k) ** 2))
        down = root(target**2 - up**2)
        below = process.unbounded_time(-2 * jnp.log(jnp.where(down > 0, down, 1.0)))
        return jnp.where(down > 0, below, 0.0), up

    def plan(self, problem: Problem) -> WrapperPlan:
        """See `DiffusionSolver`; the base's steps are planned one by one."""
        below, up = self.own_plan(problem)

        def one(t, s):
            inner = dataclasses.replace(problem, times=jnp.stack([t, s]))
            return jax.tree.map(lambda rows: rows[0], self.base.plan(inner))

        return WrapperPlan(jax.vmap(one)(problem.times[:-1], below), (below, up))

    def update(self, problem: Problem, x: Array, step: Step) -> Moved:
        """See `DiffusionSolver`."""
        process, (below, up) = problem.process, step.plan.own
        base_key, key = jax.random.split(step.key)
        inner = dataclasses.replace(problem, times=jnp.stack([step.t, below]))
        moved = self.move_base(inner, x, dataclasses.replace(step, s=below, key=base_key))
        y = moved.x / process.alpha(below) + up * jax.random.normal(key, x.shape, x.dtype)
        return moved._replace(x=process.alpha(step.s) * y)
