"""Where a model keeps what a condition means: inner activations put back one by one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_callable, check_cond, check_count, check_key
from jaxdiff.denoiser import Denoiser, edit_taps, reading
from jaxdiff.sampling import denoise, resolve_grid
from jaxdiff.solvers import DDIM, DiffusionSolver, GaussianSolver


def _put(value: Array, old: Array) -> Array:
    return value.astype(old.dtype)


def indirect_effects(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    shape: tuple[int, ...],
    score: Callable[[Array], Array],
    *,
    taps: tuple[str, ...],
    cond: PyTree,
    corrupted: PyTree,
    times: Array | int,
    solver: DiffusionSolver = DDIM(),
) -> dict[str, Any]:
    """How much of what a condition does passes each of a network's inner activations.

    Three kinds of runs from the same noise with the same draws: under `cond`, under `corrupted`,
    and, for every tap, under `corrupted` with the activation replaced, step by step, by that of the
    first run. With s the mean score of their ends,

        total = s(cond) - s(corrupted),    indirect effect = s(restored) - s(corrupted).

    A tap through which all passes has the total effect, one that the condition does not reach has
    none; effects of places side by side need not add up, as a network is not linear. Where they are
    large is where to edit, e.g. by `edited_kernel`.

    Args:
        key: typed key.
        denoiser: a network's denoiser, or a map of it that evaluates it once.
        shape: of an example.
        score: `(B, *event) -> (B,)`, such as a classifier's probability of the class.
        taps: names, see `taps.tap_names`.
        cond: leading axis B.
        corrupted: likewise, such as that which means none.
        times: number of steps, or a decreasing grid `(n + 1,)`, as of `sample`.
        solver: that evaluates once a step, and draws from a Gaussian kernel or not at all.

    Returns:
        `{"total": scalar, "indirect": {tap: scalar}, "x": {name: (B, *event)}}`, the ends of all
        runs under "clean", "corrupted" and the names of the taps.

    Raises:
        TypeError: for guidance, or a solver of several evaluations a step.
        ValueError: for conditions of unequal numbers, taps that the network does not have, or a
            score that is not one for each example.

    Reference: Basu, Zhao, Morariu, Feizi, Manjunatha, "Localizing and Editing Knowledge in
    Text-to-Image Generative Models", 2023, arXiv 2310.13730, section 3. There the condition is
    corrupted by noise in its embedding.
    """
    check_key(key)
    check_callable("score", score, "lambda x: classifier(x)[:, 3]")
    if not isinstance(solver, GaussianSolver):
        raise TypeError(
            "`solver` must evaluate once a step, as DDIM() and Ancestral() do, got "
            f"{type(solver).__name__}: another evaluation's activations are not those kept."
        )
    if not isinstance(denoiser.evaluations, int) or denoiser.evaluations != 1:
        raise TypeError(
            "`denoiser` must evaluate its network once, got one with "
            f"{denoiser.evaluations}, to all of which an activation would go. Leave guidance out."
        )
    if not jax.tree.leaves(cond):
        raise ValueError("`cond` must be conditions of a batch, got none.")
    count = len(jax.tree.leaves(cond)[0])
    check_count("len(cond)", count)
    check_cond(corrupted, count)
    reader, process = reading(denoiser, tuple(taps)), denoiser.process
    times = resolve_grid(denoiser, times, solver, count)
    noise_key, step_key = jax.random.split(key)

    def begin(i):
        return process.prior(jax.random.fold_in(noise_key, i), shape, times[0], times.dtype)

    def step(states, row):
        n, pair = row

        def one(i, states, cond, corrupted):
            own = jax.random.fold_in(jax.random.fold_in(step_key, n), i)

            def move(model, name, cond):
                told = jax.tree.map(lambda leaf: leaf[None], cond)
                return denoise(
                    own, model, states[name][None], cond=told, solver=solver, times=pair
                ).x[0]

            kept = reader.estimate(states["clean"], pair[0], cond).taps
            return {
                "clean": move(denoiser, "clean", cond),
                "corrupted": move(denoiser, "corrupted", corrupted),
                **{
                    name: move(
                        edit_taps(denoiser, {name: jax.tree_util.Partial(_put, kept[name])}),
                        name, corrupted,
                    )
                    for name in taps
                },
            }  # fmt: skip

        return jax.vmap(one)(jnp.arange(count), states, cond, corrupted), None

    start = jax.vmap(begin)(jnp.arange(count))
    states = dict.fromkeys(("clean", "corrupted", *taps), start)
    pairs = jnp.stack([times[:-1], times[1:]], 1)
    ends, _ = jax.lax.scan(step, states, (jnp.arange(len(pairs)), pairs))
    scores = {name: score(x) for name, x in ends.items()}
    if shapes := {jnp.shape(value) for value in scores.values()} - {(count,)}:
        raise ValueError(
            f"`score` must return a number for each example, ({count},), got shape {shapes.pop()}."
        )
    means = {name: jnp.mean(value) for name, value in scores.items()}
    return {
        "total": means["clean"] - means["corrupted"],
        "indirect": {name: means[name] - means["corrupted"] for name in taps},
        "x": ends,
    }
