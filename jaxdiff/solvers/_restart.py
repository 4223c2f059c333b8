"""Restart sampling."""

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxdiff._tree import number, root
from jaxdiff.solvers._base import DiffusionSolver, Problem, Step, check_memoryless
from jaxdiff.solvers._edm_heun import EDMHeun
from jaxdiff.solvers._grids import karras_times


class RestartInterval(eqx.Module):
    """A range of noise levels to go through again.

    Args:
        low: its lowest noise level sigma / alpha, > 0; moved to the nearest level of the grid,
            and if that is not below `high`, the interval is left out.
        high: its highest noise level, > low.
        num_steps: steps of one pass, >= 1.
        num_restarts: passes, >= 1.

    Raises:
        ValueError: for levels in the wrong order, or counts below one.
    """

    low: float = number(0.06)
    high: float = number(0.3)
    num_steps: int = eqx.field(default=2, static=True)
    num_restarts: int = eqx.field(default=2, static=True)

    def __check_init__(self):
        if all(isinstance(k, float) for k in (self.low, self.high)) and self.high <= self.low:
            raise ValueError(f"`high` must be above `low` = {self.low}, got {self.high}.")
        if self.num_steps < 1 or self.num_restarts < 1:
            raise ValueError(
                "`num_steps` and `num_restarts` must be at least 1, got "
                f"{self.num_steps} and {self.num_restarts}. Leave the interval out instead."
            )


class Restart(DiffusionSolver):
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
    noise: float = number(1.0)

    @property
    def stochastic(self) -> bool:
        """True."""
        return True

    def plan(self, problem: Problem) -> tuple[PyTree, tuple[Array, ...]]:
        """The base's plan, and for each interval whether a step ends at its lower end."""
        process, ends = problem.process, problem.times[1:]
        levels = jnp.exp(-process.log_snr(jnp.maximum(ends, process.t_min)) / 2)

        def starts(interval: RestartInterval) -> Array:
            nearest = jnp.argmin(jnp.abs(levels - interval.low))
            return (jnp.arange(problem.num_steps) == nearest) & (levels < interval.high)

        return self.base.plan(problem), tuple(starts(interval) for interval in self.intervals)

    def init_memory(self, problem: Problem, x: Array) -> PyTree:
        """The base's, which must be empty."""
        problem = dataclasses.replace(problem, plan=problem.plan[0])
        return check_memoryless(self.base, self.base.init_memory(problem, x))

    def update(self, problem: Problem, x: Array, step: Step) -> tuple[Array, PyTree, Array]:
        """See `DiffusionSolver`."""
        plan, starts = step.plan
        x, memory, nfe = self.base.update(problem, x, dataclasses.replace(step, plan=plan))
        nfe = jnp.asarray(nfe, jnp.int32)
        for j, interval in enumerate(self.intervals):
            inner = dataclasses.replace(step, key=jax.random.fold_in(step.key, j))
            again = partial(self._restart, problem, interval, inner)
            x, nfe = jax.lax.cond(starts[j], again, lambda x, nfe: (x, nfe), x, nfe)
        return x, memory, nfe

    def _restart(self, problem: Problem, interval: RestartInterval, step: Step, x: Array, nfe):
        """All passes of an interval whose lower end is `step.s`."""
        process, low = problem.process, step.s
        high = process.time(-2 * jnp.log(jnp.asarray(interval.high, low.dtype)))
        times = karras_times(process, interval.num_steps, t_start=high, t_end=low)
        inner = dataclasses.replace(problem, times=times)
        plan = self.base.plan(inner)
        ratio = process.alpha(high) / process.alpha(low)
        std = self.noise * root(process.sigma(high) ** 2 - (ratio * process.sigma(low)) ** 2)

        def descend(carry, row):
            x, nfe, key = carry
            t, s, i, plan = row
            step = Step(t, s, jax.random.fold_in(key, i), plan, None)
            x, _, spent = self.base.update(inner, x, step)
            return (x, nfe + spent, key), None

        def one_pass(i, carry):
            x, nfe = carry
            noise_key, key = jax.random.split(jax.random.fold_in(step.key, i))
            x = (ratio * x + std * jax.random.normal(noise_key, x.shape, x.dtype)).astype(x.dtype)
            rows = times[:-1], times[1:], jnp.arange(interval.num_steps), plan
            return jax.lax.scan(descend, (x, nfe, key), rows)[0][:2]

        return jax.lax.fori_loop(0, interval.num_restarts, one_pass, (x, nfe))
