"""Sampling and inversion: integrating a denoiser with any solver, on any grid."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, PRNGKeyArray, PyTree

from jaxdiff._checks import (
    check_batch_size,
    check_cond,
    check_count,
    check_finite,
    check_key,
    check_scalars,
)
from jaxdiff._tree import as_float_array, chunked, is_known, jit, num_parts
from jaxdiff.denoiser import Denoiser
from jaxdiff.flow_map import FlowMap
from jaxdiff.host import check_no_host
from jaxdiff.parallel import join_devices, place_batch
from jaxdiff.solvers import _stock
from jaxdiff.solvers._base import (
    DiffusionSolver,
    GridSteps,
    Problem,
    SolverState,
    check_model,
    check_signal_start,
)
from jaxdiff.solvers._brownian import float_bits
from jaxdiff.solvers._ddim import DDIM
from jaxdiff.solvers._population import PopulationSolver
from jaxdiff.solvers._times import bounded_times, check_grids, resolve_times
from jaxdiff.stepwise import check_stepless


class Trajectory(eqx.Module):
    """Saved states on the way of every example.

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
        trajectory: the states that `saveat` asked for, or None.
        notes: what `Stepwise` maps inside the denoiser remember at the end, for `denoise` to go
            on from; empty if there are none.
    """

    x: Array
    nfe: Array
    result: diffrax.RESULTS
    memory: PyTree = None
    trajectory: Trajectory | None = None
    notes: dict[int, PyTree] = eqx.field(default_factory=dict)


class _Options(NamedTuple):
    """How a problem is integrated; see `sample`."""

    solver: Any
    controller: diffrax.AbstractStepSizeController | None
    adjoint: diffrax.AbstractAdjoint | None
    saveat: diffrax.SaveAt | None
    last_k: int | None


def _save_states(
    saveat: diffrax.SaveAt, problem: Problem, gauge: _stock.Gauge
) -> diffrax.SubSaveAt:
    """The user's SaveAt, in the solver's clock and variables, with the process's time beside."""
    wanted = saveat.subs

    def save(clock, state, problem):
        t = gauge.time(problem, clock)
        x = state * _rows(gauge.scale(problem.process, t), state)
        count = state.shape[0]
        each = jax.vmap(wanted.fn, (0, 0, problem.axes))
        return jnp.broadcast_to(t, count), each(jnp.broadcast_to(t, count), x, problem)

    ts = wanted.ts
    if ts is not None:
        ts = gauge.clock(problem, jnp.asarray(ts, problem.times.dtype))
    return diffrax.SubSaveAt(t0=wanted.t0, t1=wanted.t1, ts=ts, steps=wanted.steps, fn=save)


def _rows(factor: Array, state: Array) -> Array:
    """A factor for all examples, or one for each, shaped to multiply the state."""
    return (
        factor.reshape(*factor.shape, *[1] * (state.ndim - factor.ndim)) if factor.ndim else factor
    )


def plan_of(solver: DiffusionSolver, problem: Problem) -> PyTree:
    """The solver's plan of the grid, or of every example's grid."""

    def plan(times):
        return solver.plan(dataclasses.replace(problem, times=times, cond=None, key=None))

    return plan(problem.times) if problem.times.ndim == 1 else jax.vmap(plan)(problem.times)


def _integrate(problem: Problem, x: Array, memory, notes, options: _Options) -> Solution:
    """Integrate a batch, examples together: derivatives by weights are summed over it."""
    solver, controller, adjoint, saveat, last_k = options
    gauge, stepper = _stock.gauge(solver, controller is not None)
    own, count, state = isinstance(solver, DiffusionSolver), x.shape[0], None
    if own:
        problem = dataclasses.replace(problem, plan=plan_of(solver, problem))
        clock = jnp.arange(problem.num_steps + 1, dtype=problem.times.dtype)
        if memory is not None or notes is not None:
            fresh = solver.init(None, None, None, x, problem)
            memory = fresh.memory if memory is None else memory
            state = SolverState(fresh.index, fresh.nfe, memory, notes or fresh.notes)
        initial, end = x, 1.0
    else:
        clock = gauge.clock(problem, problem.times)
        start, end = gauge.scale(problem.process, problem.times[jnp.asarray([0, -1])])
        initial = (x / start).astype(x.dtype)
    subs = [diffrax.SubSaveAt(t1=True)]
    if saveat is not None:
        subs.append(_save_states(saveat, problem, gauge))

    def solve(problem, y, state, first, last):
        steps = last - first if controller is None else 4096
        # Every state is kept, and a step computed once more: what the loop of a checkpointed step
        # holds.
        kept = diffrax.RecursiveCheckpointAdjoint(steps if controller is None else None)
        return diffrax.diffeqsolve(
            gauge.terms(problem, y),
            stepper,
            clock[first],
            clock[last],
            None,
            y,
            args=problem,
            saveat=diffrax.SaveAt(subs=subs, solver_state=True),
            solver_state=state,
            stepsize_controller=GridSteps(clock[first:]) if controller is None else controller,
            adjoint=kept if adjoint is None else adjoint,
            max_steps=steps,
            throw=False,
        )

    first, steps = 0, 0
    if last_k not in (None, problem.num_steps):
        # Two runs, of which the first is a constant.
        first = problem.num_steps - last_k
        constant = jax.lax.stop_gradient((problem, initial, state))
        begun = jax.lax.stop_gradient(solve(*constant, 0, first))
        initial, state, steps = begun.ys[0][0], begun.solver_state, begun.stats["num_steps"]
    solution = solve(problem, initial, state, first, problem.num_steps)
    if own:
        state = solution.solver_state
        nfe, memory, notes = state.nfe, state.memory, state.notes
    else:
        steps = steps + solution.stats["num_steps"]
        nfe = _stock.count_evaluations(stepper, steps) * problem.cost
        memory, notes = None, {}
    trajectory = None
    if saveat is not None:
        saved = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), solution.ys[1])
        trajectory = Trajectory(*saved)
    nfe, result = jax.tree.map(lambda a: jnp.broadcast_to(a, (count,)), (nfe, solution.result))
    final = (solution.ys[0][0] * end).astype(x.dtype)
    return Solution(final, nfe.astype(jnp.int32), result, memory, trajectory, notes)


def _integrate_each(problem: Problem, x: Array, memory, notes, options: _Options) -> Solution:
    """Integrate every example by itself, where its steps are its own."""

    def one(problem, x, memory, notes):
        def batch(tree):
            return jax.tree.map(lambda a: a[None], tree)

        alone = dataclasses.replace(problem, cond=batch(problem.cond), key=batch(problem.key))
        found = _integrate(alone, batch(x), batch(memory), batch(notes), options)
        return jax.tree.map(lambda a: a[0], found)

    return jax.vmap(one, (problem.axes, 0, 0, 0))(problem, x, memory, notes)


def _solve(problem: Problem, x: Array, memory, notes, options: _Options) -> Solution:
    own = isinstance(options.solver, DiffusionSolver)
    shared = problem.times.ndim == 1
    at_times = options.saveat is not None and options.saveat.subs.ts is not None
    together = options.controller is None and (shared or (own and not at_times))
    return (_integrate if together else _integrate_each)(problem, x, memory, notes, options)


def _population_keys(key: PRNGKeyArray, indices: Array, solver: Any) -> PRNGKeyArray | None:
    """The key of each example's population, far from those of examples."""
    if not isinstance(solver, PopulationSolver):
        return None
    own = jax.random.fold_in(key, 2**32 - 1)
    return jax.vmap(jax.random.fold_in, (None, 0))(own, indices // solver.size)


def example_keys(key: PRNGKeyArray, indices: Array) -> tuple[PRNGKeyArray, PRNGKeyArray]:
    """The keys of each example's start, and of its path."""
    keys = jax.vmap(lambda index: jax.random.split(jax.random.fold_in(key, index)))(indices)
    return keys[:, 0], keys[:, 1]


@jit
def _sample(key, indices, cond, model, times, options, *, shape, dtype, batch_size, sharding):
    def run(indices, cond, own_times):
        grid = times if own_times is None else own_times
        starts, paths = example_keys(key, indices)
        prior = jax.vmap(model.process.prior, (0, None, 0 if grid.ndim == 2 else None, None))
        x = prior(starts, shape, grid[..., 0], dtype)
        shared = _population_keys(key, indices, options.solver)
        problem = Problem(model, cond, paths, grid, -1, shared=shared)
        return _solve(problem, x, None, None, options)

    return chunked(run, batch_size, sharding)(indices, cond, _own_times(times))


def _own_times(times: Array) -> Array | None:
    """Grids of the examples' own, to be mapped over.

    A shared grid stays out of the batch: steps then branch, and do not compute both sides.
    """
    return times if times.ndim == 2 else None


@jit
def _continue(
    key, x, cond, model, times, options, *, memory, notes, first_step, direction, batch_size,
    sharding,
):  # fmt: skip
    def run(indices, x, memory, notes, cond, own_times):
        grid = times if own_times is None else own_times
        paths = shared = None
        if key is not None:
            paths, shared = example_keys(key, indices)[1], None
            shared = _population_keys(key, indices, options.solver)
            if first_step is None:
                # A stream of its own for every start, which repeats nobody's noise.
                bits = jnp.broadcast_to(float_bits(grid[..., 0]), indices.shape)
                paths = jax.vmap(jax.random.fold_in)(paths, bits)
                shared = None if shared is None else jax.vmap(jax.random.fold_in)(shared, bits)
        first = 0 if first_step is None else first_step
        problem = Problem(model, cond, paths, grid, direction, None, first, shared)
        return _solve(problem, x, memory, notes, options)

    indices = jnp.arange(x.shape[0])
    chunks = chunked(run, batch_size, sharding)
    return chunks(indices, x, memory, notes, cond, _own_times(times))


def resolve_grid(model, times, solver, num_samples, *, increasing=False) -> Array:
    """The grid of `sample`'s `times`, checked."""
    own = isinstance(solver, DiffusionSolver)
    process, counted = model.process, np.ndim(times) == 0
    if np.ndim(times) == 2:
        times = check_grids(process, times, num_samples, increasing=increasing)
    else:
        t_end = 0.0 if own and not increasing else process.t_min
        customary = solver.default_times if own else None
        times = resolve_times(
            process, times, t_end=t_end, increasing=increasing, customary=customary
        )
        if counted and own and isinstance(model, Denoiser) and model.bounded_start:
            times = bounded_times(process, times)
    if not own:
        _stock.check_stock(solver, process, times)
    elif not counted and not increasing:
        for part in (model, solver):
            if isinstance(part, Denoiser | DiffusionSolver) and part.needs_signal:
                check_signal_start(type(part), process, times)
    return times


def _check_last_k(last_k, times) -> None:
    if last_k is not None and last_k > times.shape[-1] - 1:
        raise ValueError(
            f"`last_k` must be at most the number of steps {times.shape[-1] - 1}, got {last_k}. "
            "Leave it out to differentiate through all of them."
        )


def _check_saved(saveat: diffrax.SaveAt | None, times: Array) -> None:
    """Reject times to save at that the grid does not reach, where they are known."""
    if saveat is None or saveat.subs.ts is None:
        return
    if not (is_known(saveat.subs.ts) and is_known(times)):
        return
    wanted, grid = np.asarray(saveat.subs.ts), np.asarray(times)
    low, high = grid.min(-1).max(), grid.max(-1).min()
    outside = wanted[(wanted < low - 1e-6 * high) | (wanted > high * (1 + 1e-6))]
    down = grid[..., 0].max() > grid[..., -1].min()
    order = np.diff(wanted, axis=-1)
    if np.isnan(wanted).any() or ((order > 0) if down else (order < 0)).any():
        raise ValueError(
            f"`saveat.ts` must {'decrease' if down else 'increase'}, as the grid does, got "
            f"{wanted.tolist()}. Sort them."
        )
    if outside.size:
        raise ValueError(
            f"`saveat.ts` must lie on the grid, between {low:g} and {high:g}, got {outside[0]:g}. "
            "Save within the times that are integrated."
        )


def _check_options(model, times, num_samples, batch_size, options: _Options) -> None:
    """Reject options that do not go together."""
    solver, controller, _, saveat, last_k = options
    own = isinstance(solver, DiffusionSolver)
    if controller is not None and own:
        raise ValueError(
            f"`stepsize_controller` needs a stock diffrax solver, got {type(solver).__name__}: the "
            "solvers of this library step through `times`. Use e.g. diffrax.Tsit5()."
        )
    if not own:
        check_stepless(model, f"a stock diffrax solver such as {type(solver).__name__}")
    if saveat is not None and (not isinstance(saveat.subs, diffrax.SubSaveAt) or saveat.dense):
        raise ValueError(
            f"`saveat` must name times, got {saveat}. Use t0, t1, ts, steps and fn of "
            "diffrax.SaveAt; of `dense` and `subs` nothing is kept."
        )
    if last_k is not None:
        check_count("last_k", last_k, instead="Take jax.lax.stop_gradient of the result for none.")
        if saveat is not None or controller is not None:
            raise ValueError(
                "`last_k` needs a fixed grid and no `saveat`, got both or one of them. Leave "
                "`last_k` out to differentiate through all steps."
            )
    check_batch_size(batch_size)
    if isinstance(solver, PopulationSolver):
        for argument, count in (("num_samples", num_samples), ("batch_size", batch_size)):
            if count is not None and count % solver.size:
                raise ValueError(
                    f"`{argument}` must be a multiple of the population's size {solver.size}, got "
                    f"{count}. Consecutive examples form a population."
                )
        if np.ndim(times) == 2:
            raise ValueError(
                "`times` must be one grid for all with a population, whose particles step "
                f"together, got shape {jnp.shape(times)}."
            )


def sample(
    key: PRNGKeyArray,
    denoiser: Denoiser | FlowMap,
    shape: tuple[int, ...],
    num_samples: int,
    *,
    cond: PyTree = None,
    solver: diffrax.AbstractSolver = DDIM(),
    times: int | ArrayLike = 50,
    batch_size: int | None = None,
    first_index: int | Array = 0,
    sharding: jax.sharding.NamedSharding | None = None,
    dtype: jnp.dtype | None = None,
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
    last_k: int | None = None,
    saveat: diffrax.SaveAt | None = None,
) -> Solution:
    """Draw samples: start from the process's prior at times[0] and integrate down the grid.

    Compiled once for each structure (shapes, kind of solver, number of steps): new weights, a
    new guidance scale or a new grid of equal length reuse the program. Example i draws all of
    its noise from `fold_in(key, i)`, with i its global index, and so does not depend on the
    batch size, the chunking or the number of devices.

    Differentiable by weights, conditions, scales and times. Examples are integrated together, so
    that a gradient with respect to weights is summed over the batch step by step, and takes the
    memory of one step and of the states between steps.

    Args:
        key: typed PRNG key.
        denoiser: the denoiser; guidance is a denoiser too. A `FlowMap` for solvers of those.
        shape: shape of one example, `(*event)`.
        num_samples: how many.
        cond: pytree with a leading axis of `num_samples`, or None; see `jaxdiff.conditions`.
        solver: a solver of this library; an explicit diffrax ODE solver, which is then
            integrated in variables that are finite at both ends; or a diffrax SDE solver in a
            `ReverseSDE`.
        times: number of steps on the grid customary for the process and the solver, or a
            decreasing grid of times, shared, `(num_steps + 1,)`, or one per example,
            `(num_samples, num_steps + 1)`. Grids may end at 0, except for stock solvers, whose
            customary grid ends at t_min.
        batch_size: examples computed at a time, to bound memory; None for all at once.
        first_index: global index of the first example, to draw a long run in pieces; it may be
            traced.
        sharding: sharding of the sample axis over a mesh, e.g. `parallel.batch_sharding(mesh)`.
        dtype: dtype of the samples; None for JAX's default float.
        stepsize_controller: a diffrax controller for adaptive steps between the ends of the
            grid; stock solvers only.
        adjoint: how to differentiate through the sampler. None computes every step once more on
            the way back; `diffrax.DirectAdjoint()` or `diffrax.ForwardMode()` for forward
            derivatives.
        last_k: differentiate through the last k steps alone, with the state before a constant;
            None for all.
        saveat: which states to keep in `trajectory`: a `diffrax.SaveAt` in times of the process,
            e.g. `SaveAt(t0=True, steps=True)` for all, or `SaveAt(ts=...)` for given ones, in the
            order of the grid; between grid points states are interpolated linearly by the
            solvers of this library. Its `fn(t, x, problem)` chooses what to keep, e.g.
            `lambda t, x, problem: problem.x0(x, t)`.

    Returns:
        A `Solution`.

    Raises:
        TypeError: if `key` is not a typed key, the solver is not explicit, or the denoiser is not
            of the kind that the solver steps by.
        ValueError: for a grid that is not decreasing or leaves the process, or a `cond` of the
            wrong length.

    Examples:
        >>> oracle = oracles.gaussian(processes.VP(), jnp.zeros(2), jnp.eye(2))
        >>> jaxdiff.sample(jax.random.key(0), oracle, (2,), 8, times=20).x.shape
        (8, 2)
    """
    check_key(key)
    check_model(solver, denoiser)
    num_samples = check_count("num_samples", num_samples)
    check_cond(cond, num_samples)
    # To bind a method, equinox flattens the network: a tenth of a short call.
    kind: Any = type(denoiser)
    kind.check_cond(denoiser, cond)
    check_scalars(denoiser, solver)
    if isinstance(solver, DiffusionSolver):
        solver.check_cond(cond)
    if is_known(first_index):
        check_count("first_index", first_index, least=0)
    options = _Options(solver, stepsize_controller, adjoint, saveat, last_k)
    _check_options(denoiser, times, num_samples, batch_size, options)
    if isinstance(solver, PopulationSolver) and is_known(first_index) and first_index % solver.size:
        raise ValueError(
            f"`first_index` must be a multiple of the population's size {solver.size}, got "
            f"{first_index}."
        )
    times = resolve_grid(denoiser, times, solver, num_samples)
    _check_last_k(last_k, times)
    _check_saved(saveat, times)
    indices = first_index + np.arange(num_samples, dtype=jax.dtypes.canonicalize_dtype(int))
    if sharding is not None:
        check_no_host(denoiser, solver)
        if num_samples % (parts := num_parts(sharding)):
            raise ValueError(
                f"`num_samples` must be a multiple of the {parts} devices of `sharding`, got "
                f"{num_samples}. Draw {-(-num_samples // parts) * parts}, and leave some out."
            )
        if isinstance(solver, PopulationSolver):
            for argument, count in (("num_samples", num_samples), ("batch_size", batch_size)):
                if count is not None and count % (parts * solver.size):
                    raise ValueError(
                        f"`{argument}` must be a multiple of {parts} devices times the "
                        f"population's size {solver.size}, got {count}."
                    )
        indices, cond = place_batch((indices, cond), sharding)
        key, denoiser, times, options = join_devices((key, denoiser, times, options), sharding)
    if not isinstance(shape, Sequence):
        raise TypeError(
            f"`shape` must be that of an example, a tuple, got {shape!r}. Pass (2,), say."
        )
    shape = tuple(check_count("shape", size, least=0) for size in shape)
    dtype = jnp.dtype(jnp.result_type(float) if dtype is None else dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`dtype` must be of floats, got {dtype}. Pass jnp.float32, say.")
    return _sample(
        key, indices, cond, denoiser, times, options, shape=shape, dtype=dtype,
        batch_size=batch_size, sharding=sharding,
    )  # fmt: skip


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
    adjoint: diffrax.AbstractAdjoint | None = None,
    last_k: int | None = None,
    saveat: diffrax.SaveAt | None = None,
) -> Solution:
    """Carry data to noise along the probability-flow ODE: the reverse of deterministic `sample`.

    Args:
        denoiser: the denoiser.
        x: states at the first time of the grid, `(num_samples, *event)`; integers become floats.
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
        last_k: as in `sample`.
        saveat: as in `sample`.

    Returns:
        A `Solution`; its x are the states at the last time of the grid.

    Raises:
        TypeError: for a denoiser that draws, remembers or decides once a step.
        ValueError: for a stochastic solver, a grid that is not increasing or leaves the process,
            or a `cond` of the wrong length.

    Examples:
        >>> oracle = oracles.gaussian(processes.VP(), jnp.zeros(2), jnp.eye(2))
        >>> noise = jaxdiff.invert(oracle, jnp.ones((3, 2)), times=20)
        >>> noise.x.shape
        (3, 2)
    """
    stochastic = isinstance(solver, _stock.ReverseSDE)
    if stochastic or (isinstance(solver, DiffusionSolver) and solver.stochastic):
        raise ValueError(
            f"`solver` must be deterministic to invert, got {solver}. Use DDIM() or EDMHeun()."
        )
    if isinstance(solver, PopulationSolver):
        raise ValueError(
            f"`solver` must move examples by themselves to invert, got {type(solver).__name__}."
        )
    check_stepless(denoiser, "`invert`")
    options = _Options(solver, stepsize_controller, adjoint, saveat, last_k)
    return _run(
        None, denoiser, _examples(x), times, options, memory=memory, cond=cond,
        batch_size=batch_size, direction=1,
    )  # fmt: skip


def denoise(
    key: PRNGKeyArray,
    denoiser: Denoiser | FlowMap,
    x: Array,
    *,
    memory: PyTree = None,
    notes: dict[int, PyTree] | None = None,
    first_step: int | Array | None = None,
    cond: PyTree = None,
    solver: diffrax.AbstractSolver = DDIM(),
    times: int | ArrayLike = 50,
    batch_size: int | None = None,
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
    last_k: int | None = None,
    saveat: diffrax.SaveAt | None = None,
) -> Solution:
    """Integrate given noisy states down a grid: `sample` without its draw of the start.

    Args:
        key: typed PRNG key; example i draws from `fold_in(key, i)`.
        denoiser: the denoiser.
        x: states at the first time of the grid, `(num_samples, *event)`; integers become floats.
        memory: as in `invert`.
        notes: of the `Solution` that ended at x, what maps inside the denoiser remember; None to
            start afresh.
        first_step: None draws noise that depends on the time of the start, and repeats neither
            that of `sample` with the same key nor that of another piece. A number k draws that of
            `sample` from its step k on: with 0, from the start that `sample` draws, the same
            samples come out, and with the number of steps already made, a run in pieces is the
            whole run, of solvers whose step depends on its own two times alone. Multistep methods
            begin each piece at first order, those that lower their order at the end lower it at
            the end of each, and EDMHeun's churn counts the steps of the piece. It may be traced.
        cond: as in `sample`.
        solver: as in `sample`.
        times: as in `sample`.
        batch_size: as in `sample`.
        stepsize_controller: as in `sample`.
        adjoint: as in `sample`.
        last_k: as in `sample`.
        saveat: as in `sample`.

    Returns:
        A `Solution`.

    Raises:
        TypeError: as `sample`.
        ValueError: as `sample`.

    Examples:
        >>> oracle = oracles.gaussian(processes.VP(), jnp.ones(2), jnp.eye(2))
        >>> x = jnp.zeros((3, 2))  # at t = 0.5
        >>> out = jaxdiff.denoise(jax.random.key(0), oracle, x, times=jnp.linspace(0.5, 0, 11))
        >>> out.x.shape, out.nfe[0].item()
        ((3, 2), 10)
    """
    check_key(key)
    options = _Options(solver, stepsize_controller, adjoint, saveat, last_k)
    if first_step is not None:
        if is_known(first_step):
            check_count("first_step", first_step, least=0)
        first_step = jnp.asarray(first_step, jnp.int32)
    return _run(
        key, denoiser, _examples(x), times, options, memory=memory, cond=cond,
        batch_size=batch_size, direction=-1, notes=notes, first_step=first_step,
    )  # fmt: skip


def _run(
    key, model, x, times, options, *, memory, cond, batch_size, direction, notes=None,
    first_step=None,
):  # fmt: skip
    solver, count = options.solver, x.shape[0]
    check_model(solver, model)
    _check_options(model, times, count, batch_size, options)
    check_cond(cond, count)
    model.check_cond(cond)
    check_scalars(model, solver)
    check_finite(x)
    split = _split_of(x)
    if split is not None:
        check_no_host(model, solver)
    if isinstance(solver, DiffusionSolver):
        solver.check_cond(cond)
    times = resolve_grid(model, times, solver, count, increasing=direction == 1)
    _check_last_k(options.last_k, times)
    _check_saved(options.saveat, times)
    if isinstance(solver, DiffusionSolver):
        solver.check_start(model.process, times, memory)
    return _continue(
        key, x, cond, model, times, options, memory=memory, notes=notes, first_step=first_step,
        direction=direction, batch_size=batch_size, sharding=split,
    )  # fmt: skip


def _examples(x: ArrayLike) -> Array:
    x = as_float_array(x)
    if x.ndim == 0:
        raise ValueError("`x` must hold examples along its first axis, got a single number.")
    return x


def _split_of(x: Array) -> jax.sharding.NamedSharding | None:
    """How examples are split over devices, where that is known."""
    found = x.sharding if is_known(x) else None
    return found if isinstance(found, jax.sharding.NamedSharding) and num_parts(found) > 1 else None
