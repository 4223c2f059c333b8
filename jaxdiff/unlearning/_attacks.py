"""Attacks: the condition that makes a model say what it was to forget."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_callable, check_count, check_key, check_number
from jaxdiff.denoiser import Denoiser
from jaxdiff.losses._batch import check_batch, time_dtype, wide


def onto_simplex(v: Array) -> Array:
    """The nearest point, in the Euclidean sense, with entries >= 0 that sum to 1, by last axes.

    Args:
        v: `(..., n)`.

    Returns:
        `(..., n)`: max(v - tau, 0), with the tau of each row that makes the sum 1.

    Reference: Duchi, Shalev-Shwartz, Singer, Chandra, "Efficient Projections onto the l1-Ball for
    Learning in High Dimensions", 2008, figure 1.
    """
    dtype, v = v.dtype, wide(v)
    v = v - v.max(axis=-1, keepdims=True)  # the same point, and no sum of large numbers
    ordered = jnp.flip(jnp.sort(v, axis=-1), axis=-1)
    count = jnp.arange(1, v.shape[-1] + 1)
    excess = (jnp.cumsum(ordered, axis=-1) - 1) / count
    kept = jnp.sum(ordered > excess, axis=-1, keepdims=True)
    tau = jnp.take_along_axis(excess, kept - 1, axis=-1)
    return jnp.maximum(v - tau, 0).astype(dtype)


def attack(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    batch: dict[str, Any],
    start: Array,
    into: Callable[[Array, PyTree], PyTree],
    *,
    steps: int = 40,
    rate: float = 1e-2,
    decay: float = 0.1,
    levels: int = 50,
    project: Callable[[Array], Array] | None = None,
) -> tuple[Array, Array]:
    """Search for a condition under which a model denoises some examples best.

        min_v E_{t, eps} |eps - eps_theta(x_t, t, into(v, cond))|^2,

    the model being its own classifier: no other is needed, and the examples tell what is wanted.
    AdamW; times are those of a uniform grid, of each example and step another.

    Args:
        key: typed key; step n draws from its fold_in with n, example i from that one's with i.
        denoiser: what is attacked.
        batch: examples of what was to be forgotten, `{"x": (B, *event), "cond": leading axis B}`.
        start: v, floats of any shape.
        into: `(v, cond) -> cond`, the condition of an example with v in it.
        steps: updates.
        rate: of AdamW.
        decay: its weight decay.
        levels: how many times.
        project: v to the nearest that is allowed, after each update, such as `onto_simplex`.

    Returns:
        v, and the loss of every step before its update, `(steps,)`.

    Raises:
        TypeError: for an `into` that is no function.
        ValueError: for a batch without examples, integers to start from, or counts below 1.

    Reference: Zhang, Jia, Chen, Chen, Zhang, Liu, Ding, Liu, "To Generate or Not? Safety-Driven
    Unlearned Diffusion Models Are Still Easy To Generate Unsafe Images ... For Now", 2023, arXiv
    2310.11868; with a vector for v, without decay, the concept inversion of Pham, Marshall, Cohen,
    Mittal, Hegde, "Circumventing Concept Erasure Methods For Text-to-Image Generative Models",
    2023, arXiv 2308.01508.
    """
    check_key(key)
    check_batch(batch)
    check_callable("into", into, 'lambda v, cond: {"tokens": v}')
    for name, value in (("steps", steps), ("levels", levels)):
        check_count(name, value)
    check_number("rate", rate, above=0.0)
    check_number("decay", decay, least=0.0)
    start = jnp.asarray(start)
    if not jnp.issubdtype(start.dtype, jnp.floating):
        raise ValueError(
            f"`start` must be numbers that can be moved, floats, got {start.dtype}. Pass the "
            "vectors of words, network.words(tokens)."
        )
    process, optimizer = denoiser.process, optax.adamw(rate, weight_decay=decay)
    grid = process.t_max + (process.t_min - process.t_max) * jnp.arange(levels) / levels

    def error(v, key):
        def one(i, x0, cond):
            time_key, noise_key = jax.random.split(jax.random.fold_in(key, i))
            t = grid[jax.random.randint(time_key, (), 0, levels)].astype(time_dtype(x0))
            eps = jax.random.normal(noise_key, x0.shape, x0.dtype)
            x = process.marginal(x0, eps, t).astype(x0.dtype)
            found = denoiser.estimate(x, t, into(v, cond)).noise(process, x, t)
            return jnp.mean(wide(found - eps) ** 2)

        x = jnp.asarray(batch["x"])
        return jnp.mean(jax.vmap(one)(jnp.arange(len(x)), x, batch.get("cond")))

    def step(carry, n):
        v, state = carry
        value, slope = jax.value_and_grad(error)(v, jax.random.fold_in(key, n))
        change, state = optimizer.update(slope, state, v)
        v = optax.apply_updates(v, change)
        return (v if project is None else project(v), state), value

    (v, _), values = jax.lax.scan(step, (start, optimizer.init(start)), jnp.arange(steps))
    return v, values


def attack_words(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    batch: dict[str, Any],
    table: Array,
    *,
    count: int = 5,
    entry: str = "tokens",
    **options: Any,
) -> tuple[Array, Array]:
    """Words to be put before captions, under which a model denoises some examples best.

    `attack` of rows on the simplex, whose mixtures of words are read, and their largest entries.

    Args:
        key: typed key; as of `attack`, and one of the start.
        denoiser: what is attacked.
        batch: as of `attack`, with the vectors of captions in the entry, `(B, n, size)`.
        table: the vectors of all words, `(words, size)`.
        count: how many words are put before each caption.
        entry: of the condition.
        **options: of `attack`.

    Returns:
        The words, integers `(count,)`, and the losses of the relaxed search.

    Reference: as of `attack`.
    """
    check_count("count", count)
    own, search = jax.random.split(key)
    start = onto_simplex(jax.random.uniform(own, (count, len(table)), jnp.result_type(table)))

    def into(v, cond):
        return {**cond, entry: jnp.concatenate([v @ table, cond[entry]])}

    v, values = attack(search, denoiser, batch, start, into, project=onto_simplex, **options)
    return jnp.argmax(v, axis=-1), values
