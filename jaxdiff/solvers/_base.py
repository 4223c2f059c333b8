"""What every diffusion solver shares: the problem it reads, its clock, and its grid.

A solver of this library is a diffrax solver of a whole batch that reads everything from `args`, a
`Problem`, and not from the terms, because diffrax wraps those. Its clock counts the steps of the
grid, so that it increases in either direction, and examples may have grids of their own. What is
left to a method is one update rule of one example, "from t to s".

Because the loop is outside and the batch inside, a derivative with respect to weights is summed
over the batch at every step, and never held for each example.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, PRNGKeyArray, PyTree

from jaxdiff._tree import is_known
from jaxdiff.denoiser import Denoiser, Estimate, check_denoiser, check_estimate
from jaxdiff.processes import GaussianProcess
from jaxdiff.solvers._times import bounded_times
from jaxdiff.stepwise import Step, at_step, check_remembered, init_notes, noted


class Problem(eqx.Module):
    """One example's integration: its denoiser, condition, randomness and grid; or a batch of them.

    Attributes:
        denoiser: the denoiser, or a flow map for solvers of those.
        cond: its condition, for one example.
        key: the example's own key, or None where nothing is random.
        times: the whole grid, `(num_steps + 1,)`; a method with an end rule compares with it. Of a
            batch, one for all or one for each.
        direction: -1 from noise to data, +1 from data to noise.
        plan: what the solver's `plan` made of the grid.
        first_step: number of the grid's first step in the run that it is a piece of; its keys are
            counted from there.
        shared: of a batch of populations, the key of each example's population; or None.
    """

    denoiser: Any
    cond: PyTree
    key: PRNGKeyArray
    times: Array
    direction: int = eqx.field(static=True)
    plan: PyTree = None
    first_step: Array | int = 0
    shared: PRNGKeyArray | None = None

    @property
    def process(self) -> GaussianProcess:
        """The denoiser's process."""
        return self.denoiser.process

    @property
    def num_steps(self) -> int:
        """Number of steps of the grid."""
        return self.times.shape[-1] - 1

    @property
    def cost(self) -> Array | int:
        """Network evaluations that one estimate costs."""
        return self.denoiser.evaluations

    @property
    def axes(self) -> "Problem":
        """Which parts of a batch's problem belong to the examples, for `jax.vmap`."""
        own = 0 if self.times.ndim == 2 else None
        # Axes in place of arrays.
        axes: Any = Problem
        return axes(None, 0, 0, own, self.direction, own, None, None)

    def step(self, index: Array, memory: PyTree = None, notes: PyTree = None) -> Step:
        """Step number `index` of a batch: its times, keys and coefficients.

        Args:
            index: number of the step on the grid.
            memory: what the step before left, with a leading axis of examples.
            notes: what it left for maps inside the denoiser, likewise.
        """

        def draw(keys: Any) -> Any:
            fold = jax.vmap(jax.random.fold_in, (0, None))
            return None if keys is None else fold(keys, self.first_step + index)

        def row(rows):
            return jax.lax.dynamic_index_in_dim(rows, index, self.times.ndim - 1, keepdims=False)

        t, s, plan = jax.tree.map(row, (self.times[..., :-1], self.times[..., 1:], self.plan))
        keys = draw(self.key), draw(self.shared)
        return Step(
            t, s, keys[0], plan, memory, index, notes or {}, keys[1], num_steps=self.num_steps
        )

    def estimate(self, x: Array, t: Array) -> Estimate:
        """The denoiser's estimate at (x, t): one evaluation."""
        found = self.denoiser.estimate(x, t, self.cond)
        check_estimate(self.denoiser, found, x)
        check_remembered(self.denoiser, noted(self.denoiser), found.notes, "the solver")
        return found

    def settle(self, x: Array, t: Array, estimate: Estimate) -> tuple[Array, Estimate]:
        """The state that an estimate speaks of, and the estimate with its noise.

        Where x0 alone is estimated, the noise is the one it implies, and the state x. Where the
        estimate has another noise, the state is the one that both make, alpha x0 + sigma eps.
        """
        if estimate.eps is None:
            return x, estimate.replace(eps=self.eps(x, t, estimate.x0))
        process = self.process
        settled = process.alpha(t) * estimate.x0 + process.sigma(t) * estimate.eps
        return settled.astype(x.dtype), estimate

    def x0(self, x: Array, t: Array) -> Array:
        """The denoiser's E[x0 | x_t = x]: one network evaluation."""
        return self.denoiser(x, t, self.cond)

    def eps(self, x: Array, t: Array, x0: Array) -> Array:
        """The noise that x0 implies, (x - alpha x0) / sigma."""
        return (x - self.process.alpha(t) * x0) / self.process.sigma(t)


class Moved(NamedTuple):
    """What a step returns.

    Attributes:
        x: the state at `step.s`.
        memory: what the solver's next step finds.
        nfe: network evaluations spent, in multiples of `problem.cost`.
        notes: those of the step's first estimate.
    """

    x: Array
    memory: PyTree
    nfe: Array | int
    notes: dict[int, PyTree] = {}


class SolverState(eqx.Module):
    """Of a batch: steps taken, network evaluations spent, and whatever else is remembered.

    Attributes:
        index: number of the next step.
        nfe: network evaluations of each example.
        memory: the solver's.
        notes: those of `Stepwise` maps inside the denoiser.
    """

    index: Array
    nfe: Array
    memory: PyTree
    notes: dict[int, PyTree]


class DiffusionSolver(diffrax.AbstractSolver):
    """Base of the solvers that know they integrate a denoiser.

    A method defines `update`; methods with a history define `init_memory` as well, and methods
    with coefficients `plan`, which computes them for the whole grid before the first step. Most
    start from an estimate at the current state: those are an `ExplicitSolver`.
    """

    term_structure: ClassVar = diffrax.ODETerm
    interpolation_cls: ClassVar = diffrax.LocalLinearInterpolation
    # What is integrated.
    model: ClassVar[type] = Denoiser
    # Whether examples see each other, as in a population.
    couples: ClassVar[bool] = False
    # Whether the way back is exact, from the state and what is remembered there.
    retraces: ClassVar[bool] = False

    @abstractmethod
    def update(self, problem: Problem, x: Array, step: Step) -> Moved:
        """One step of one example.

        Args:
            problem: denoiser, condition and grid.
            x: the state at `step.t`, `(*event)`.
            step: times, key, coefficients and memory.

        Returns:
            The state at `step.s`, the memory for the next step, the network evaluations spent
            (`problem.cost` for each estimate), and the notes of the first estimate; a `Moved`, or
            a tuple of these.
        """

    @property
    @abstractmethod
    def stochastic(self) -> bool:
        """Whether a step draws noise."""

    @property
    def has_memory(self) -> bool:
        """Whether a step depends on earlier ones by more than its state."""
        return type(self).init_memory is not DiffusionSolver.init_memory

    def plan(self, problem: Problem) -> PyTree:
        """Coefficients that depend on the grid alone: arrays with one row per step, or None.

        Raises:
            ValueError: if the method cannot use the grid.
        """
        del problem

    def init_memory(self, problem: Problem, x: Array) -> PyTree:
        """What the first step finds in `memory`."""
        del problem, x

    @property
    def bounded_start(self) -> bool:
        """Whether the customary grid of a process whose alpha vanishes starts later.

        For methods that extrapolate eps_hat or step in the noise level sigma / alpha, which is in
        the thousands at the start of the cosine schedule, rectified flow and TrigFlow: the first of
        few steps would take an error of that size along. Their grids start at a level of 80, as
        EDM's does.
        """
        return False

    @property
    def needs_signal(self) -> bool:
        """Whether grids must start where alpha > 0, by which the method divides."""
        return self.bounded_start

    def default_times(self, process: GaussianProcess, num_steps: int, t_end: float) -> Array:
        """The grid of a number of steps: the one customary for the process."""
        times = process.times(num_steps, t_end)
        return bounded_times(process, times) if self.bounded_start else times

    def check_start(self, process: GaussianProcess, times: Array, memory: PyTree) -> None:
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

    def check_cond(self, cond: PyTree) -> None:
        """Reject conditions of a batch, those it passes on among them, that are known to be wrong.

        Raises:
            ValueError: for e.g. a class that there is not.
        """
        del cond

    def take(self, problem: Problem, x: Array, step: Step) -> Moved:
        """A step of its own: maps inside the denoiser are told of it."""
        known = dataclasses.replace(problem, denoiser=at_step(problem.denoiser, step))
        return self.take_within(known, x, step)

    def take_within(self, problem: Problem, x: Array, step: Step) -> Moved:
        """A step inside another one, whose maps know that one already."""
        found = self.update(problem, x, step)
        if not isinstance(found, tuple) or not 3 <= len(found) <= 4:
            raise TypeError(
                f"`update` of {type(self).__name__} must return Moved(x, memory, nfe, notes), got "
                f"{type(found).__name__}."
            )
        moved = Moved(*found)
        if moved.x.shape != x.shape:
            raise ValueError(
                f"A step of {type(self).__name__} must keep the shape of x, {x.shape}, got "
                f"{moved.x.shape}."
            )
        check_remembered(problem.denoiser, step.notes, moved.notes, type(self).__name__)
        nfe, notes = jnp.asarray(moved.nfe, jnp.int32), {**step.notes, **moved.notes}
        return Moved(moved.x.astype(x.dtype), moved.memory, nfe, notes)

    def error_order(self, terms: Any) -> float:
        """See diffrax; adaptive step sizes are not offered, so nothing depends on it."""
        del terms
        return 1.0

    def take_batch(self, problem: Problem, x: Array, step: Step) -> Moved:
        """`take` of every example of a batch by itself."""
        return jax.vmap(self.take, (problem.axes, 0, step.axes))(problem, x, step)

    def init(self, terms, t0, t1, y0, args) -> SolverState:
        """See diffrax; of a batch."""
        del terms, t0, t1

        def one(problem, x):
            return self.init_memory(problem, x), init_notes(problem.denoiser, x)

        memory, notes = jax.vmap(one, (args.axes, 0))(args, y0)
        nfe = jnp.zeros(y0.shape[0], jnp.int32)
        return SolverState(jnp.zeros((), jnp.int32), nfe, memory, notes)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """See diffrax; of a batch."""
        del terms, t0, t1, made_jump
        step = args.step(solver_state.index, solver_state.memory, solver_state.notes)
        moved = self.take_batch(args, y0, step)
        nfe = solver_state.nfe + moved.nfe
        state = SolverState(step.index + 1, nfe, moved.memory, moved.notes)
        return moved.x, None, dict(y0=y0, y1=moved.x), state, diffrax.RESULTS.successful

    def func(self, terms, t0, y0, args):
        """See diffrax."""
        return terms.vf(t0, y0, args)


class ExplicitSolver(DiffusionSolver):
    """Base of the solvers whose step starts from the estimate at the current state.

    A method defines `move`. What looks at x0_hat before it steps, and changes it perhaps, calls
    `problem.estimate` and `advance` itself, and spends no second evaluation.
    """

    @abstractmethod
    def move(
        self, problem: Problem, x: Array, step: Step, estimate: Estimate
    ) -> tuple[Array, PyTree, Array | int]:
        """One step of one example, from its settled estimate at the start.

        Args:
            problem: denoiser, condition and grid.
            x: the state at `step.t`, alpha x0 + sigma eps, `(*event)`.
            step: times, key, coefficients and memory.
            estimate: x0 and eps at (x, step.t), both `(*event)`.

        Returns:
            The state at `step.s`, the memory for the next step, and the network evaluations spent
            beyond the one that made the estimate.
        """

    def correct(self, x: Array, step: Step, estimate: Estimate) -> Array:
        """The state that the step before should have reached, now that the estimate at x is known.

        For methods whose corrector spends no evaluation; arguments as of `move`, with the x before.
        """
        del step, estimate
        return x

    def advance(self, problem: Problem, x: Array, step: Step, estimate: Estimate) -> Moved:
        """One step of one example, from any estimate at (x, step.t).

        An estimate with x0 alone is followed as if the denoiser had made it, with the noise that
        x0 implies. One with a noise as well goes on with both: see `Problem.settle`.
        """
        settled, estimate = problem.settle(x, step.t, estimate)
        corrected = self.correct(x, step, estimate)
        start = corrected if settled is x else settled + (corrected - x)
        x, memory, nfe = self.move(problem, start.astype(x.dtype), step, estimate)
        return Moved(x, memory, problem.cost + nfe, estimate.notes)

    def update(self, problem: Problem, x: Array, step: Step) -> Moved:
        """See `DiffusionSolver`."""
        return self.advance(problem, x, step, problem.estimate(x, step.t))


class GaussianSolver(ExplicitSolver):
    """Base of the solvers that draw each step from a Gaussian transition kernel.

    A method defines `transition`: the mean and the standard deviation of p(x_s | x_t).
    """

    @abstractmethod
    def transition(
        self, problem: Problem, x: Array, step: Step, estimate: Estimate
    ) -> tuple[Array, Array | float]:
        """The kernel p(x_s | x_t) of one step.

        Arguments as of `move`, and so settled before:

            x, estimate = problem.settle(x, step.t, problem.estimate(x, step.t))

        Returns:
            Its mean `(*event)`, and its standard deviation, a scalar or `(*event)`.
        """

    def move(
        self, problem: Problem, x: Array, step: Step, estimate: Estimate
    ) -> tuple[Array, PyTree, int]:
        """See `ExplicitSolver`: one draw of the kernel, or its mean if nothing is drawn."""
        mean, std = self.transition(problem, x, step, estimate)
        if not self.stochastic:
            return mean, step.memory, 0
        return mean + std * jax.random.normal(step.key, x.shape, x.dtype), step.memory, 0


def combine(weights: Sequence[Array], terms: Sequence[Array]) -> Array:
    """sum_j weights_j terms_j, over as many weights as there are."""
    total = weights[0] * terms[0]
    for j in range(1, len(weights)):
        total = total + weights[j] * terms[j]
    return total


def is_silent(process: GaussianProcess, t: ArrayLike) -> bool:
    """Whether sigma(t) = 0 is known, inside jit too."""
    with jax.ensure_compile_time_eval():
        silent = process.sigma(jnp.asarray(t)) == 0
    # The process itself may be traced.
    return is_known(silent) and bool(silent)


def check_noisy_start(solver: type, process: GaussianProcess, times: Array) -> None:
    """Reject grids that start at sigma = 0, where eps_hat is 0 / 0.

    Raises:
        ValueError: if a grid does.
    """
    if not is_known(times):
        return
    start = np.asarray(times)[..., 0].min()
    if is_silent(process, start):
        raise ValueError(
            f"`times` must start where sigma > 0 with {solver.__name__}, got "
            f"{start:g}. Start at process.t_min = {float(process.t_min):g}, or invert "
            "by FixedPointInversion or EDICT, which evaluate at the other end of a step."
        )


def check_signal_start(asker: type, process: GaussianProcess, times: Array) -> None:
    """Reject grids that start where alpha is 0 to the resolution of their dtype, if that is known.

    Args:
        asker: the class of what divides by alpha.
        process: the forward process.
        times: a decreasing grid, with a leading axis if examples have their own.

    Raises:
        ValueError: if a grid does.
    """
    if not is_known(times):
        return
    start = np.asarray(times)[..., 0].max()
    with jax.ensure_compile_time_eval():
        least = jnp.finfo(times.dtype).eps * process.sigma(jnp.asarray(start))
        empty = jnp.abs(process.alpha(jnp.asarray(start))) <= least
    # The process itself may be traced.
    if is_known(empty) and empty:
        raise ValueError(
            f"`times` must start where alpha > 0 with {asker.__name__}, which divides by it, got "
            f"{start:g} of {type(process).__name__}. Pass a number of steps, or "
            "solvers.bounded_times(process, times)."
        )


def check_base(around: DiffusionSolver, base: Any) -> None:
    """Reject what cannot be the base of another solver.

    Raises:
        TypeError: for anything but a solver of this library.
    """
    if not isinstance(base, DiffusionSolver):
        got = f"the class {base.__name__}" if isinstance(base, type) else repr(base)
        raise TypeError(
            f"`base` of {type(around).__name__} must be a solver of this library, got {got}. Pass "
            "e.g. DDIM()."
        )


def check_model(solver: Any, model: Any) -> None:
    """Reject a model of another kind than the solver integrates.

    Raises:
        TypeError: naming both, and what to use.
    """
    if isinstance(solver, type):
        raise TypeError(
            f"`solver` must be a solver, got the class {solver.__name__}. Pass {solver.__name__}()."
        )
    wanted = getattr(solver, "model", Denoiser)
    if wanted is Denoiser:
        check_denoiser(model)
    elif not isinstance(model, wanted):
        raise TypeError(
            f"`solver` {type(solver).__name__} steps by a map between two times, a "
            f"{wanted.__name__}, got {type(model).__name__}. Use e.g. DDIM() for a denoiser."
        )


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
