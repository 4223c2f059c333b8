"""What every diffusion solver shares: the problem it reads, its clock, and its grid.

A solver of this library is a diffrax solver that reads everything from `args`, a `Problem`,
and not from the terms, because diffrax wraps those. It integrates in an increasing clock: -t
when sampling, t when inverting, so that diffrax never negates time. What is left to a method
is one update rule, "from t to s".
"""

from abc import abstractmethod
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff.denoiser import Denoiser
from jaxdiff.processes import Process


class Problem(eqx.Module):
    """One example's integration: its denoiser, condition, randomness and grid.

    Attributes:
        denoiser: the denoiser.
        cond: its condition, for one example.
        key: the example's own key, or None where nothing is random.
        times: the whole grid, `(num_steps + 1,)`; a method with an end rule compares with it.
        direction: -1 from noise to data, +1 from data to noise.
    """

    denoiser: Denoiser
    cond: PyTree
    key: PRNGKeyArray | None
    times: Array
    direction: int = eqx.field(static=True)

    @property
    def process(self) -> Process:
        """The denoiser's process."""
        return self.denoiser.process

    @property
    def num_steps(self) -> int:
        """Number of steps of the grid."""
        return self.times.shape[0] - 1

    def x0(self, x: Array, t: Array) -> Array:
        """The denoiser's E[x0 | x_t = x]: one network evaluation."""
        return self.denoiser(x, t, self.cond)

    def eps(self, x: Array, t: Array, x0: Array) -> Array:
        """The noise that x0 implies, (x - alpha x0) / sigma."""
        return (x - self.process.alpha(t) * x0) / self.process.sigma(t)


class SolverState(eqx.Module):
    """Steps taken, network evaluations spent, and whatever else a method remembers."""

    step: Array
    nfe: Array
    memory: PyTree


class DiffusionSolver(diffrax.AbstractSolver):
    """Base of the solvers that know they integrate a denoiser.

    A method defines `update`; methods with a history define `init_memory` as well.
    """

    term_structure: ClassVar = diffrax.ODETerm
    interpolation_cls: ClassVar = diffrax.LocalLinearInterpolation

    @abstractmethod
    def update(
        self,
        problem: Problem,
        x: Array,
        t: Array,
        s: Array,
        *,
        key: PRNGKeyArray | None,
        memory: PyTree,
    ) -> tuple[Array, PyTree, Array | int]:
        """One step of one example from time t to time s.

        Args:
            problem: denoiser, condition and grid.
            x: the state at t, `(*event)`.
            t: current time.
            s: target time.
            key: this step's own key; None where the problem has none.
            memory: what the previous step left.

        Returns:
            The state at s, the memory for the next step, and the number of network
            evaluations spent.
        """

    @property
    @abstractmethod
    def stochastic(self) -> bool:
        """Whether a step draws noise."""

    def init_memory(self, problem: Problem, x: Array) -> PyTree:
        """What the first step finds in `memory`."""
        del problem, x
        return None

    def order(self, terms: Any) -> int:
        """See diffrax; adaptive step sizes are not offered, so nothing depends on it."""
        del terms
        return 1

    def init(self, terms, t0, t1, y0, args) -> SolverState:
        """See diffrax."""
        del terms, t0, t1
        zero = jnp.zeros((), jnp.int32)
        return SolverState(zero, zero, self.init_memory(args, y0))

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """See diffrax."""
        del terms, made_jump
        t, s = args.direction * t0, args.direction * t1
        key = None if args.key is None else jax.random.fold_in(args.key, solver_state.step)
        y1, memory, nfe = self.update(args, y0, t, s, key=key, memory=solver_state.memory)
        state = SolverState(solver_state.step + 1, solver_state.nfe + nfe, memory)
        return y1, None, dict(y0=y0, y1=y1), state, diffrax.RESULTS.successful

    def func(self, terms, t0, y0, args):
        """See diffrax."""
        return terms.vf(t0, y0, args)


class GridSteps(diffrax.AbstractStepSizeController):
    """Step to given clock values, like `diffrax.StepTo`, without its runtime checks.

    Those are host callbacks, which on a mesh bring communication into a loop that needs none.
    The grid is checked when the program is traced instead.
    """

    clock: Array

    def wrap(self, direction):
        """See diffrax; the clock increases already."""
        del direction
        return self

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        """See diffrax."""
        del terms, t0, t1, y0, dt0, args, func, error_order
        return self.clock[1], jnp.asarray(2, jnp.int32)

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        """See diffrax."""
        del t0, y0, y1_candidate, args, y_error, error_order
        following = self.clock[controller_state]
        return True, t1, following, False, controller_state + 1, diffrax.RESULTS.successful
