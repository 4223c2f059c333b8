"""Gram matrices by rows, never whole where they need not be.

Every sum over pairs is a mean of means by rows, of kernel values less a constant, which changes no
MMD: what cancels then is of the size of the spread of the values, and not of the values.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from jaxdiff._checks import check_count
from jaxdiff._tree import batched, is_known
from jaxdiff.metrics._kernels import Kernel

# Rows that tell by which constant kernel values are moved; any constant is right.
SHIFT_ROWS = 256


class Rows(NamedTuple):
    """Of a Gram matrix, by row: the mean, and the mean square."""

    mean: Array
    square: Array


def rows_of(
    kernel: Kernel,
    x: Array,
    y: Array,
    shift: Array,
    block_size: int | None,
    same: bool = False,
    own: bool = False,
) -> Rows:
    """Means over the columns of k(x_i, y_j) - shift.

    Without j = i where that is the `same` one; where y_i is x_i, its `own`, with k(x_i, x_i) to
    the last digit, which a distance of 0 would not be among others.
    """
    count = len(y) - same

    def row(i, u):
        values = kernel(u[None], y)[0] - shift
        if own:
            itself = kernel(u[None], u[None])[0, 0] - shift
            values = jnp.where(jnp.arange(len(y)) == i, itself, values)
        if same:
            values = jnp.where(jnp.arange(len(y)) == i, 0, values)
        return jnp.sum(values) / count, jnp.sum(values**2) / count

    if block_size is not None:
        check_count("block_size", block_size)
        row = jax.checkpoint(row)  # type: ignore[assignment]
    return Rows(*batched(row, block_size)(jnp.arange(len(x)), x))


def shift_of(kernel: Kernel, x: Array, y: Array) -> Array:
    return jax.lax.stop_gradient(jnp.mean(kernel(x[:SHIFT_ROWS], y[:SHIFT_ROWS])))


def one_hot(argument: str, labels: ArrayLike, x: Array, num_classes: int) -> Array:
    labels = jnp.asarray(labels)
    if labels.shape != x.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"`{argument}` must be integers of shape {x.shape[:1]}, one for each sample, got "
            f"{labels.dtype} of shape {labels.shape}."
        )
    if is_known(labels):
        # In NumPy, because JAX would trace even a constant inside jit.
        low, high = np.min(np.asarray(labels)), np.max(np.asarray(labels))
        if low < 0 or high >= num_classes:
            raise ValueError(f"`{argument}` must lie in [0, {num_classes}), got {low} to {high}.")
    return jax.nn.one_hot(labels, num_classes, dtype=x.dtype)
