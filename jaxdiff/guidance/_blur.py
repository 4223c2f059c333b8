"""Gaussian blur of images and of grids of tokens."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdiff._tree import Number


def blur_matrix(size: int, width: Number) -> Array:
    """The `(size, size)` matrix of a blur of standard deviation `width`, in grid points.

    A Gaussian cut off at 3 widths and normalised, with the grid reflected about its end points as
    often as that reaches; the mean of all points for infinity, the identity for 0.
    """
    if size == 1:
        return jnp.ones((1, 1))
    reach = 4 * size
    offsets = np.arange(-reach, reach + 1)
    period = 2 * (size - 1)
    folded = np.abs((np.arange(size)[:, None] + offsets + period) % period)
    folded = np.minimum(folded, period - folded)  # where a reflected point comes from
    finite = jnp.where(jnp.isinf(width), 1.0, width)
    safe = jnp.where(finite > 0, finite, 1.0)
    inside = (np.abs(offsets) <= 3 * finite) | (offsets == 0)
    weights = jnp.where(inside, jnp.exp(-0.5 * (offsets / safe) ** 2), 0)
    weights = jnp.where(finite > 0, weights, offsets == 0)
    spread = jnp.zeros((size, size)).at[np.arange(size)[:, None], folded].add(weights)
    blurred = spread / jnp.sum(spread, 1, keepdims=True)
    return jnp.where(jnp.isinf(width), 1 / size, blurred)


def blur(images: Array, width: Number) -> Array:
    """`(H, W, C)` blurred along both axes."""
    rows, columns = (blur_matrix(size, width).astype(images.dtype) for size in images.shape[:2])
    return jnp.einsum("ij,kl,jlc->ikc", rows, columns, images)
