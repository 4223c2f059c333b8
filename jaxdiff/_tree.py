"""Small shared pieces: numbers as pytree leaves, compiled calls, maps in chunks, derivatives."""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, cast

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike, PyTree


def is_known(value: Any) -> bool:
    """Whether the numbers of an array or scalar are known, and not traced."""
    return not isinstance(value, jax.core.Tracer)


def is_arraylike(leaf: Any) -> bool:
    """Whether a leaf is an array, or the shape of one."""
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def as_number(value: Any) -> Any:
    """A known scalar of any kind as a Python float; arrays and what is traced as they are."""
    if isinstance(value, bool) or not is_known(value):
        return value
    if isinstance(value, (int, float)):
        return float(value)
    scalar = isinstance(value, (np.generic, np.ndarray, jax.Array)) and value.shape == ()
    if scalar and jnp.issubdtype(value.dtype, np.number):
        return float(value)
    return value


# What a field that may be swept holds: a Python float, or an array where it is traced or stacked.
Number: TypeAlias = float | Array


def number(default: float | None) -> Any:
    """A dataclass field for a number that may be swept: a Python float, or an array leaf.

    Python, NumPy and JAX scalars all become Python floats, so that none of them compiles anew.
    Those stay weakly typed: they never promote the dtype of what they multiply. Use it for the
    numbers of your own `equinox.Module`s:

        class Sharpened(jaxdiff.DenoiserMap):
            base: jaxdiff.Denoiser
            amount: jaxdiff.Number = jaxdiff.number(1.0)

    Args:
        default: the field's default; None for a number that may be left out.
    """
    return eqx.field(default=default, converter=as_number, metadata={"number": True})


def traced_floats(tree: PyTree) -> PyTree:
    """Turn Python-float leaves into weakly typed arrays, so that jit traces them."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, float) else leaf, tree)


def as_float_array(value: ArrayLike) -> Array:
    """An array of floats: integers are promoted to JAX's default float, floats kept."""
    value = jnp.asarray(value)
    if jnp.issubdtype(value.dtype, jnp.floating):
        return value
    if jnp.issubdtype(value.dtype, jnp.complexfloating):
        raise TypeError(
            f"Expected real numbers, got {value.dtype}. Stack real and imaginary parts."
        )
    return value.astype(jnp.result_type(float))


F = TypeVar("F", bound=Callable)


@functools.cache  # abstract classes are slow to ask
def _is_traced(kind: type) -> bool:
    """Whether `jit` traces leaves of a type."""
    return issubclass(kind, (jax.Array, np.ndarray, np.generic, float, jax.core.Tracer))


def jit(fn: F) -> F:
    """`jax.jit` for arguments that hold more than arrays, by position or by name.

    Arrays and floats are traced, so changing a number never recompiles; every other leaf
    (functions, dtypes, flags, counts) is static and must be hashable. Unlike
    `equinox.filter_jit`, does not wait for the result.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def compiled(static, arrays):
        structure, rest = static
        arrays = iter(arrays)
        leaves = [next(arrays) if leaf is None else leaf for leaf in rest]
        args, kwargs = jax.tree.unflatten(structure, leaves)
        return fn(*args, **kwargs)

    @functools.wraps(fn)
    def call(*args, **kwargs):
        leaves, structure = jax.tree.flatten((args, kwargs))
        arrays, rest = [], []
        for leaf in leaves:
            if isinstance(leaf, np.integer):  # a count from NumPy is a count
                leaf = int(leaf)
            traced = _is_traced(type(leaf))
            (arrays if traced else rest).append(leaf)
            if traced:
                rest.append(None)
        return compiled((structure, tuple(rest)), arrays)

    return cast(F, call)


def derivative(fn: Callable[[Array], Array], t: Array) -> Array:
    """The derivative of an elementwise `fn` at t, in the shape of t."""
    t = as_float_array(t)  # an integer time has no derivative
    return jax.jvp(fn, (t,), (jnp.ones_like(t),))[1]


def dots(x: Array, y: Array) -> Array:
    """x @ y in full precision, no TF32 or bfloat16: where what matters is a thousandth of it."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def root(x: Array | float) -> Array:
    """sqrt(max(x, 0)), whose derivative where x <= 0 is 0 and not infinite or NaN.

    For variances that are exactly zero, and remain so when their parameters move, at ends of
    grids and where noise is off.
    """
    x = jnp.asarray(x)
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def bounded(x: Array, low: Array, high: Array) -> Array:
    """`clip` whose derivative at the very ends is 1 and not 1/2."""
    return jnp.where(x < low, low, jnp.where(x > high, high, x))


def straight_through_clip(x: Array, low: Number = -1.0, high: Number = 1.0) -> Array:
    """x clipped to [low, high], with the derivative of x itself.

    A clip has none outside its range, where samples of few steps begin.

    Args:
        x: of any shape.
        low: smallest value.
        high: largest value.
    """
    return x + jax.lax.stop_gradient(jnp.clip(x, low, high) - x)


def chunked(
    run: Callable[..., PyTree], batch_size: int | None, sharding: NamedSharding | None = None
) -> Callable[..., PyTree]:
    """`run` of a batch, all at once or in chunks of `batch_size` rows one after another.

    The last row fills the last chunk, so that one program serves all of them. `jax.lax.map` has
    another for what is left over, which may run at the same time. Of rows that are split over
    devices, each chunk takes some of every device's, and results stay where they are computed.
    """
    if batch_size is not None and not batch_size >= 1:
        raise ValueError(
            f"`batch_size` must be at least 1, got {batch_size}. Leave it out for all at once."
        )
    parts = 1 if sharding is None else num_parts(sharding)

    def split(leaf, axis):
        if sharding is None or sharding.spec[:1] in ((), (None,)):
            return leaf
        spec = PartitionSpec(*[None] * axis, sharding.spec[0])
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(sharding.mesh, spec))

    def mapped(*args):
        count = len(jax.tree.leaves(args)[0])
        if batch_size is None or batch_size >= count:
            return run(*args)
        own, size = count // parts, max(1, batch_size // parts)
        chunks = -(-own // size)
        places = np.minimum(np.arange(chunks * size), own - 1).reshape(chunks, 1, size)
        rows = (np.arange(parts)[:, None] * own + places).reshape(chunks, -1)
        args = jax.tree.map(lambda leaf: split(jnp.asarray(leaf)[rows], 1), args)
        out = jax.lax.map(lambda chunk: run(*chunk), args)

        def whole(leaf):
            rest = leaf.shape[2:]
            leaf = jnp.moveaxis(leaf.reshape(chunks, parts, size, *rest), 1, 0)
            leaf = leaf.reshape(parts, chunks * size, *rest)[:, :own]
            return split(leaf.reshape(count, *rest), 0)

        return jax.tree.map(whole, out)

    return mapped


def num_parts(sharding: NamedSharding) -> int:
    """Into how many parts a sharding splits the leading axis."""
    names = sharding.spec[0] if sharding.spec else None
    names = () if names is None else names if isinstance(names, tuple) else (names,)
    return int(np.prod([sharding.mesh.shape[name] for name in names]))


def batched(fn: Callable[..., PyTree], batch_size: int | None) -> Callable[..., PyTree]:
    """Map over the leading axis: all at once, or in chunks of `batch_size`; see `chunked`."""
    return chunked(jax.vmap(fn), batch_size)
