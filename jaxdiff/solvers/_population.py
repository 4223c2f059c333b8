"""Populations: particles of one problem that interact between steps."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxdiff._checks import check_count
from jaxdiff.denoiser import Estimate
from jaxdiff.processes import GaussianProcess
from jaxdiff.solvers._base import DiffusionSolver, Moved, Problem, check_base
from jaxdiff.solvers._wrapper import check_explicit
from jaxdiff.stepwise import Step, at_step, check_remembered


class PopulationSolver(DiffusionSolver):
    """Base of the solvers whose particles see each other: `size` consecutive examples together.

    Of the examples that `sample` is asked for, each `size` in a row are one population, with one
    step for all. In `update` the state, `problem.cond`, `step.key`, `step.memory` and
    `step.notes` have a leading axis of particles; times and plan are shared. Each particle draws
    from its own key, the same whatever the size; what the population draws together, such as the
    indices of a resampling, comes from `step.shared`. A population of one without interaction is
    the plain sampler.

        found = self.estimate(problem, x, step)  # of every particle, one evaluation
        x0 = found.x0 + push(found.x0)           # what couples them
        found = found.moved(problem.process, step.t, x0)
        return self.advance(problem, x, step, found)

    Args:
        base: what moves each particle.
        size: particles of a population, >= 1.
    """

    base: eqx.AbstractVar[DiffusionSolver]
    size: eqx.AbstractVar[int]

    couples: ClassVar[bool] = True

    def __check_init__(self):
        check_base(self, self.base)
        check_count("size", self.size, instead="A population of 1 is a sampler by itself.")

    def check_cond(self, cond: PyTree) -> None:
        """The base's; a population whose particles must share something refuses others here."""
        self.base.check_cond(cond)

    @property
    def stochastic(self) -> bool:
        """The base's."""
        return self.base.stochastic

    def plan(self, problem: Problem) -> PyTree:
        """The base's."""
        return self.base.plan(problem)

    def init_memory(self, problem: Problem, x: Array) -> PyTree:
        """The base's, of one particle x `(*event)`."""
        return self.base.init_memory(problem, x)

    @property
    def needs_signal(self) -> bool:
        """The base's."""
        return self.base.needs_signal

    def default_times(self, process: GaussianProcess, num_steps: int, t_end: float) -> Array:
        """The base's."""
        return self.base.default_times(process, num_steps, t_end)

    def check_start(self, process: GaussianProcess, times: Array, memory: PyTree) -> None:
        """The base's."""
        self.base.check_start(process, times, memory)

    def each(
        self, fn: Callable[..., PyTree], problem: Problem, x: Array, step: Step, *args: PyTree
    ) -> PyTree:
        """`fn(problem, x, step, *args)` of every particle by itself; `args` have its axis too."""
        own = dataclasses.replace(problem, denoiser=None)

        def one(own, x, step, *args):
            known = dataclasses.replace(own, denoiser=at_step(problem.denoiser, step))
            return fn(known, x, step, *args)

        axes = own.axes, 0, step.axes, *(0 for _ in args)
        return jax.vmap(one, axes)(own, x, step, *args)

    def estimate(self, problem: Problem, x: Array, step: Step) -> Estimate:
        """Every particle's estimate at `step.t`, one evaluation each."""
        return self.each(lambda problem, x, step: problem.estimate(x, step.t), problem, x, step)

    def advance(self, problem: Problem, x: Array, step: Step, estimate: Estimate) -> Moved:
        """The base's step of every particle from its estimate.

        Raises:
            TypeError: if the base does not start from an estimate.
        """
        base = check_explicit(self, self.base)
        return self.each(base.advance, problem, x, step, estimate)

    def move_base(self, problem: Problem, x: Array, step: Step) -> Moved:
        """The base's step of every particle."""
        return self.each(self.base.take_within, problem, x, step)

    def take(self, problem: Problem, x: Array, step: Step) -> Moved:
        """See `DiffusionSolver`; of a population, whose maps `each` tells of the step."""
        moved = Moved(*self.update(problem, x, step))
        check_remembered(problem.denoiser, step.notes, moved.notes, type(self).__name__)
        return Moved(
            moved.x.astype(x.dtype),
            moved.memory,
            jnp.broadcast_to(moved.nfe, len(x)),
            {**step.notes, **moved.notes},
        )

    def take_batch(self, problem: Problem, x: Array, step: Step) -> Moved:
        """See `DiffusionSolver`; of every population by itself."""
        count = x.shape[0] // self.size

        def group(tree):
            return jax.tree.map(lambda a: a.reshape(count, self.size, *a.shape[1:]), tree)

        own = group((problem.cond, problem.key, x, step.key, step.memory, step.notes))
        shared = group(step.shared)[:, 0]

        def one(own, shared):
            cond, key, x, step_key, memory, notes = own
            inner = dataclasses.replace(problem, cond=cond, key=key)
            told = dataclasses.replace(
                step, key=step_key, memory=memory, notes=notes, shared=shared
            )
            return self.take(inner, x, told)

        moved = jax.vmap(one)(own, shared)
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), moved)
