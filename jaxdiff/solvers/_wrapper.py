"""Solvers around another solver."""

import dataclasses
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff.denoiser import Estimate
from jaxdiff.processes import GaussianProcess
from jaxdiff.solvers._base import DiffusionSolver, ExplicitSolver, Moved, Problem, check_base
from jaxdiff.stepwise import Step


class WrapperPlan(eqx.Module):
    """The plan of the solver inside, and the wrapper's own."""

    base: PyTree
    own: PyTree


class SolverWrapper(DiffusionSolver):
    """Base of the solvers that change the steps of another one: `base`.

    Plan, memory, default times and the check of the start are the base's. A wrapper defines
    `update`, with these moves:

        self.move_base(problem, x, step)                the base's step, as part of this one
        self.advance_base(problem, x, step, estimate)   the same from an estimate that is there
        self.repeat_base(problem, x, step)              the base's step, as a step of its own
        self.run_base(problem, x, times, step)          such steps along an inner grid

    and `own_plan` where it has coefficients of its own, found in `step.plan.own`. Maps inside the
    denoiser see the wrapper's step in the first two cases, and a new one in the others.
    """

    base: eqx.AbstractVar[DiffusionSolver]

    # Whether steps are inserted, of which a base with a memory would not know; refused when the
    # wrapper is made, and not only when it inserts them.
    inserts_steps: ClassVar[bool] = False

    def __check_init__(self):
        check_base(self, self.base)
        if self.base.couples:
            raise TypeError(
                f"`base` of {type(self).__name__} must move examples by themselves, got "
                f"{type(self.base).__name__}. Put the population around the wrapper instead."
            )
        if self.inserts_steps:
            self._check_single_steps()

    def _check_single_steps(self):
        if self.base.has_memory:
            raise ValueError(
                f"`base` of {type(self).__name__} must be a solver of single steps, got "
                f"{type(self.base).__name__}, which remembers earlier ones. Use e.g. DPMSolver."
            )

    @property
    def has_memory(self) -> bool:
        """The base's."""
        return self.base.has_memory

    @property
    def model(self) -> type:
        """The base's."""
        return self.base.model

    @property
    def stochastic(self) -> bool:
        """The base's."""
        return self.base.stochastic

    def own_plan(self, problem: Problem) -> PyTree:
        """The wrapper's own coefficients: arrays with one row per step, or None."""
        del problem

    def plan(self, problem: Problem) -> WrapperPlan:
        """See `DiffusionSolver`."""
        return WrapperPlan(self.base.plan(problem), self.own_plan(problem))

    def init_memory(self, problem: Problem, x: Array) -> PyTree:
        """The base's."""
        return self.base.init_memory(_with_plan(problem, problem.plan.base), x)

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

    def check_cond(self, cond: PyTree) -> None:
        """The base's."""
        self.base.check_cond(cond)

    def move_base(self, problem: Problem, x: Array, step: Step) -> Moved:
        """The base's step, as part of this one."""
        step = dataclasses.replace(step, plan=step.plan.base)
        return self.base.take_within(_with_plan(problem, problem.plan.base), x, step)

    def advance_base(self, problem: Problem, x: Array, step: Step, estimate: Estimate) -> Moved:
        """The base's step from an estimate at (x, step.t), which may have been changed.

        Raises:
            TypeError: for a base that does not start from an estimate.
        """
        base = check_explicit(self, self.base)
        step = dataclasses.replace(step, plan=step.plan.base)
        return base.advance(_with_plan(problem, problem.plan.base), x, step, estimate)

    def repeat_base(self, problem: Problem, x: Array, step: Step) -> Moved:
        """The base's step as a step of its own, in which maps of the denoiser draw anew.

        Args:
            problem: the wrapper's.
            x: the state at `step.t`.
            step: the wrapper's, with a fresh key and the notes to go on from.

        Raises:
            ValueError: for a base with a memory, which would take a changed past for its own.
        """
        self._check_single_steps()
        step = dataclasses.replace(step, plan=step.plan.base)
        return self.base.take(_with_plan(problem, problem.plan.base), x, step)

    def run_base(self, problem: Problem, x: Array, times: Array, step: Step) -> Moved:
        """Several steps of the base along an inner grid, each a step of its own.

        Args:
            problem: the wrapper's.
            x: the state at `times[0]`.
            times: the inner grid, `(n + 1,)`.
            step: the wrapper's, with a key of which step i takes `fold_in(key, i)`, and the notes
                to go on from.

        Raises:
            ValueError: for a base with a memory, as of `repeat_base`.
        """
        self._check_single_steps()
        inner = dataclasses.replace(problem, times=times)
        inner = _with_plan(inner, self.base.plan(inner))

        def move(carry, row):
            x, nfe, notes = carry
            t, s, i, plan = row
            own = Step(
                t, s, _key(step.key, i), plan, None, step.index, notes, num_steps=step.num_steps
            )
            moved = self.base.take(inner, x, own)
            return (moved.x, nfe + moved.nfe, moved.notes), None

        rows = times[:-1], times[1:], jnp.arange(inner.num_steps), inner.plan
        start = x, jnp.zeros((), jnp.int32), step.notes
        (x, nfe, notes), _ = jax.lax.scan(move, start, rows)
        return Moved(x, None, nfe, notes)


def check_explicit(around: DiffusionSolver, base: DiffusionSolver) -> ExplicitSolver:
    """The base, after checking that it steps from an estimate.

    Raises:
        TypeError: naming both.
    """
    if not isinstance(base, ExplicitSolver):
        raise TypeError(
            f"`base` of {type(around).__name__} must be an ExplicitSolver, such as DDIM() or "
            f"DPMSolverMultistep(), got {type(base).__name__}."
        )
    return base


def _key(key: PRNGKeyArray, i: Array) -> Any:
    return None if key is None else jax.random.fold_in(key, i)


def _with_plan(problem: Problem, plan: PyTree) -> Problem:
    return dataclasses.replace(problem, plan=plan)
