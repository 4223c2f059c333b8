"""Guidance policies: how strong each step of a grid is guided, and a search for cheap ones."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, PRNGKeyArray, PyTree

from jaxdiff._checks import check_count, check_key, check_kind, check_number
from jaxdiff._tree import Number, as_float_array, is_known, jit
from jaxdiff.conditions import null_where
from jaxdiff.denoiser import Denoiser, Estimate
from jaxdiff.guidance._scale import WithNull, extrapolated
from jaxdiff.sampling import resolve_grid, sample
from jaxdiff.solvers import DDIM, DiffusionSolver
from jaxdiff.stepwise import Stepwise, row_of


def _check_weights(weights: Array) -> None:
    """Reject what is no table of one weight a step."""
    if weights.ndim != 1 or weights.size == 0:
        raise ValueError(
            f"`weights` must have one number per step, (num_steps,), got shape {weights.shape}."
        )
    if is_known(weights) and not np.all(np.isfinite(weights)):
        raise ValueError(f"`weights` must be finite, got {np.asarray(weights).tolist()}.")


def cost_of(weight: Array) -> Array:
    """Evaluations of an estimate under guidance of a weight: 1 at 0 and 1, and else 2."""
    return jnp.where((weight == 0) | (weight == 1), 1, 2)


class GuidancePolicy(Stepwise, WithNull):
    """D_null + w_i (D_cond - D_null) in step i of the grid, one evaluation where w_i is 0 or 1.

    Kind 2: decides once a step, by its number; what is not needed is skipped. The weights belong to
    a grid, and are refused on one of another number of steps.

    Args:
        base: a denoiser trained with label dropout.
        null_cond: as of `ClassifierFree`.
        weights: w, `(num_steps,)`; 1 is the conditional model, and 0 the unconditional one.

    Raises:
        ValueError: on a grid of another number of steps, and where steps have no number.

    Reference: Castillo, Kohler, Perez, Perez, Pumarola, Ghanem, Arbelaez, Thabet, "Adaptive
    Guidance: Training-free Acceleration of Conditional Diffusion Models", 2023, arXiv 2312.12487.
    `search_policy` finds such weights.
    """

    base: Denoiser
    null_cond: PyTree
    weights: Array = eqx.field(converter=as_float_array)

    def __check_init__(self):
        _check_weights(self.weights)

    @property
    def evaluations(self) -> Array | int:
        """The base's, twice where both are needed."""
        if self.bound is None:
            return 2 * self.base.evaluations
        return cost_of(row_of(self, self.weights, "weights")) * self.base.evaluations

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        weight = row_of(self, self.weights, "weights")

        def alone(null):
            return self.base.estimate(x, t, null_where(null, cond, self.null_cond), key=key)

        def guided(_):
            return _mixed(self, weight, x, t, cond, key)

        both = (weight != 0) & (weight != 1)
        return jax.lax.cond(both, guided, alone, weight == 0)


def _mixed(
    node: WithNull, weight: Array, x: Array, t: Array, cond: PyTree, key: PRNGKeyArray | None
) -> Estimate:
    given, none = node.both(x, t, cond, key)
    return extrapolated(weight, node.process, x, t, given, none)


class _Relaxed(Stepwise, WithNull):
    """A policy whose weights have derivatives: both evaluations at every step."""

    base: Denoiser
    null_cond: PyTree
    weights: Array

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        return _mixed(self, row_of(self, self.weights, "weights"), x, t, cond, key)


class PolicySearch(NamedTuple):
    """What a search found, for each target and seed.

    Attributes:
        weights: of the best choice of every step, `(targets, seeds, num_steps)`, for
            `GuidancePolicy`.
        evaluations: that it costs, `(targets, seeds)`, in estimates of the base.
        error: its E |x - x_guided|^2 over that of the conditional model, `(targets, seeds)`.
        probabilities: of the choices at the end, `(targets, seeds, num_steps, choices)`.
        losses: of every iteration, `(targets, seeds, num_iterations)`.
    """

    weights: Array
    evaluations: Array
    error: Array
    probabilities: Array
    losses: Array


def search_policy(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    null_cond: PyTree,
    shape: tuple[int, ...],
    num_samples: int,
    *,
    scale: Number,
    target: ArrayLike,
    choices: ArrayLike | None = None,
    cond: PyTree = None,
    seeds: int = 1,
    solver: DiffusionSolver = DDIM(),
    times: int | ArrayLike = 20,
    penalty: Number = 1.0,
    learning_rate: Number = 0.1,
    num_iterations: int = 200,
    coldest: Number = 0.1,
) -> PolicySearch:
    """Which steps to guide, and how strong, for samples like those of guidance in every step.

    In each step i the choices are mixed by softmax(a_i / temperature); the loss, by a through the
    sampler,

        E |x - x_guided|^2 / E |x_cond - x_guided|^2 + penalty relu(expected evaluations - target),

    is followed by Adam, the temperature falling from 1 to `coldest`, so that little is lost when
    the likeliest choice of every step is taken. As D is affine in its weight, a mixture of choices
    is guidance by the mean weight. All targets and seeds run in one program; a seed draws its own
    samples and start. Weights depend on model, scale, solver and grid. A mean weight between two
    choices is none of them: of many choices, take the best of several seeds.

    Args:
        key: typed key.
        denoiser: a denoiser trained with label dropout, without guidance.
        null_cond: as of `ClassifierFree`.
        shape: of one example.
        num_samples: of a seed.
        scale: of the guidance to come near to.
        target: evaluations to come down to, in estimates of the base over all steps; one number or
            `(targets,)`.
        choices: weights of a step; None for (0, 1, scale). Those other than 0 and 1 cost two.
        cond: as of `sample`, one row per sample.
        seeds: how many.
        solver: a solver of this library.
        times: as of `sample`, a shared grid.
        penalty: of an evaluation too many. 1 is as much as all of guidance is worth.
        learning_rate: of Adam.
        num_iterations: of them.
        coldest: the last temperature.

    Returns:
        A `PolicySearch`.

    Raises:
        TypeError: if `key` is not a typed key, or for a stock solver.
        ValueError: for a scale of 1, at which there is nothing to look for.

    Reference: Castillo, Kohler, Perez, Perez, Pumarola, Ghanem, Arbelaez, Thabet, "Adaptive
    Guidance: Training-free Acceleration of Conditional Diffusion Models", 2023, arXiv 2312.12487.
    There the loss is not divided, and the temperature not lowered.
    """
    check_key(key)
    check_kind("solver", solver, DiffusionSolver, "DDIM()")
    check_count("num_iterations", num_iterations)
    check_count("seeds", seeds)
    check_number("scale", scale)
    check_number("penalty", penalty, least=0.0)
    check_number("learning_rate", learning_rate, above=0.0)
    check_number("coldest", coldest, above=0.0)
    if is_known(scale) and scale == 1:
        raise ValueError("`scale` must not be 1, the conditional model itself. Pass 3.0, say.")
    grid = resolve_grid(denoiser, times, solver, num_samples)
    if grid.ndim != 1:
        raise ValueError(f"`times` must be a grid for all examples, got shape {grid.shape}.")
    targets = jnp.atleast_1d(as_float_array(target))
    options = jnp.asarray([0.0, 1.0, scale]) if choices is None else as_float_array(choices)
    _check_weights(options)
    numbers = (float(n) if is_known(n) else n for n in (scale, penalty, learning_rate, coldest))
    return _search(
        key, denoiser, null_cond, cond, grid, solver, targets, options, *numbers, shape=shape,
        num_samples=num_samples, seeds=seeds, num_iterations=num_iterations,
    )  # fmt: skip


@jit
def _search(
    key, denoiser, null_cond, cond, grid, solver, targets, options, scale, penalty, learning_rate,
    coldest, *, shape, num_samples, seeds, num_iterations,
):  # fmt: skip
    steps = grid.shape[0] - 1
    optimizer = optax.adam(learning_rate)
    costs = cost_of(options).astype(options.dtype)

    def one(target, seed):
        start_key, noise_key = jax.random.split(jax.random.fold_in(key, seed))

        def final(weights):
            policy = _Relaxed(denoiser, null_cond, weights)
            out = sample(
                noise_key, policy, shape, num_samples, cond=cond, solver=solver, times=grid
            )
            return out.x

        guided = final(jnp.full(steps, scale, options.dtype))
        whole = jnp.mean((final(jnp.ones(steps, options.dtype)) - guided) ** 2)

        def error(weights):
            return jnp.mean((final(weights) - guided) ** 2) / whole

        def loss(logits, temperature):
            shares = jax.nn.softmax(logits / temperature)
            excess = jnp.sum(shares @ costs) - target
            return error(shares @ options) + penalty * jax.nn.relu(excess)

        def improve(carry, i):
            logits, state = carry
            temperature = coldest ** (i / max(num_iterations - 1, 1))
            value, slope = jax.value_and_grad(loss)(logits, temperature)
            updates, state = optimizer.update(slope, state)
            return (optax.apply_updates(logits, updates), state), value

        start: Any = 0.01 * jax.random.normal(start_key, (steps, options.size), options.dtype)
        carry = start, optimizer.init(start)
        (logits, _), losses = jax.lax.scan(improve, carry, jnp.arange(num_iterations))
        weights = options[jnp.argmax(logits, -1)]
        shares = jax.nn.softmax(logits / coldest)
        return PolicySearch(weights, jnp.sum(cost_of(weights)), error(weights), shares, losses)

    each_seed = jax.vmap(one, (None, 0))
    return jax.vmap(each_seed, (0, None))(targets, np.arange(seeds))
