"""The search for strengths of training-free guidance."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, PRNGKeyArray, PyTree

from jaxdiff._checks import check_callable, check_count, check_key, check_kind
from jaxdiff._tree import jit
from jaxdiff.denoiser import Denoiser
from jaxdiff.guidance._training_free import GridStrength, Strength, TrainingFree
from jaxdiff.processes import GaussianProcess
from jaxdiff.sampling import resolve_grid, sample

NAMES = ("rho", "mu", "smoothing")


class _ScaledTable(GridStrength):
    """A table times a number."""

    strength: GridStrength
    factor: Any

    def over(self, process: GaussianProcess, times: Array) -> Array:
        """See `GridStrength`."""
        return self.factor * self.strength.over(process, times)


class _ScaledFunction(eqx.Module):
    """A function times a number."""

    strength: Callable[..., Array]
    factor: Any

    def __call__(self, process: GaussianProcess, t: Array, s: Array, length: Array) -> Array:
        return self.factor * self.strength(process, t, s, length)


def _times(strength: Strength, factor: Any) -> Strength:
    if isinstance(strength, GridStrength):
        return _ScaledTable(strength, factor)
    return _ScaledFunction(strength, factor) if callable(strength) else strength * factor


def _sought(solver: TrainingFree) -> list[int]:
    """Which of the strengths matter."""
    there = solver.rho is not None, solver.iterations > 0, solver.draws > 0
    return [i for i, matters in enumerate(there) if matters]


def _with(solver: TrainingFree, factors: Any) -> TrainingFree:
    """The solver, its strengths times these numbers."""
    changes: dict[str, Any] = {
        NAMES[i]: _times(getattr(solver, NAMES[i]), factors[i]) for i in _sought(solver)
    }
    return dataclasses.replace(solver, **changes)


class StrengthSearch(NamedTuple):
    """What a search found.

    Attributes:
        solver: the one that was given, with the best strengths.
        strengths: all that were tried, in order, `(tried, 3)`: rho, mu and smoothing, as numbers by
            which those of the given solver are multiplied.
        scores: their values of the metric, `(tried,)`; -infinity in place of NaN.
    """

    solver: TrainingFree
    strengths: np.ndarray
    scores: np.ndarray


def search_training_free(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    solver: TrainingFree,
    shape: tuple[int, ...],
    num_samples: int,
    *,
    metric: Callable[[Array], Array],
    cond: PyTree = None,
    times: int | ArrayLike = 50,
    start: tuple[float, float, float] = (0.25, 0.25, 0.001),
    factors: tuple[float, float, float] = (2.0, 2.0, 10.0),
    limits: tuple[float, float, float] = (8.0, 8.0, 1.0),
    beam: int = 2,
    rounds: int = 6,
) -> StrengthSearch:
    """Strengths of `TrainingFree` that a metric of its samples likes best, from weak to strong.

    The strengths of the solver, numbers or schedules, are multiplied by three numbers, which begin
    at `start`. In each round the `beam` best of all that were tried, and not yet expanded, are:
    each of their numbers by itself times its factor, up to its limit. All candidates of a round
    have the same noise and run in one program, which is compiled once. A strength that the solver
    does not use is left alone.

    Args:
        key: typed key.
        denoiser: any denoiser.
        solver: the method, with its schedules; strengths of 1 for plain numbers.
        shape: of one example.
        num_samples: of a candidate; the paper's are 32 to 64.
        metric: `(num_samples, *event) -> scalar`, larger for better ones; a pytree.
        cond: as of `sample`, with the entry "y".
        times: as of `sample`, a shared grid.
        start: of rho, mu and smoothing.
        factors: of each, > 1.
        limits: of each, included.
        beam: how many are expanded in a round.
        rounds: how many there are; fewer where nothing is left.

    Returns:
        A `StrengthSearch`.

    Raises:
        TypeError: if `key` is not a typed key, or for another solver.
        ValueError: for a solver without strengths, a start beyond the limits, or a metric that is
            no scalar.

    Reference: Ye, Lin, Han, Xu, Liu, Liang, Zhang, Ermon, "TFG: Unified Training-Free Guidance for
    Diffusion Models", 2024, arXiv 2409.15761. Start, factors and limits are those of its code.
    """
    check_key(key)
    check_kind("solver", solver, TrainingFree, "TrainingFree(log_prob=log_prob)")
    check_callable("metric", metric, "jax.tree_util.Partial(function, reference)")
    check_count("beam", beam)
    check_count("rounds", rounds)
    sought = _sought(solver)
    if not sought:
        raise ValueError(
            "`solver` must use one strength at least: give it rho, iterations for mu, or draws for "
            "smoothing."
        )
    _check_numbers(start, factors, limits)
    grid = resolve_grid(denoiser, times, solver, num_samples)
    rows = max(beam * len(sought), 1 + len(sought))

    def numbers(place: tuple[int, ...]) -> list[float]:
        return [a * b**n for a, b, n in zip(start, factors, place, strict=True)]

    def neighbours(place: tuple[int, ...]) -> list[tuple[int, ...]]:
        found = [tuple(n + (i == j) for j, n in enumerate(place)) for i in sought]
        # Limits are met by products of rounded numbers.
        inside = [np.asarray(numbers(p)) <= np.asarray(limits) * (1 + 1e-6) for p in found]
        return [p for p, within in zip(found, inside, strict=True) if within.all()]

    tried: dict[tuple[int, ...], float] = {}
    expanded: set[tuple[int, ...]] = set()
    new = [(0, 0, 0), *neighbours((0, 0, 0))]
    expanded.add((0, 0, 0))
    for _ in range(rounds):
        table = [numbers(place) for place in new]
        padded = jnp.asarray(table + [table[0]] * (rows - len(table)))
        scores = _scores(
            key, denoiser, solver, cond, grid, metric, padded, shape=shape, num_samples=num_samples
        )
        # Samples that ran away are the worst.
        values = np.nan_to_num(np.asarray(scores, float), nan=-np.inf)
        tried.update(zip(new, values.tolist(), strict=False))
        open_ = sorted(set(tried) - expanded, key=lambda place: -tried[place])[:beam]
        expanded.update(open_)
        new = list(dict.fromkeys(p for place in open_ for p in neighbours(place)))
        new = [place for place in new if place not in tried]
        if not new:
            break
    strengths = np.asarray([numbers(place) for place in tried])
    values = np.asarray(list(tried.values()))
    best = strengths[np.argmax(values)].tolist()
    return StrengthSearch(_with(solver, best), strengths, values)


def _check_numbers(start: Any, factors: Any, limits: Any) -> None:
    """Reject what is no triple, factors that do not grow, and a start beyond the limits."""
    for argument, value in (("start", start), ("factors", factors), ("limits", limits)):
        if np.shape(value) != (3,):
            raise ValueError(
                f"`{argument}` must be three numbers, of rho, mu and smoothing, got {value}."
            )
    if not np.all(np.asarray(factors) > 1):
        raise ValueError(f"`factors` must be above 1, got {factors}.")
    if not np.all(np.asarray(start) <= np.asarray(limits)):
        raise ValueError(f"`start` must not be beyond `limits`, {limits}, got {start}.")


@jit
def _scores(key, denoiser, solver, cond, grid, metric, rows, *, shape, num_samples):
    def score(row):
        found = sample(
            key, denoiser, shape, num_samples, cond=cond, solver=_with(solver, row), times=grid
        )
        value = metric(found.x)
        if jnp.shape(value) != ():
            raise ValueError(
                f"`metric` must return a scalar of all samples, got shape {jnp.shape(value)}."
            )
        return value

    return jax.vmap(score)(rows)
