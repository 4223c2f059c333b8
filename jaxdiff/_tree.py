"""Small shared pieces: numbers as pytree leaves, and the checks every entry point makes."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree


def _as_float(value: Any) -> Any:
    return float(value) if isinstance(value, int) else value


def number(default: float) -> Any:
    """A dataclass field for a number that may be swept: a Python float, or an array leaf.

    Python floats stay weakly typed, so they never promote the dtype of what they multiply.
    """
    return eqx.field(default=default, converter=_as_float)


def traced_floats(tree: PyTree) -> PyTree:
    """Turn Python-float leaves into weakly typed arrays, so that jit traces them."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, float) else leaf, tree)


def jit(fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """`jax.jit` for arguments that hold more than arrays.

    Arrays and Python floats are traced, so changing a number never recompiles; every other leaf
    (functions, dtypes, flags) is static and must be hashable. Unlike `equinox.filter_jit`, does
    not wait for the result.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def compiled(static, arrays):
        structure, rest = static
        arrays = iter(arrays)
        leaves = [next(arrays) if leaf is None else leaf for leaf in rest]
        return fn(*jax.tree.unflatten(structure, leaves))

    @functools.wraps(fn)
    def call(*args):
        leaves, structure = jax.tree.flatten(traced_floats(args))
        is_array = [isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves]
        arrays = [leaf for leaf, traced in zip(leaves, is_array, strict=True) if traced]
        rest = tuple(
            None if traced else leaf for leaf, traced in zip(leaves, is_array, strict=True)
        )
        return compiled((structure, rest), arrays)

    return call


def derivative(fn: Callable[[Array], Array], t: Array) -> Array:
    """The derivative of an elementwise `fn` at t."""
    t = 1.0 * jnp.asarray(t)  # an integer time has no derivative
    return jax.jvp(fn, (t,), (jnp.ones_like(t),))[1]


def root(x: Array) -> Array:
    """sqrt(max(x, 0)), whose derivative where x <= 0 is 0 and not infinite or NaN.

    For variances that are exactly zero, and remain so when their parameters move, at ends of
    grids and where noise is off.
    """
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def check_key(key: PRNGKeyArray, argument: str = "key") -> None:
    """Reject anything but one typed PRNG key.

    Raises:
        TypeError: for legacy uint32 keys, batches of keys, and anything else.
    """
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed:
        got = f"{type(key).__name__} of dtype {key.dtype}" if hasattr(key, "dtype") else repr(key)
        raise TypeError(
            f"`{argument}` must be a typed PRNG key, got {got}. "
            "Make one with jax.random.key(seed), or wrap a legacy key with "
            "jax.random.wrap_key_data."
        )
    if key.shape != ():
        raise TypeError(
            f"`{argument}` must be a single PRNG key, got a batch of shape {key.shape}. "
            "Pass one key; example i draws from fold_in(key, i)."
        )


def check_cond(cond: PyTree, num_samples: int) -> None:
    """Reject conditions that are not one per example.

    Raises:
        ValueError: if a leaf lacks the leading axis.
    """
    for leaf in jax.tree.leaves(cond):
        if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != num_samples:
            raise ValueError(
                f"`cond` must have a leading axis of one entry per example, {num_samples}, got a "
                f"leaf of shape {jnp.shape(leaf)}. Repeat a shared condition with "
                "jnp.broadcast_to."
            )


def check_finite(x: Array) -> None:
    """Reject states that hold NaN or infinity, where that can be known.

    Raises:
        ValueError: if `x` is not finite.
    """
    if isinstance(x, jax.core.Tracer):
        return
    # In numpy, because jax would trace even a constant inside jit.
    bad = int(np.sum(~np.isfinite(np.asarray(x, float))))
    if bad:
        raise ValueError(
            f"`x` must be finite, got {bad} of {x.size} entries that are NaN or infinite. Drop "
            "those examples, or check what made them."
        )


def batched(fn: Callable[..., PyTree], batch_size: int | None) -> Callable[..., PyTree]:
    """Map over the leading axis: all at once, or in chunks of `batch_size` one after another.

    The last row fills the last chunk, so that one program serves all of them. `jax.lax.map` has
    another for what is left over, which may run at the same time.
    """
    if batch_size is None:
        return jax.vmap(fn)

    def mapped(*args):
        count = len(jax.tree.leaves(args)[0])
        if batch_size >= count:
            return jax.vmap(fn)(*args)
        chunks = -(-count // batch_size)
        rows = np.minimum(np.arange(chunks * batch_size), count - 1).reshape(chunks, -1)
        args = jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], args)
        out = jax.lax.map(lambda chunk: jax.vmap(fn)(*chunk), args)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count], out)

    return mapped
