"""Restart sampling."""

import dataclasses
from functools import partial
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff._checks import check_count, check_number
from jaxdiff._tree import Number, number
from jaxdiff.solvers._base import DiffusionSolver, Moved, Problem
from jaxdiff.solvers._edm_heun import EDMHeun
from jaxdiff.solvers._grids import karras_times
from jaxdiff.solvers._wrapper import SolverWrapper
from jaxdiff.stepwise import Step


class RestartInterval(eqx.Module):
    """A range of noise levels to go through again.

    Args:
        k_low: its lowest noise level sigma / alpha, > 0; moved to the nearest level of the grid
            that is not 0, and if that is not below `k_high`, the interval is left out.
        k_high: its highest noise level, > k_low.
        num_steps: steps of one pass, >= 1.
        num_restarts: passes, >= 1.

    Raises:
        ValueError: for levels in the wrong order, or counts below one.
    """

    k_low: Number = number(0.06)
    k_high: Number = number(0.3)
    num_steps: int = eqx.field(default=2, static=True)
    num_restarts: int = eqx.field(default=2, static=True)

    def __check_init__(self):
        check_number("k_low", self.k_low, above=0.0)
        if isinstance(self.k_low, float):
            check_number("k_high", self.k_high, above=self.k_low)
        remedy = "Leave the interval out instead."
        check_count("num_steps", self.num_steps, instead=remedy)
        check_count("num_restarts", self.num_restarts, instead=remedy)


class Restart(SolverWrapper):
    """Another solver, which goes through some ranges of noise levels several times.

    Where the grid reaches the lower end of an interval, `num_restarts` times: noise is added up
    to its upper end, by a draw of the forward process,

        x <- r x + noise sqrt(sigma_high^2 - (r sigma_low)^2) n,    r = alpha_high / alpha_low,

    and the base integrates down again, on Karras levels (rho = 7). Every pass contracts the
    errors made before it, as an SDE does, while the integration stays as accurate as an ODE's.
    With the exact flow the marginals do not change, whatever the number of passes.

    Args:
        base: the solver, of single steps.
        intervals: where to restart, in any order.
        noise: standard deviation of the added noise, relative to the exact one.

    Raises:
        ValueError: for a base with a memory, of which a restart would make the past wrong.

    Reference: Xu, Deng, Cheng, Tian, Liu, Jaakkola, "Restart Sampling for Improving Generative
    Processes", 2023, arXiv 2306.14878, algorithm 2. Written there for alpha = 1 and EDM's Heun
    steps; its N_i counts the points of a pass, `num_steps` + 1. The default interval is the one
    of its experiments on CIFAR-10.
    """

    base: DiffusionSolver = EDMHeun()
    intervals: tuple[RestartInterval, ...] = (RestartInterval(),)
    noise: Number = number(1.0)

    inserts_steps: ClassVar[bool] = True

    def __check_init__(self):
        check_number("noise", self.noise, least=0.0)

    @property
    def stochastic(self) -> bool:
        """True."""
        return True

    def own_plan(self, problem: Problem) -> tuple[Array, ...]:
        """For each interval, whether a step ends at its lower end."""
        process, ends = problem.process, problem.times[1:]
        levels = jnp.exp(-process.log_snr(jnp.maximum(ends, process.t_min)) / 2)
        # A pass ends at a level that steps in the noise level can reach.
        levels = jnp.where(ends < process.t_min, jnp.inf, levels)

        def starts(interval: RestartInterval) -> Array:
            nearest = jnp.argmin(jnp.abs(levels - interval.k_low))
            return (jnp.arange(problem.num_steps) == nearest) & (levels < interval.k_high)

        return tuple(starts(interval) for interval in self.intervals)

    def update(self, problem: Problem, x: Array, step: Step) -> Moved:
        """See `DiffusionSolver`."""
        moved = self.move_base(problem, x, step)
        for j, interval in enumerate(self.intervals):
            again = partial(self._restart, problem, interval, step, jax.random.fold_in(step.key, j))
            moved = jax.lax.cond(step.plan.own[j], again, lambda moved: moved, moved)
        return moved

    def _restart(self, problem, interval, step, key, moved: Moved) -> Moved:
        """All passes of an interval whose lower end is `step.s`."""
        process, low = problem.process, step.s
        high = process.unbounded_time(-2 * jnp.log(jnp.asarray(interval.k_high, low.dtype)))
        times = karras_times(process, interval.num_steps, t_start=high, t_end=low)

        def one_pass(i, moved):
            noise_key, base_key = jax.random.split(jax.random.fold_in(key, i))
            noise = jax.random.normal(noise_key, moved.x.shape, moved.x.dtype)
            x = process.renoise(moved.x, self.noise * noise, low, high).astype(moved.x.dtype)
            own = dataclasses.replace(step, key=base_key, notes=moved.notes)
            again = self.run_base(problem, x, times, own)
            return again._replace(memory=moved.memory, nfe=moved.nfe + again.nfe)

        return jax.lax.fori_loop(0, interval.num_restarts, one_pass, moved)
