"""Sampling and inversion: integrating a denoiser with any solver, on any grid."""

import dataclasses
from collections.abc import Callable

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PRNGKeyArray, PyTree

from jaxdiff._tree import check_key, jit
from jaxdiff.denoiser import Denoiser
from jaxdiff.parallel import join_devices
from jaxdiff.solvers import _stock
from jaxdiff.solvers._base import DiffusionSolver, GridSteps, Problem, SolverState
from jaxdiff.solvers._ddim import DDIM
from jaxdiff.solvers._grids import resolve_times


class Path(eqx.Module):
    """A saved trajectory.

    Attributes:
        t: times of the process, `(num_samples, num_saved)`.
        x: the states there, `(num_samples, num_saved, *event)`, or what `SaveAt(fn=...)` makes of
            them. With `steps=True` and adaptive steps, unused slots hold inf.
    """

    t: Array
    x: PyTree


class Solution(eqx.Module):
    """What a solver returns for a batch.

    Attributes:
        x: the states at the last time of the grid, `(num_samples, *event)`.
        nfe: network evaluations spent on each example, `(num_samples,)` int32.
        result: diffrax's result code of each example; all successful on a fixed grid.
        memory: what the solver remembers at the end (None for stock solvers); methods with
            exact inverses go back from it.
        path: the trajectory that `saveat` asked for, or None.
    """

    x: Array
    nfe: Array
    result: diffrax.RESULTS
    memory: PyTree = None
    path: Path | None = None


def _process_times(problem: Problem, own: bool) -> Callable[[Array], Array]:
    """From the solver's clock to the process's time, which the clock's rounding may leave."""
    low, high = jnp.min(problem.times), jnp.max(problem.times)
    if own:
        return lambda clock: jnp.clip(problem.direction * clock, low, high)
    return lambda clock: jnp.clip(
        _stock.time(problem.process, -problem.direction * clock), low, high
    )


def _save_states(saveat: diffrax.SaveAt, problem: Problem, own: bool) -> diffrax.SaveAt:
    """The user's SaveAt, in the solver's clock and variables, with the process's time beside."""
    to_time, fn = _process_times(problem, own), saveat.subs.fn

    def save(clock, state, problem):
        t = to_time(clock)
        x = state if own else state * _stock.scale(problem.process, t)
        return t, fn(t, x, problem)

    def to_clock(ts):
        if ts is None:
            return None
        ts = jnp.asarray(ts, problem.times.dtype)
        return (
            problem.direction * ts
            if own
            else -problem.direction * _stock.clock(problem.process, ts)
        )

    sub = saveat.subs
    return diffrax.SubSaveAt(t0=sub.t0, t1=sub.t1, ts=to_clock(sub.ts), steps=sub.steps, fn=save)


def _integrate(problem: Problem, x: Array, memory, solver, controller, adjoint, saveat) -> Solution:
    """Integrate one example over its grid."""
    process, times = problem.process, problem.times
    own = isinstance(solver, DiffusionSolver)
    if own:
        problem = dataclasses.replace(problem, plan=solver.plan(problem))
    clock = problem.direction * times if own else -problem.direction * _stock.clock(process, times)
    start, end = (1.0, 1.0) if own else _stock.scale(process, times[jnp.asarray([0, -1])])
    max_steps = problem.num_steps if controller is None else 4096
    subs = [diffrax.SubSaveAt(t1=True)]
    if saveat is not None:
        subs.append(_save_states(saveat, problem, own))
    state = None
    if own and memory is not None:
        state = SolverState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), memory)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(_stock.vector_field),
        solver,
        clock[0],
        clock[-1],
        None,
        x / start,
        args=problem,
        saveat=diffrax.SaveAt(subs=subs, solver_state=own),
        solver_state=state,
        stepsize_controller=GridSteps(clock) if controller is None else controller,
        adjoint=adjoint,
        max_steps=max_steps,
        throw=False,
    )
    if own:
        nfe, memory = solution.solver_state.nfe, solution.solver_state.memory
    else:
        nfe, memory = _stock.count_evaluations(solver, solution.stats["num_steps"]), None
    nfe = nfe * problem.denoiser.evaluations
    path = None if saveat is None else Path(*solution.ys[1])
    final = (solution.ys[0][0] * end).astype(x.dtype)
    return Solution(final, nfe, solution.result, memory, path)


def _batched(fn: Callable, batch_size: int | None) -> Callable:
    """Map over the leading axis: all at once, or in chunks of `batch_size` one after another."""
    if batch_size is None:
        return jax.vmap(fn)
    return lambda *args: jax.lax.map(lambda arg: fn(*arg), args, batch_size=batch_size)


@jit
def _sample(key, indices, cond, denoiser, times, options, shape, dtype, batch):
    def one(index, cond):
        example_key = jax.random.fold_in(key, index)
        prior_key, path_key = jax.random.split(example_key)
        x = denoiser.process.sigma(times[0]) * jax.random.normal(prior_key, shape, dtype)
        problem = Problem(denoiser, cond, path_key, times, -1)
        return _integrate(problem, x.astype(dtype), None, *options)

    return _batched(one, batch)(indices, cond)


@jit
def _solve(key, indices, x, memory, cond, denoiser, times, options, batch, direction):
    def one(index, x, memory, cond):
        path_key = None if key is None else jax.random.fold_in(key, index)
        problem = Problem(denoiser, cond, path_key, times, direction)
        return _integrate(problem, x, memory, *options)

    return _batched(one, batch)(indices, x, memory, cond)


def _resolve(denoiser, times, solver, *, increasing=False) -> Array:
    process = denoiser.process
    if isinstance(solver, DiffusionSolver):
        return resolve_times(
            process, times, t_end=process.t_min if increasing else 0.0, increasing=increasing
        )
    _stock.count_evaluations(solver, 0)
    times = resolve_times(process, times, t_end=process.t_min, increasing=increasing)
    _stock.check_stock(process, times)
    return times


def _check_cond(cond: PyTree, num_samples: int) -> None:
    for leaf in jax.tree.leaves(cond):
        if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != num_samples:
            raise ValueError(
                f"`cond` must have a leading axis of one entry per example, {num_samples}, got a "
                f"leaf of shape {jnp.shape(leaf)}. Repeat a shared condition with "
                "jnp.broadcast_to."
            )


def sample(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    shape: tuple[int, ...],
    num_samples: int,
    *,
    cond: PyTree = None,
    solver: diffrax.AbstractSolver = DDIM(),
    times: int | ArrayLike = 50,
    batch_size: int | None = None,
    first_index: int = 0,
    sharding: jax.sharding.NamedSharding | None = None,
    dtype: jnp.dtype | None = None,
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    adjoint: diffrax.AbstractAdjoint = diffrax.RecursiveCheckpointAdjoint(),
    saveat: diffrax.SaveAt | None = None,
) -> Solution:
    """Draw samples: start from noise sigma(times[0]) n and integrate down the grid.

    Compiled once for each structure (shapes, kind of solver, number of steps): new weights, a
    new guidance scale or a new grid of equal length reuse the program. Example i draws all of
    its noise from `fold_in(key, i)`, with i its global index, and so does not depend on the
    batch size, the chunking or the number of devices.

    Args:
        key: typed PRNG key.
        denoiser: the denoiser; guidance is a denoiser too.
        shape: shape of one example, `(*event)`.
        num_samples: how many.
        cond: pytree with a leading axis of `num_samples`, or None.
        solver: a solver of this library, or an explicit diffrax ODE solver, which is then
            integrated in variables that are finite at both ends.
        times: number of steps on the process's customary grid, or a decreasing grid of times.
            Grids may end at 0, except for stock solvers, whose customary grid ends at t_min.
        batch_size: examples computed at a time, to bound memory; None for all at once.
        first_index: global index of the first example, to draw a long run in pieces.
        sharding: sharding of the sample axis over a mesh, e.g. `parallel.batch_sharding(mesh)`.
        dtype: dtype of the samples; None for JAX's default float.
        stepsize_controller: a diffrax controller for adaptive steps between the ends of the
            grid; stock solvers only.
        adjoint: how to differentiate through the sampler; `diffrax.DirectAdjoint()` or
            `diffrax.ForwardMode()` for forward derivatives.
        saveat: which states to keep in `path`: a `diffrax.SaveAt` in times of the process, e.g.
            `SaveAt(t0=True, steps=True)` for all, or `SaveAt(ts=...)` for given ones, in the
            order of the grid; between grid points states are interpolated linearly by the
            solvers of this library. Its `fn(t, x, problem)` chooses what to keep, e.g.
            `lambda t, x, problem: problem.x0(x, t)`.

    Returns:
        A `Solution`.

    Raises:
        TypeError: if `key` is not a typed key, or the solver is not explicit.
        ValueError: for a grid that is not decreasing or leaves the process, or a `cond` of the
            wrong length.
    """
    check_key(key)
    _check_controller(solver, stepsize_controller)
    _check_cond(cond, num_samples)
    times = _resolve(denoiser, times, solver)
    indices = jnp.arange(first_index, first_index + num_samples)
    if sharding is not None:
        indices, cond = jax.device_put((indices, cond), sharding)
        key, denoiser, times, solver = join_devices((key, denoiser, times, solver), sharding)
    dtype = jnp.dtype(jnp.result_type(float) if dtype is None else dtype)
    options = (solver, stepsize_controller, adjoint, saveat)
    return _sample(key, indices, cond, denoiser, times, options, tuple(shape), dtype, batch_size)


def invert(
    denoiser: Denoiser,
    x: Array,
    *,
    memory: PyTree = None,
    cond: PyTree = None,
    solver: diffrax.AbstractSolver = DDIM(),
    times: int | ArrayLike = 50,
    batch_size: int | None = None,
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    adjoint: diffrax.AbstractAdjoint = diffrax.RecursiveCheckpointAdjoint(),
    saveat: diffrax.SaveAt | None = None,
) -> Solution:
    """Carry data to noise along the probability-flow ODE: the reverse of deterministic `sample`.

    Args:
        denoiser: the denoiser.
        x: states at the first time of the grid, `(num_samples, *event)`.
        memory: what a solver with an exact inverse remembered where it ended, from the `Solution`
            that ended at x; None to start afresh.
        cond: pytree with a leading axis of `num_samples`, or None.
        solver: a deterministic solver.
        times: number of steps on the process's customary grid, from t_min to t_max, or an
            increasing grid of times that starts where sigma > 0.
        batch_size: as in `sample`.
        stepsize_controller: as in `sample`.
        adjoint: as in `sample`.
        saveat: as in `sample`.

    Returns:
        A `Solution`; its x are the states at the last time of the grid.

    Raises:
        ValueError: for a stochastic solver, a grid that is not increasing or leaves the process,
            or a `cond` of the wrong length.
    """
    if isinstance(solver, DiffusionSolver) and solver.stochastic:
        raise ValueError(
            f"`solver` must be deterministic to invert, got {solver}. Use DDIM() or EDMHeun()."
        )
    times = _resolve(denoiser, times, solver, increasing=True)
    options = (solver, stepsize_controller, adjoint, saveat)
    return _run(None, denoiser, x, memory, cond, times, options, batch_size, 1)


def denoise(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    x: Array,
    *,
    memory: PyTree = None,
    cond: PyTree = None,
    solver: diffrax.AbstractSolver = DDIM(),
    times: int | ArrayLike = 50,
    batch_size: int | None = None,
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    adjoint: diffrax.AbstractAdjoint = diffrax.RecursiveCheckpointAdjoint(),
    saveat: diffrax.SaveAt | None = None,
) -> Solution:
    """Integrate given noisy states down a grid: `sample` without its draw of the start.

    Args:
        key: typed PRNG key; example i draws from `fold_in(key, i)`.
        denoiser: the denoiser.
        x: states at the first time of the grid, `(num_samples, *event)`.
        memory: as in `invert`.
        cond: as in `sample`.
        solver: as in `sample`.
        times: as in `sample`.
        batch_size: as in `sample`.
        stepsize_controller: as in `sample`.
        adjoint: as in `sample`.
        saveat: as in `sample`.

    Returns:
        A `Solution`.

    Raises:
        TypeError: as `sample`.
        ValueError: as `sample`.
    """
    check_key(key)
    times = _resolve(denoiser, times, solver)
    options = (solver, stepsize_controller, adjoint, saveat)
    return _run(key, denoiser, x, memory, cond, times, options, batch_size, -1)


def _run(key, denoiser, x, memory, cond, times, options, batch_size, direction):
    _check_controller(*options[:2])
    _check_cond(cond, x.shape[0])
    _check_states(x)
    indices = jnp.arange(x.shape[0])
    return _solve(key, indices, x, memory, cond, denoiser, times, options, batch_size, direction)


def _check_states(x: Array) -> None:
    if not isinstance(x, jax.core.Tracer) and not bool(jnp.all(jnp.isfinite(x))):
        bad = int(jnp.sum(~jnp.isfinite(x)))
        raise ValueError(
            f"`x` must be finite, got {bad} NaN or infinite of {x.size} entries. "
            "Check what made these states."
        )


def _check_controller(solver, controller) -> None:
    if controller is not None and isinstance(solver, DiffusionSolver):
        raise ValueError(
            f"`stepsize_controller` needs a stock diffrax solver, got {type(solver).__name__}: the "
            "solvers of this library step through `times`. Use e.g. diffrax.Tsit5()."
        )
