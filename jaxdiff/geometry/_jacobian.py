"""The Jacobian of any function as a linear map on blocks of columns, without its matrix."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, PyTree


class Jacobian:
    """J = df/dx at one point: products with blocks of columns, in float32 or better.

    f runs once: its linearisation and the transpose of that share one forward pass, however many
    products follow. Columns are flat; x and f(x) may be pytrees, which `to_input` and `to_output`
    rebuild. Lives inside one trace, and is no pytree itself.

    Args:
        f: from a pytree of floats to a pytree of floats.
        x: where, a pytree.
        mask: pytree like x, broadcastable to it, of factors on the input's entries: J diag(mask)
            is analysed. Zeros leave entries out. None for ones.
        weight: pytree like f(x), broadcastable to it, of factors on the output's entries: the
            root of a diagonal metric there. None for ones.
        deflate: pytree like x with a leading axis of q orthonormal directions that are left out:
            J (I - D D^T) is analysed. None for none.
        chunk: columns computed at a time, to bound memory; None for all at once.
        sharding: how the axis of columns is split over a mesh, e.g.
            `parallel.batch_sharding(mesh)`; None for not at all.

    Raises:
        TypeError: if x or f(x) hold anything but floats, or f has no forward derivative.
        ValueError: if `mask`, `weight` or `deflate` do not fit, or `chunk` < 1.
    """

    def __init__(
        self,
        f: Callable[[PyTree], PyTree],
        x: PyTree,
        *,
        mask: PyTree = None,
        weight: PyTree = None,
        deflate: PyTree = None,
        chunk: int | None = None,
        sharding: NamedSharding | None = None,
    ):
        if chunk is not None and chunk < 1:
            raise ValueError(f"`chunk` must be at least 1, or None for all, got {chunk}.")
        x = jax.tree.map(jnp.asarray, x)
        _check_floats(x, "`x`")
        # Products in reduced precision are no longer adjoint, and the bases not orthogonal.
        with jax.default_matmul_precision("highest"):
            self.value, self._forward = _linearize(f, x)
            _check_floats(self.value, "`f(x)`")
            self._backward = jax.linear_transpose(self._forward, x)
        self.in_size, self.out_size = _size(x), _size(self.value)
        self.dtype = jnp.promote_types(jnp.float32, jnp.result_type(*jax.tree.leaves(x)))
        self._x, self._chunk, self._sharding = x, chunk, sharding
        self._mask = self._factors(mask, x, "mask")
        self._weight = self._factors(weight, self.value, "weight")
        self._deflated = None if deflate is None else self.to_columns(deflate, "deflate")

    def to_input(self, column: Array) -> PyTree:
        """A column `(in_size,)` as a pytree like x."""
        return _unravel(self._x, column)

    def to_output(self, column: Array) -> PyTree:
        """A column `(out_size,)` as a pytree like f(x)."""
        return _unravel(self.value, column)

    def to_columns(self, directions: PyTree, argument: str) -> Array:
        """Directions in the input, a pytree like x with a leading axis, as columns.

        Raises:
            ValueError: if they are not that.
        """
        shapes = jax.tree.map(lambda leaf: ("count", *leaf.shape), self._x)
        structures: list[Any] = [jax.tree.structure(tree) for tree in (directions, self._x)]
        fits = structures[0] == structures[1]
        leaves = jax.tree.leaves(directions)
        for leaf, like in zip(leaves, jax.tree.leaves(self._x), strict=False):
            fits &= jnp.ndim(leaf) > 0 and leaf.shape == (leaves[0].shape[0], *like.shape)
        if not fits:
            raise ValueError(
                f"`{argument}` must be a pytree like `x` with a leading axis of directions, of "
                f"shapes {shapes}, got {jax.tree.map(jnp.shape, directions)}."
            )
        return jax.vmap(self._ravel, out_axes=1)(directions)

    def forward(self, columns: Array) -> Array:
        """J V, `(in_size, b)` to `(out_size, b)`: b Jacobian-vector products."""

        def product(column):
            return self._ravel(self._forward(self.to_input(self._mask * column)))

        return self._weight[:, None] * self._map(product, self._kept(columns))

    def backward(self, columns: Array) -> Array:
        """J^T U, `(out_size, b)` to `(in_size, b)`: b vector-Jacobian products."""

        def product(column):
            return self._ravel(self._backward(self.to_output(self._weight * column))[0])

        return self.seen(self._map(product, columns))

    def seen(self, columns: Array) -> Array:
        """What is left of directions in the input after mask and deflation."""
        return self._kept(self._mask[:, None] * columns)

    def _kept(self, columns: Array) -> Array:
        if self._deflated is None:
            return columns
        return columns - self._deflated @ (self._deflated.T @ columns)

    @jax.default_matmul_precision("highest")
    def _map(self, product: Callable[[Array], Array], columns: Array) -> Array:
        rows, count = columns.T, columns.shape[1]
        chunk, shards = self._chunk or count, 1
        if self._sharding is not None:
            shards = self._sharding.num_devices
            chunk = -(-chunk // shards) * shards
        # Zero columns fill the last chunk, so that one program serves all of them.
        rows = jnp.pad(rows, ((0, -count % min(chunk, -(-count // shards) * shards)), (0, 0)))

        def block(rows):
            return self._split(jax.vmap(product)(self._split(rows)))

        if rows.shape[0] <= chunk:
            out = block(rows)
        else:
            out = jax.lax.map(block, rows.reshape(-1, chunk, rows.shape[1]))
            out = out.reshape(rows.shape[0], -1)
        return out[:count].T

    def _split(self, rows: Array) -> Array:
        if self._sharding is None:
            return rows
        return jax.lax.with_sharding_constraint(rows, self._sharding)

    def _ravel(self, tree: PyTree) -> Array:
        return jnp.concatenate([leaf.astype(self.dtype).ravel() for leaf in jax.tree.leaves(tree)])

    def _factors(self, factors: PyTree, like: PyTree, argument: str) -> Array:
        if factors is None:
            return jnp.ones(1, self.dtype)
        try:
            full = jax.tree.map(lambda w, leaf: jnp.broadcast_to(w, leaf.shape), factors, like)
        except ValueError as error:
            shapes = jax.tree.map(jnp.shape, like)
            raise ValueError(
                f"`{argument}` must be a pytree like what it scales, of shapes {shapes}, and "
                f"broadcast to them, got {jax.tree.map(jnp.shape, factors)}: {error}"
            ) from None
        return self._ravel(full)


def _linearize(f: Callable, x: PyTree) -> tuple[PyTree, Callable]:
    try:
        value, forward = jax.linearize(f, x)
        # A missing derivative shows up only where the linear map is used.
        jax.eval_shape(jax.vmap(forward), jax.tree.map(lambda leaf: leaf[None], x))
    except TypeError as error:
        if "jvp" not in str(error):
            raise
        raise TypeError(
            "`f` must have forward derivatives (jvp), got a function that defines a reverse "
            "derivative alone, such as a fused attention kernel. Build the network with plain "
            f"attention for the analysis. JAX says: {error}"
        ) from error
    return value, forward


def _size(tree: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _unravel(like: PyTree, column: Array) -> PyTree:
    leaves, structure = jax.tree.flatten(like)
    ends = [0]
    for leaf in leaves:
        ends.append(ends[-1] + math.prod(leaf.shape))
    parts = [
        column[start:end].reshape(leaf.shape).astype(leaf.dtype)
        for leaf, start, end in zip(leaves, ends[:-1], ends[1:], strict=True)
    ]
    return jax.tree.unflatten(structure, parts)


def _check_floats(tree: PyTree, what: str) -> None:
    for leaf in jax.tree.leaves(tree):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"{what} must hold floats to be differentiated, got dtype {leaf.dtype}. Close over "
                "integers such as labels, or make them an attribute of a module."
            )
    if not jax.tree.leaves(tree):
        raise TypeError(f"{what} must hold at least one array, got none.")
