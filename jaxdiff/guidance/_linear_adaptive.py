"""Guidance whose unconditional branch is, in some steps, a combination of what is known already."""

import dataclasses
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, PRNGKeyArray, PyTree

from jaxdiff._checks import check_count, check_key, check_kind
from jaxdiff._tree import as_float_array, is_known, jit, number
from jaxdiff.denoiser import Denoiser, Estimate
from jaxdiff.guidance._scale import Scale, WithNull, check_scale, scale_at
from jaxdiff.predictions import Eps
from jaxdiff.sampling import example_keys, plan_of, resolve_grid
from jaxdiff.solvers import DDIM, DiffusionSolver, Problem
from jaxdiff.stepwise import Stepwise, at_step, row_of

# What a step does.
CONDITIONAL, REPLACED, GUIDED = 0, 1, 2


class LinearAdaptiveGuidance(Stepwise, WithNull):
    """Classifier-free guidance whose eps_null is made of earlier noises in some of the steps.

    In such a step i, with earlier steps counted back from it,

        eps_null ~ sum_j a_ij eps_cond(i - j) + sum_k b_ik eps_null(i - k),
        j = 0, ..., p,  k = 1, ..., p.

    Kind 2: remembers both noises of the last p guided steps, replaced ones too; decides by the
    number of the step, and skips what is not needed. The tables belong to a grid, and are refused
    on one of another number of steps; to a model, its scale and a solver of one evaluation a step
    as well. `fit_linear_guidance` makes them.

    For two Gaussians of one covariance v I, eps_cond - eps_null is the same vector at all times but
    for its length, which is f(t) = sigma alpha / (alpha^2 v + sigma^2): one step of memory, with
    a = (1, -r) and b = r, r = f(t_i) / f(t_i-1), is exact. Of another covariance each of its axes
    has an r of its own, and a rest remains.

    Args:
        base: a denoiser trained with label dropout.
        null_cond: as of `ClassifierFree`.
        of_cond: a, `(num_steps, p + 1)`, of this step and those before, the latest first.
        of_null: b, `(num_steps, p)`, the latest first.
        kinds: what each step does, `(num_steps,)` integers: 2 evaluates both, 1 replaces eps_null,
            0 is the conditional model, and not remembered.
        scale: as of `ClassifierFree`.

    Raises:
        ValueError: for tables of other shapes; on a grid of another number of steps, and where
            steps have no number.

    Reference: Castillo, Kohler, Perez, Perez, Pumarola, Ghanem, Arbelaez, Thabet, "Adaptive
    Guidance: Training-free Acceleration of Conditional Diffusion Models", 2023, arXiv 2312.12487,
    where it is LinearAG.
    """

    base: Denoiser
    null_cond: PyTree
    of_cond: Array = eqx.field(converter=as_float_array)
    of_null: Array = eqx.field(converter=as_float_array)
    kinds: Array = eqx.field(converter=jnp.asarray)
    scale: Scale = number(1.0)

    def __check_init__(self):
        check_scale(self.scale)
        steps = len(self.kinds)
        shapes = self.of_cond.shape, self.of_null.shape, self.kinds.shape
        past = self.of_null.shape[-1]
        if shapes != ((steps, past + 1), (steps, past), (steps,)):
            raise ValueError(
                "`of_cond`, `of_null` and `kinds` must have the shapes (num_steps, p + 1), "
                f"(num_steps, p) and (num_steps,), got {', '.join(map(str, shapes))}."
            )
        _check_kinds(self.kinds)

    @property
    def evaluations(self) -> Array | int:
        """The base's, twice where both are evaluated."""
        if self.bound is None:
            return 2 * self.base.evaluations
        return jnp.where(self._kind() == GUIDED, 2, 1) * self.base.evaluations

    def _kind(self) -> Array:
        return row_of(self, self.kinds, "kinds")

    def init_memory(self, x: Array) -> Array:
        """The noises of both branches in the last steps, `(2, p, *event)`: none."""
        return jnp.zeros((2, self.of_null.shape[1], *x.shape), x.dtype)

    def terms(self, eps: Array) -> Array:
        """What is combined, `(2 p + 1, *event)`, for the conditional noise of this step."""
        return jnp.concatenate([eps[None], *self.step.memory])

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        process, bank = self.process, self.step.memory
        scale = scale_at(self.scale, process, t)

        def noise(found):
            return Eps().from_x0(process, x, t, found.x0).astype(x.dtype)

        def guided(given, none, eps, eps_null):
            x0 = none + scale * (given.x0 - none)
            new = jnp.stack([eps, eps_null])[:, None]
            return given.moved(process, t, x0), jnp.concatenate([new, bank], 1)[:, :-1]

        def conditional():
            return self.base.estimate(x, t, cond, key=key), bank

        def replaced():
            given = self.base.estimate(x, t, cond, key=key)
            eps = noise(given)
            a, b = (row_of(self, getattr(self, name), name) for name in ("of_cond", "of_null"))
            weights = jnp.concatenate([a, b]).astype(x.dtype)
            eps_null = jnp.tensordot(weights, self.terms(eps), 1).astype(x.dtype)
            none = Eps().to_x0(process, x, t, eps_null)
            return guided(given, none, eps, eps_null)

        def whole():
            given, none = self.both(x, t, cond, key)
            return guided(given, none.x0, noise(given), noise(none))

        found, bank = jax.lax.switch(self._kind(), [conditional, replaced, whole])
        return self.remember(found, bank)


def _check_kinds(kinds: Array) -> None:
    """Reject anything but 0, 1 and 2, and a first step with nothing to combine."""
    if not jnp.issubdtype(kinds.dtype, jnp.integer):
        raise ValueError(f"`kinds` must be integers, got {kinds.dtype}.")
    if is_known(kinds):
        values = np.asarray(kinds)
        if values.size == 0 or values.min() < 0 or values.max() > 2 or values[0] == REPLACED:
            raise ValueError(
                "`kinds` must be 2 (both), 1 (replaced) or 0 (conditional), and not begin with 1, "
                f"got {values.tolist()}."
            )


class LinearGuidanceFit(NamedTuple):
    """What a fit gives.

    Attributes:
        guidance: the map.
        residual: of every step, `(num_steps,)`: the root mean square of what the combination is off
            by, over that of eps_cond - eps_null; 0 where these are the same.
    """

    guidance: LinearAdaptiveGuidance
    residual: Array


def fit_linear_guidance(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    null_cond: PyTree,
    shape: tuple[int, ...],
    num_samples: int,
    *,
    scale: Scale,
    cond: PyTree = None,
    kinds: ArrayLike | None = None,
    past: int = 2,
    solver: DiffusionSolver = DDIM(),
    times: int | ArrayLike = 20,
) -> LinearGuidanceFit:
    """The tables of `LinearAdaptiveGuidance`, by least squares over samples, step after step.

    In a closed loop: a step is fitted on the states and the memory that earlier ones make with
    their replacements, so that errors do not drift. Both branches are evaluated in all steps, and
    the combination of least norm is taken where several are as good.

    Args:
        key: typed key.
        denoiser: a denoiser trained with label dropout, without guidance.
        null_cond: as of `ClassifierFree`.
        shape: of one example.
        num_samples: to fit on; the paper's are 200.
        scale: as of `ClassifierFree`.
        cond: as of `sample`, one row per sample.
        kinds: as of `LinearAdaptiveGuidance`; None for 2 and 1 in turns in the first half of the
            steps, and 0 in the second.
        past: p; the paper's are all steps before.
        solver: a solver of this library, of one evaluation a step.
        times: as of `sample`, a shared grid.

    Returns:
        A `LinearGuidanceFit`.

    Raises:
        TypeError: if `key` is not a typed key, or for a stock solver.
        ValueError: for kinds of another number.

    Reference: Castillo, Kohler, Perez, Perez, Pumarola, Ghanem, Arbelaez, Thabet, "Adaptive
    Guidance: Training-free Acceleration of Conditional Diffusion Models", 2023, arXiv 2312.12487.
    The loop is closed here.
    """
    check_key(key)
    check_kind("solver", solver, DiffusionSolver, "DDIM()")
    check_count("past", past)
    grid = resolve_grid(denoiser, times, solver, num_samples)
    if grid.ndim != 1:
        raise ValueError(f"`times` must be a grid for all examples, got shape {grid.shape}.")
    steps = len(grid) - 1
    if kinds is None:
        turns = np.where(np.arange(steps) % 2, REPLACED, GUIDED)
        kinds = np.where(np.arange(steps) < steps // 2, turns, CONDITIONAL)
    kinds = jnp.asarray(kinds)
    if kinds.shape != (steps,):
        raise ValueError(f"`kinds` must have one per step, {steps}, got shape {kinds.shape}.")
    empty = LinearAdaptiveGuidance(
        denoiser, null_cond, jnp.zeros((steps, past + 1)), jnp.zeros((steps, past)), kinds, scale
    )
    dtype = jnp.result_type(float)
    return _fit(key, empty, cond, grid, solver, shape=shape, num_samples=num_samples, dtype=dtype)


@jit
def _fit(key, empty, cond, grid, solver, *, shape, num_samples, dtype):
    process, past = empty.process, empty.of_null.shape[1]
    starts, paths = example_keys(key, jnp.arange(num_samples))
    x = jax.vmap(process.prior, (0, None, None, None))(starts, shape, grid[0], dtype)
    problem = Problem(empty, cond, paths, grid, -1)
    problem = dataclasses.replace(problem, plan=plan_of(solver, problem))
    begun = solver.init(None, None, None, x, problem)

    def advance(carry, i):
        x, memory, notes, a, b = carry
        step = problem.step(i, memory, notes)

        def look(x, cond, step):
            bound = at_step(empty, step)
            given, none = bound.both(x, step.t, cond, None)
            pair = (Eps().from_x0(process, x, step.t, found.x0) for found in (given, none))
            eps, eps_null = pair
            return bound.terms(eps), eps_null

        terms, wanted = jax.vmap(look, (0, 0, step.axes))(x, cond, step)
        columns = jnp.moveaxis(terms, 1, -1).reshape(-1, 2 * past + 1)
        values, rest, *_ = jnp.linalg.lstsq(columns, wanted.reshape(-1))
        rest = columns @ values - wanted.reshape(-1)
        gap = terms[:, 0] - wanted
        whole = jnp.sum(gap**2)
        residual = jnp.where(
            whole > 0, jnp.sqrt(jnp.sum(rest**2) / jnp.where(whole > 0, whole, 1)), 0
        )
        a, b = a.at[i].set(values[: past + 1]), b.at[i].set(values[past + 1 :])
        fitted = eqx.tree_at(lambda p: (p.denoiser.of_cond, p.denoiser.of_null), problem, (a, b))
        moved = solver.take_batch(fitted, x, step)
        return (moved.x, moved.memory, moved.notes, a, b), residual

    tables = empty.of_cond, empty.of_null
    carry = x, begun.memory, begun.notes, *tables
    (*_, a, b), residual = jax.lax.scan(advance, carry, jnp.arange(len(grid) - 1))
    fitted = eqx.tree_at(lambda d: (d.of_cond, d.of_null), empty, (a, b))
    return LinearGuidanceFit(fitted, residual)
