"""Features of many examples: a batch at a time, over devices, and kept on disk."""

import dataclasses
import hashlib
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxdiff import parallel
from jaxdiff._checks import check_callable, check_count
from jaxdiff._tree import jit


def features_of(
    features: Callable[[Array], Array],
    examples: Any,
    *,
    batch_size: int = 500,
    mesh: Mesh | None = None,
    cache: str | Path | None = None,
) -> Float[np.ndarray, "n d"]:
    """Features of an array's or a source's examples, of which a batch is in memory at a time.

    Kept on disk they are found again by all that they depend on: the contents of the examples, the
    weights and the structure of `features`, and the names of its functions. Their code is not
    looked at: after changing that, take another directory.

    Args:
        features: of one example, `(*event)` to `(d,)`; a pytree whose weights are leaves, such as
            `jax.tree_util.Partial(f, weights)`, so that nothing is compiled into the program.
        examples: `(n, *event)`, or a source of `jaxdiff.data`.
        batch_size: examples at a time; on a mesh, over all devices.
        mesh: the devices over which each batch is split; None for one.
        cache: directory of what is kept; None keeps nothing.

    Returns:
        The features, in NumPy.

    Raises:
        TypeError: for examples that are no floats, such as bytes that are still to be scaled; for a
            `cache` with a function that hides what it depends on.
        ValueError: for no examples, or features that are not vectors.
    """
    check_callable("features", features, "jax.tree_util.Partial(f, weights)")
    count = len(examples)
    if count == 0:
        raise ValueError("`examples` must hold one at least, got none.")
    size = min(check_count("batch_size", batch_size), count)
    if mesh is not None:
        parts = mesh.size // mesh.shape["tensor"]
        size = -(-size // parts) * parts

    def batch(start: int) -> np.ndarray:
        # The last one is filled up, so that one program serves all.
        rows = np.minimum(np.arange(start, start + size), count - 1)
        found = examples[rows]
        x = np.asarray(found["x"] if isinstance(found, dict) else found)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"`examples` must be floats, got {x.dtype}. Scale pixels to [-1, 1]: x / 127.5 - 1."
            )
        return x

    starts = range(0, count, size)
    path = None
    if cache is not None:
        digest = hashlib.sha256(_described(features))
        for start in starts:
            part = batch(start)[: count - start]
            if start == 0:  # the same for any batches
                digest.update(f"{part.dtype} {count} {part.shape[1:]}".encode())
            digest.update(np.ascontiguousarray(part).tobytes())
        path = Path(cache) / f"{digest.hexdigest()[:32]}.npy"
        if path.exists():
            return np.load(path, allow_pickle=False)
    parts_found = []
    for start in starts:
        x: Any = batch(start)
        x = x if mesh is None else parallel.place_batch(x, parallel.batch_sharding(mesh))
        found = np.asarray(parallel.fetch(_mapped(features, x)))
        if found.ndim != 2:
            raise ValueError(
                f"`features` must return a vector for an example, got shape {found.shape[1:]}."
            )
        parts_found.append(found[: count - start])
    values = np.concatenate(parts_found)
    if path is not None and parallel.is_first():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.save(file, values)
        temporary.replace(path)
    return values


@jit
def _mapped(features, x):
    return jax.vmap(features)(x)


def _described(features: Any) -> bytes:
    """What tells one function of features from another.

    Raises:
        TypeError: for a function that hides what it depends on.
    """
    # Fields that are no leaves are in the structure, where functions have addresses.
    structure = re.sub(r" at 0x[0-9a-f]+", "", str(jax.tree.structure(features)))
    digest = hashlib.sha256(structure.encode())
    for leaf in [getattr(features, "func", None), *jax.tree.leaves(features), *_fixed(features)]:
        if isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, float, int, str)):
            array = np.asarray(leaf)
            digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        elif leaf is not None:
            # Anything but a plain function of a module may keep weights where nobody sees them.
            name = getattr(leaf, "__qualname__", type(leaf).__qualname__)
            plain = isinstance(leaf, types.FunctionType) and "<lambda>" not in name
            if not plain or leaf.__closure__ or leaf.__defaults__ or leaf.__kwdefaults__:
                raise TypeError(
                    "`features` must show what it depends on to be kept in `cache`, got "
                    f"{name!r}, which is no plain function of a module: a method, a closure, a "
                    "lambda, a transformed function, or one with defaults. Pass "
                    "jax.tree_util.Partial(function of a module, weights)."
                )
            digest.update(f"{leaf.__module__}.{name}".encode())
    return digest.digest()


def _fixed(tree: Any) -> list[Any]:
    """Functions in the fields of Equinox modules that are no leaves."""

    def is_inner(node):
        return isinstance(node, eqx.Module) and node is not tree

    found = []
    if isinstance(tree, eqx.Module):
        fields = [f for f in dataclasses.fields(tree) if f.metadata.get("static")]
        values = jax.tree.leaves([getattr(tree, f.name, None) for f in fields])
        found = [value for value in values if callable(value) and not isinstance(value, type)]
    inner = [node for node in jax.tree.leaves(tree, is_leaf=is_inner) if is_inner(node)]
    return found + [value for node in inner for value in _fixed(node)]
