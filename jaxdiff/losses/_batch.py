"""What the losses of a batch share: keys, levels and conditions of its examples."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxdiff._checks import check_cond
from jaxdiff.conditions import null_where


def stratified_uniform(key: PRNGKeyArray, count: int) -> Float[Array, "{count}"]:
    """`count` numbers, each uniform on [0, 1), one in each of `count` equal strata.

    u_i = (pi(i) + v_i) / count, v_i uniform and pi a random permutation: lower variance than
    independent draws for any loss that is smooth in time.

    Args:
        key: typed PRNG key.
        count: how many.

    Returns:
        `(count,)`.

    Reference: stratified sampling; compare the shared shift of Kingma et al., "Variational
    Diffusion Models", 2021, arXiv 2107.00630, appendix I.1.
    """
    order_key, jitter_key = jax.random.split(key)
    strata = jax.random.permutation(order_key, count)
    u = (strata + jax.random.uniform(jitter_key, (count,))) / count
    # The last stratum may round up to 1, where quantiles are infinite.
    return jnp.minimum(u, 1 - jnp.finfo(u.dtype).epsneg)


def each_example(
    loss: Callable[[PRNGKeyArray, Array, Array, PyTree], PyTree],
    key: PRNGKeyArray,
    batch: dict,
    levels: Array | None = None,
) -> PyTree:
    """`loss(key, u, x0, cond)` of every example of a training batch.

    Args:
        loss: of one example: its key, a level u in [0, 1) for its time, the clean example and its
            condition.
        key: typed key; example i draws from its fold_in with i. Two losses that are given the same
            key, such as `frozen.key`, see the same times and noise.
        batch: `{"x": (B, *event), "cond": pytree with leading axis B}`; "cond" may be absent.
        levels: the levels `(B,)`; None for `stratified_uniform`.

    Returns:
        What the loss returns, with a leading axis B.
    """
    check_batch(batch)
    x0, cond = batch["x"], batch.get("cond")
    count = x0.shape[0]
    time_key, example_key = jax.random.split(key)
    keys = jax.vmap(lambda i: jax.random.fold_in(example_key, i))(jnp.arange(count))
    levels = stratified_uniform(time_key, count) if levels is None else levels
    return jax.vmap(loss)(keys, levels, x0, cond)


def check_batch(batch: Any) -> None:
    """Reject what is no training batch.

    Raises:
        TypeError: for anything but a dict, or examples that are no floats.
        ValueError: for conditions of another length.
    """
    if not isinstance(batch, Mapping) or "x" not in batch:
        got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise TypeError(f'`batch` must be a dict {{"x": examples, "cond": conditions}}, got {got}.')
    x0 = batch["x"]
    if not jnp.issubdtype(jnp.result_type(x0), jnp.floating) or not jnp.ndim(x0) or not len(x0):
        raise TypeError(
            f"`batch['x']` must be floats of one example at least, got {jnp.result_type(x0)} of "
            f"shape {jnp.shape(x0)}. Scale pixels to [-1, 1]: x / 127.5 - 1."
        )
    check_cond(batch.get("cond"), len(x0))


def drop_cond(key: PRNGKeyArray, cond: PyTree, null_cond: PyTree, rate: Array | float) -> PyTree:
    """The condition of one example, with probability `rate` that of none; `null_cond` None keeps.

    Args:
        key: typed PRNG key.
        cond: of one example, arrays of any shape.
        null_cond: the condition of nothing, of the same form, or None.
        rate: probability in [0, 1], a scalar.

    Returns:
        A condition like `cond`; see `jaxdiff.conditions.null_where`.
    """
    if null_cond is None:
        return cond
    return null_where(jax.random.bernoulli(key, rate), cond, null_cond)


def time_dtype(x: Any) -> Any:
    """That of times of examples: of a bfloat16 one the last time would be beyond the last."""
    return jnp.promote_types(x.dtype, jnp.float32)


def wide(x: Array) -> Array:
    """In float32 at least, to sum squares of low-precision examples."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
