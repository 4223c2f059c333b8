"""Sampling and inversion: integrating a denoiser with any solver, on any grid."""

import dataclasses

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PRNGKeyArray, PyTree

from jaxdiff._tree import batched, check_cond, check_finite, check_key, jit
from jaxdiff.denoiser import Denoiser
from jaxdiff.parallel import join_devices
from jaxdiff.solvers import _stock
from jaxdiff.solvers._base import DiffusionSolver, GridSteps, Problem, SolverState
from jaxdiff.solvers._ddim import DDIM
from jaxdiff.solvers._times import check_grids, resolve_times


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


def _save_states(
    saveat: diffrax.SaveAt, problem: Problem, gauge: _stock.Gauge
) -> diffrax.SubSaveAt:
    """The user's SaveAt, in the solver's clock and variables, with the process's time beside."""
    wanted = saveat.subs
    if not isinstance(wanted, diffrax.SubSaveAt) or saveat.dense:
        raise ValueError(
            f"`saveat` must name times, got {saveat}. Use t0, t1, ts, steps and fn of "
            "diffrax.SaveAt; of `dense` and `subs` nothing is kept."
        )

    def save(clock, state, problem):
        t = gauge.time(problem, clock)
        return t, wanted.fn(t, state * gauge.scale(problem.process, t), problem)

    ts = wanted.ts
    if ts is not None:
        ts = gauge.clock(problem, jnp.asarray(ts, problem.times.dtype))
    return diffrax.SubSaveAt(t0=wanted.t0, t1=wanted.t1, ts=ts, steps=wanted.steps, fn=save)


def _integrate(problem: Problem, x: Array, memory, solver, controller, adjoint, saveat) -> Solution:
    """Integrate one example over its grid."""
    gauge, stepper = _stock.gauge(solver, controller is not None)
    own = isinstance(solver, DiffusionSolver)
    if own:
        problem = dataclasses.replace(problem, plan=solver.plan(problem))
    clock = gauge.clock(problem, problem.times)
    start, end = gauge.scale(problem.process, problem.times[jnp.asarray([0, -1])])
    subs, state = [diffrax.SubSaveAt(t1=True)], None
    if saveat is not None:
        subs.append(_save_states(saveat, problem, gauge))
    if memory is not None:
        state = SolverState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), memory)
    initial = (x / start).astype(x.dtype)
    solution = diffrax.diffeqsolve(
        gauge.terms(problem, initial),
        stepper,
        clock[0],
        clock[-1],
        None,
        initial,
        args=problem,
        saveat=diffrax.SaveAt(subs=subs, solver_state=own),
        solver_state=state,
        stepsize_controller=GridSteps(clock) if controller is None else controller,
        adjoint=adjoint,
        max_steps=problem.num_steps if controller is None else 4096,
        throw=False,
    )
    if own:
        nfe, memory = solution.solver_state.nfe, solution.solver_state.memory
    else:
        nfe = _stock.count_evaluations(stepper, solution.stats["num_steps"])
    nfe = (nfe * problem.denoiser.evaluations).astype(jnp.int32)
    path = None if saveat is None else Path(*solution.ys[1])
    final = (solution.ys[0][0] * end).astype(x.dtype)
    return Solution(final, nfe, solution.result, memory, path)


@jit
def _sample(key, indices, cond, denoiser, times, options, shape, dtype, batch):
    def one(index, cond, own_times):
        grid = times if own_times is None else own_times
        prior_key, path_key = jax.random.split(jax.random.fold_in(key, index))
        x = denoiser.process.sigma(grid[0]) * jax.random.normal(prior_key, shape, dtype)
        problem = Problem(denoiser, cond, path_key, grid, -1)
        return _integrate(problem, x.astype(dtype), None, *options)

    return batched(one, batch)(indices, cond, _own_times(times))


def _own_times(times: Array) -> Array | None:
    """Grids of the examples' own, to be mapped over.

    A shared grid stays out of the batch: steps then branch, and do not compute both sides.
    """
    return times if times.ndim == 2 else None


@jit
def _solve(key, indices, x, memory, cond, denoiser, times, options, batch, direction):
    def one(index, x, memory, cond, own_times):
        path_key = None
        if key is not None:
            # The other half is the prior's: `denoise` goes on as `sample` does from there.
            path_key = jax.random.split(jax.random.fold_in(key, index))[1]
        grid = times if own_times is None else own_times
        problem = Problem(denoiser, cond, path_key, grid, direction)
        return _integrate(problem, x, memory, *options)

    return batched(one, batch)(indices, x, memory, cond, _own_times(times))


def _resolve(denoiser, times, solver, num_samples, *, increasing=False) -> Array:
    own = isinstance(solver, DiffusionSolver)
    process = denoiser.process
    if jnp.ndim(times) == 2:
        times = check_grids(process, times, num_samples, increasing=increasing)
    else:
        t_end = 0.0 if own and not increasing else process.t_min
        times = resolve_times(process, times, t_end=t_end, increasing=increasing)
    if not own:
        _stock.check_stock(solver, process, times)
    return times


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
        solver: a solver of this library; an explicit diffrax ODE solver, which is then
            integrated in variables that are finite at both ends; or a diffrax SDE solver in a
            `ReverseSDE`.
        times: number of steps on the process's customary grid, or a decreasing grid of times,
            shared, `(num_steps + 1,)`, or one per example, `(num_samples, num_steps + 1)`.
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
    check_cond(cond, num_samples)
    times = _resolve(denoiser, times, solver, num_samples)
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
            increasing grid of times, shared or one per example, that starts where sigma > 0
            unless the solver says otherwise.
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
    stochastic = isinstance(solver, _stock.ReverseSDE)
    if stochastic or (isinstance(solver, DiffusionSolver) and solver.stochastic):
        raise ValueError(
            f"`solver` must be deterministic to invert, got {solver}. Use DDIM() or EDMHeun()."
        )
    times = _resolve(denoiser, times, solver, x.shape[0], increasing=True)
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

    From the start that `sample` draws with the same key it makes the same samples.

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
    times = _resolve(denoiser, times, solver, x.shape[0])
    options = (solver, stepsize_controller, adjoint, saveat)
    return _run(key, denoiser, x, memory, cond, times, options, batch_size, -1)


def _run(key, denoiser, x, memory, cond, times, options, batch_size, direction):
    _check_controller(*options[:2])
    check_cond(cond, x.shape[0])
    check_finite(x)
    if isinstance(options[0], DiffusionSolver):
        options[0].check_start(denoiser.process, times, memory)
    indices = jnp.arange(x.shape[0])
    return _solve(key, indices, x, memory, cond, denoiser, times, options, batch_size, direction)


def _check_controller(solver, controller) -> None:
    if controller is not None and isinstance(solver, DiffusionSolver):
        raise ValueError(
            f"`stepsize_controller` needs a stock diffrax solver, got {type(solver).__name__}: the "
            "solvers of this library step through `times`. Use e.g. diffrax.Tsit5()."
        )
