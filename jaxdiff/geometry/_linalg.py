"""Small pieces of linear algebra that several methods share."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def flat_basis(basis: Array) -> Array:
    """`(r, *shape)` as `(r, m)`, in float32 or better."""
    dtype = jnp.promote_types(jnp.float32, basis.dtype)
    return basis.reshape(len(basis), -1).astype(dtype)


def check_bases(bases: Array) -> None:
    """Reject anything but `(N, r, *shape)`.

    Raises:
        ValueError: for fewer than three axes.
    """
    if bases.ndim < 3:
        raise ValueError(
            f"`bases` must have shape (N, r, *shape), N bases of r vectors, got {bases.shape}. "
            "Stack them along a new leading axis."
        )


def canonical_signs(basis: Array) -> Array:
    """Canonical signs of the rows: the entry of largest absolute value is positive."""
    largest = jnp.take_along_axis(basis, jnp.argmax(jnp.abs(basis), 1)[:, None], 1)
    return jnp.where(largest < 0, -basis, basis)


def after(value: Array, other: Array) -> Array:
    """The same value, as an array that is not there before `other` is.

    Under `vmap`, two decompositions that do not depend on each other may run at once. On CPUs,
    jaxlib 0.10 splits each over the threads that wait for it, and where all threads wait, they do
    so for ever. A decomposition of `after(value, other)` waits for the one that made `other`.
    """
    # XLA drops an optimisation barrier, and keeps a product with zero, as it may be NaN.
    return value + 0 * jax.lax.stop_gradient(other).ravel()[0].astype(value.dtype)


def polished(rows: Array) -> Array:
    """One Newton step to the nearest orthonormal rows, which squares a small error."""
    return 1.5 * rows - 0.5 * (rows @ rows.T) @ rows


def nearest_orthonormal(rows: Array) -> Array:
    """The nearest matrix with orthonormal rows: the polar factor."""
    left, _, right = jnp.linalg.svd(rows, full_matrices=False)
    return left @ right


def cosine_and_sinc(gram: Array) -> tuple[Array, Array]:
    """cos(S) and sin(S) / S of the root S of a positive semi-definite matrix."""
    values, vectors = jnp.linalg.eigh(gram)
    root = jnp.sqrt(jnp.maximum(values, 0))
    return (vectors * jnp.cos(root)) @ vectors.T, (vectors * jnp.sinc(root / jnp.pi)) @ vectors.T


@jax.default_matmul_precision("highest")
def right_svd(rows: Array) -> tuple[Array, Array]:
    """Singular values and right singular vectors of a matrix, in float32 or better.

    Args:
        rows: `(n, d)`.

    Returns:
        Values, decreasing, `(min(n, d),)`, and orthonormal vectors `(min(n, d), d)`, one per row,
        whose largest entries are positive.
    """
    rows = rows.astype(jnp.promote_types(jnp.float32, rows.dtype))
    # The triangle has the same right vectors, and is small where there are many rows.
    triangle = jnp.linalg.qr(rows, mode="r")
    _, values, right = jnp.linalg.svd(triangle, full_matrices=False)
    return values, canonical_signs(right)
