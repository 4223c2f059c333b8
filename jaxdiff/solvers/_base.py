"""What every diffusion solver shares: the problem it reads, its clock, and its grid.

A solver of this library is a diffrax solver that reads everything from `args`, a `Problem`,
and not from the terms, because diffrax wraps those. It integrates in an increasing clock: -t
when sampling, t when inverting, so that diffrax never negates time. What is left to a method
is one update rule, "from t to s".
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
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
        plan: what the solver's `plan` made of the grid.
    """

    denoiser: Denoiser
    cond: PyTree
    key: PRNGKeyArray | None
    times: Array
    direction: int = eqx.field(static=True)
    plan: PyTree = None

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


class Step(eqx.Module):
    """One step of one example, from time t to time s.

    Attributes:
        t: current time.
        s: target time.
        key: this step's own key; None where the problem has none.
        plan: this step's row of the solver's `plan`.
        memory: what the previous step left.
    """

    t: Array
    s: Array
    key: PRNGKeyArray | None
    plan: PyTree
    memory: PyTree


class SolverState(eqx.Module):
    """Steps taken, network evaluations spent, and whatever else a method remembers."""

    step: Array
    nfe: Array
    memory: PyTree


class DiffusionSolver(diffrax.AbstractSolver):
    """Base of the solvers that know they integrate a denoiser.

    A method defines `update`; methods with a history define `init_memory` as well, and methods
    with coefficients `plan`, which computes them for the whole grid before the first step.
    """

    term_structure: ClassVar = diffrax.ODETerm
    interpolation_cls: ClassVar = diffrax.LocalLinearInterpolation

    @abstractmethod
    def update(self, problem: Problem, x: Array, step: Step) -> tuple[Array, PyTree, Array | int]:
        """One step of one example.

        Args:
            problem: denoiser, condition and grid.
            x: the state at `step.t`, `(*event)`.
            step: times, key, coefficients and memory.

        Returns:
            The state at `step.s`, the memory for the next step, and the number of network
            evaluations spent.
        """

    @property
    @abstractmethod
    def stochastic(self) -> bool:
        """Whether a step draws noise."""

    def plan(self, problem: Problem) -> PyTree:
        """Coefficients that depend on the grid alone: arrays with one row per step, or None.

        Raises:
            ValueError: if the method cannot use the grid.
        """
        del problem
        return None

    def init_memory(self, problem: Problem, x: Array) -> PyTree:
        """What the first step finds in `memory`."""
        del problem, x
        return None

    def check_start(self, process: Process, times: Array, memory: PyTree) -> None:
        """Reject a start that the method cannot make, where the numbers are known.

        Args:
            process: the forward process.
            times: the grid, with a leading axis if examples have their own.
            memory: what the run starts with, or None.

        Raises:
            ValueError: where the first evaluation is at sigma = 0.
        """
        del memory
        check_noisy_start(type(self), process, times)

    def error_order(self, terms: Any) -> float:
        """See diffrax; adaptive step sizes are not offered, so nothing depends on it."""
        del terms
        return 1.0

    def init(self, terms, t0, t1, y0, args) -> SolverState:
        """See diffrax."""
        del terms, t0, t1
        zero = jnp.zeros((), jnp.int32)
        return SolverState(zero, zero, self.init_memory(args, y0))

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """See diffrax."""
        del terms, made_jump
        index = solver_state.step
        step = Step(
            args.direction * t0,
            args.direction * t1,
            None if args.key is None else jax.random.fold_in(args.key, index),
            jax.tree.map(lambda rows: rows[index], args.plan),
            solver_state.memory,
        )
        y1, memory, nfe = self.update(args, y0, step)
        state = SolverState(index + 1, solver_state.nfe + nfe, memory)
        return y1, None, dict(y0=y0, y1=y1), state, diffrax.RESULTS.successful

    def func(self, terms, t0, y0, args):
        """See diffrax."""
        return terms.vf(t0, y0, args)


def combine(weights: Sequence[Array], terms: Sequence[Array]) -> Array:
    """sum_j weights_j terms_j, over as many weights as there are."""
    total = weights[0] * terms[0]
    for j in range(1, len(weights)):
        total = total + weights[j] * terms[j]
    return total


def is_silent(process: Process, t: np.ndarray) -> bool:
    """Whether sigma(t) = 0 is known, inside jit too."""
    with jax.ensure_compile_time_eval():
        silent = process.sigma(t) == 0
    # The process itself may be traced.
    return not isinstance(silent, jax.core.Tracer) and bool(silent)


def check_noisy_start(solver: type, process: Process, times: Array) -> None:
    """Reject grids that start at sigma = 0, where eps_hat is 0 / 0.

    Raises:
        ValueError: if a grid does.
    """
    if isinstance(times, jax.core.Tracer):
        return
    start = np.asarray(times)[..., 0].min()
    if is_silent(process, start):
        raise ValueError(
            f"`times` must start where sigma > 0 with {solver.__name__}, got "
            f"{start:g}. Start at process.t_min = {float(process.t_min):g}, or invert "
            "by FixedPointInversion or EDICT, which evaluate at the other end of a step."
        )


def check_memoryless(base: DiffusionSolver, memory: PyTree) -> PyTree:
    """The memory of a solver that another one wraps, if there is nothing in it.

    Raises:
        ValueError: if there is: steps are inserted or cut, of which it would know nothing.
    """
    if jax.tree.leaves(memory):
        raise ValueError(
            f"`base` must be a solver of single steps, got {type(base).__name__}, which remembers "
            "earlier ones. Use e.g. DPMSolver() or EDMHeun()."
        )
    return memory


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
