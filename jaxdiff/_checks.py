"""What every entry point checks of its arguments, where their values are known."""

import dataclasses
import inspect
import math
import operator
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._tree import as_number, is_known


def check_key(key: PRNGKeyArray, argument: str = "key") -> None:
    """Reject anything but one typed PRNG key.

    Raises:
        TypeError: for legacy uint32 keys, batches of keys, and anything else.
    """
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed:
        got = f"{key!r:.60}"
        if hasattr(key, "dtype"):
            got = f"{type(key).__name__} of dtype {key.dtype}"
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
    numbers = (int, float, np.number)
    if isinstance(cond, list | tuple) and cond and all(isinstance(c, numbers) for c in cond):
        raise TypeError(f"`cond` must be an array, got {cond!r:.60}. Pass jnp.asarray of it.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(cond):
        if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != num_samples:
            where = jax.tree_util.keystr(path)
            raise ValueError(
                f"`cond{where}` must have a leading axis of one entry per example, {num_samples}, "
                f"got shape {jnp.shape(leaf)}. Repeat a shared condition with jnp.broadcast_to."
            )


def check_network_cond(network: Any, cond: PyTree) -> None:
    """What a network itself checks of its conditions, if it has a `check_cond`."""
    if hasattr(network, "check_cond"):
        network.check_cond(cond)


def check_scalars(*trees: PyTree) -> None:
    """Reject numbers of denoisers, solvers and losses that are arrays, and would be broadcast.

    Raises:
        ValueError: naming the field.
    """

    def visit(node):
        if not isinstance(node, eqx.Module):
            return isinstance(node, nnx.Module)  # whose weights are many, and no such numbers
        fields = dataclasses.fields(node)
        if any(field.metadata.get("stacked") for field in fields):
            return True  # numbers inside have an axis of members
        for field in fields:
            value = getattr(node, field.name, None)
            if field.metadata.get("number") and np.ndim(value):
                raise ValueError(
                    f"`{field.name}` of {type(node).__name__} must be a scalar, got shape "
                    f"{np.shape(value)}. Sweep it by jax.vmap, one scalar at a time."
                )
        return False

    jax.tree.leaves(trees, is_leaf=visit)


def check_finite(x: Array) -> None:
    """Reject states that hold NaN or infinity, where that can be known.

    Raises:
        ValueError: if `x` is not finite.
    """
    if not is_known(x):
        return
    # In numpy, because jax would trace even a constant inside jit.
    bad = int(np.sum(~np.isfinite(np.asarray(x, float))))
    if bad:
        raise ValueError(
            f"`x` must be finite, got {bad} of {x.size} entries that are NaN or infinite. Drop "
            "those examples, or check what made them."
        )


def check_kind(argument: str, value: Any, kind: type, example: str) -> None:
    """Reject anything but an object of `kind`: names and classes in place of objects, say.

    Args:
        argument: what an error calls it.
        value: the object.
        kind: its class.
        example: what an error proposes.

    Raises:
        TypeError: for another object.
    """
    if isinstance(value, kind):
        return
    if isinstance(value, type):
        got, remedy = f"the class {value.__name__}", f"Pass {value.__name__}()."
    else:
        got, remedy = f"{value!r:.60}", f"Pass {example}, say."
    raise TypeError(f"`{argument}` must be a {kind.__name__}, got {got}. {remedy}")


def check_same_process(argument: str, process: Any, expected: Any) -> None:
    """Reject another process than a model's: of another kind, or of other numbers if known.

    Args:
        argument: what an error calls whose process it is.
        process: the process.
        expected: that of the model beside it.

    Raises:
        ValueError: for another one.
    """
    pairs = zip(jax.tree.leaves(process), jax.tree.leaves(expected), strict=False)
    known = [pair for pair in pairs if all(eqx.is_array_like(a) and is_known(a) for a in pair)]
    # Numbers that went through a compiled step were rounded there.
    same = (np.shape(a) == np.shape(b) and np.allclose(a, b, rtol=1e-5, atol=0) for a, b in known)
    kinds: Any = [jax.tree.structure(one) for one in (process, expected)]
    if kinds[0] != kinds[1] or not all(same):
        raise ValueError(
            f"`{argument}` must be of the process of the model beside it, {expected!r:.100}, got "
            f"{process!r:.100}. Give both one process: x_t and t mean another thing there."
        )


def check_callable(argument: str, value: Any, example: str) -> None:
    """Reject what cannot be called, and classes, whose call makes an object.

    Raises:
        TypeError: for either.
    """
    if isinstance(value, type) or not callable(value):
        got = f"the class {value.__name__}" if isinstance(value, type) else f"{value!r:.60}"
        raise TypeError(f"`{argument}` must be a function, got {got}. Pass {example}, say.")


def check_takes_key(argument: str, value: Callable) -> None:
    """Reject a function that does not take a `key` by name.

    Raises:
        TypeError: for one that does not.
    """
    try:
        parameters = inspect.signature(value).parameters
    except (TypeError, ValueError):
        return  # of compiled functions, say
    if "key" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    raise TypeError(
        f"`{argument}` must take (x, label, cond=None, *, key=None), got "
        f"({', '.join(parameters)}). Add a `key`, which may stay unused."
    )


def check_count(argument: str, value: Any, *, least: int = 1, instead: str = "") -> int:
    """A whole number of any kind as a Python int, after checking that it is large enough.

    Args:
        argument: what an error calls it.
        value: the number.
        least: the smallest that is allowed.
        instead: what an error proposes.

    Raises:
        TypeError: for anything but a whole number.
        ValueError: for one that is too small.
    """
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"`{argument}` must be a whole number, got {value!r}. {instead}") from None
    if count < least:
        raise ValueError(f"`{argument}` must be at least {least}, got {count}. {instead}".rstrip())
    return count


def check_batch_size(batch_size: Any) -> int | None:
    """How many examples to compute at a time, as a Python int, or None for all at once.

    Raises:
        TypeError: for anything but a whole number.
        ValueError: for one below 1.
    """
    if batch_size is None:
        return None
    return check_count("batch_size", batch_size, instead="Leave it out for all at once.")


def is_no_number(value: Any) -> bool:
    """Whether a value surely is no real number, nor an array of them, nor left out."""
    if hasattr(value, "dtype"):
        kinds = jnp.integer, jnp.floating
        return not any(jnp.issubdtype(value.dtype, kind) for kind in kinds)
    plain = (str, bool, complex, list, tuple, dict)
    return isinstance(value, plain) or callable(value)


def check_number(
    argument: str,
    value: Any,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
    finite: bool = True,
    instead: str = "",
) -> None:
    """Reject a number of any kind outside its range; what is traced or an array passes.

    Args:
        argument: what an error calls it.
        value: the number.
        above: it must be larger.
        least: it must not be smaller.
        below: it must be smaller.
        most: it must not be larger.
        finite: whether infinity is refused.
        instead: what an error proposes.

    Raises:
        TypeError: for a string, a function or another thing that is no number.
        ValueError: for NaN, or a number out of range.
    """
    value = as_number(value)
    if not isinstance(value, float):
        # Leaves of a module are also placeholders of transformations: only what surely is no
        # number is refused.
        if is_no_number(value):
            raise TypeError(f"`{argument}` must be a number, got {value!r:.60}. {instead}".rstrip())
        return
    outside = value < least or value > most or value <= above > -math.inf
    outside |= value >= below < math.inf
    if math.isnan(value) or finite and math.isinf(value) or outside:
        limits = [
            f"{word} {limit:g}"
            for word, limit in (
                ("above", above),
                ("at least", least),
                ("below", below),
                ("at most", most),
            )
            if math.isfinite(limit)
        ]
        wanted = " and ".join(limits) or "finite"
        raise ValueError(f"`{argument}` must be {wanted}, got {value:g}. {instead}".rstrip())
