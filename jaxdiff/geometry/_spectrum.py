"""Leading singular triplets of a Jacobian from few products with it."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_key
from jaxdiff._tree import jit
from jaxdiff.geometry._jacobian import Jacobian
from jaxdiff.geometry._linalg import after
from jaxdiff.geometry._ritz import GolubKahanLanczos, SpectralMethod


class Spectrum(eqx.Module):
    """Leading singular triplets of a Jacobian J = df/dx.

    Signs are such that the largest entry of each right vector is positive.

    Attributes:
        values: singular values sigma, decreasing, `(r,)`.
        right: orthonormal v in the input, a pytree like x with a leading axis of r.
        left: orthonormal u in the output, a pytree like f(x) with a leading axis of r;
            J v = sigma u.
        residuals: ||J^T u - sigma v||, `(r,)`: a singular value of J lies within each.
        products: Jacobian products spent, in either direction.
        iterations: iterations spent.
        converged: whether the method met its tolerance.
    """

    values: Array
    right: PyTree
    left: PyTree
    residuals: Array
    products: Array
    iterations: Array
    converged: Array


def _completed(vectors: Array) -> Array:
    """Orthonormal vectors, some of them zero, with others in their place."""
    full, triangle = jnp.linalg.qr(vectors)
    return full * jnp.where(jnp.diagonal(triangle) < 0, -1, 1).astype(full.dtype)


@jit
def _jacobian_svd(key, f, x, *, start, mask, weight, deflate, method, rank, chunk, sharding):
    jacobian = Jacobian(
        f, x, mask=mask, weight=weight, deflate=deflate, chunk=chunk, sharding=sharding
    )
    left_out = 0 if deflate is None else jax.tree.leaves(deflate)[0].shape[0]
    limit = min(jacobian.in_size - left_out, jacobian.out_size)
    if not 1 <= rank <= limit:
        raise ValueError(
            f"`rank` must lie between 1 and the largest rank of the Jacobian, {limit} for "
            f"{jacobian.in_size} inputs ({left_out} of them deflated) and {jacobian.out_size} "
            f"outputs, got {rank}."
        )
    block = method.block_size(rank, limit)
    columns = jnp.zeros((jacobian.in_size, 0), jacobian.dtype)
    if start is not None:
        columns = jacobian.seen(jacobian.to_columns(start, "start")[:, :block])
    missing = block - columns.shape[1]
    if missing:
        # Drawn in the output, so that nothing of the start lies in the null space.
        drawn = jax.random.normal(key, (jacobian.out_size, missing), jacobian.dtype)
        columns = jnp.concatenate([columns, jacobian.backward(drawn)], axis=1)
    found = method.solve(jacobian, jnp.linalg.qr(columns)[0], rank)

    right = _completed(found.right)
    left = _completed(after(found.left, right))
    signs = jnp.where(right[jnp.argmax(jnp.abs(right), axis=0), jnp.arange(rank)] < 0, -1, 1)
    signs = signs.astype(right.dtype)
    return Spectrum(
        found.values,
        jax.vmap(jacobian.to_input, in_axes=1)(signs * right),
        jax.vmap(jacobian.to_output, in_axes=1)(signs * left),
        found.residuals,
        found.products + missing,
        found.iterations,
        found.converged,
    )


def jacobian_svd(
    key: PRNGKeyArray,
    f: Callable[[PyTree], PyTree],
    x: PyTree,
    rank: int,
    *,
    method: SpectralMethod = GolubKahanLanczos(),
    start: PyTree = None,
    mask: PyTree = None,
    weight: PyTree = None,
    deflate: PyTree = None,
    chunk: int | None = None,
    sharding: NamedSharding | None = None,
) -> Spectrum:
    """Leading singular values and vectors of J = df/dx at x, by products with J and J^T alone.

    f is run once. Compiled once for each structure: another x, or other arrays in an f that is a
    pytree (such as `TapFeature`), reuse the program. `jax.vmap` over x analyses points at once;
    `jax.lax.map` one after another, each only until it has converged.

    Args:
        key: typed PRNG key, for the starting block.
        f: from a pytree of floats to a pytree of floats; a plain function is compiled anew for
            each function object, an `equinox.Module` for each structure.
        x: where, a pytree.
        rank: r, how many triplets.
        method: `GolubKahanLanczos()` or `SubspaceIteration()`.
        start: a guess of the right subspace, a pytree like x with a leading axis, e.g. `right` of
            a point nearby. Directions beyond the method's block are not used, and random ones
            fill it up.
        mask: factors on the input's entries, as in `Jacobian`: a region of an image, for one.
        weight: factors on the output's entries, as in `Jacobian`.
        deflate: orthonormal directions to leave out, as in `Jacobian`.
        chunk: products computed at a time, to bound memory; None for a whole block.
        sharding: how products are split over a mesh, e.g. `parallel.batch_sharding(mesh)`.

    Returns:
        A `Spectrum`.

    Raises:
        TypeError: if x or f(x) hold anything but floats, f has no forward derivative, or the key
            is not a typed one.
        ValueError: if `rank` exceeds what the Jacobian can have, or a pytree does not fit.

    Examples:
        >>> scale = jnp.arange(1, 9.0)
        >>> found = geometry.jacobian_svd(jax.random.key(0), lambda x: scale * x, jnp.ones(8), 2)
        >>> [round(float(value), 3) for value in found.values]
        [8.0, 7.0]
    """
    check_key(key)
    return _jacobian_svd(
        key, f, x, start=start, mask=mask, weight=weight, deflate=deflate, method=method,
        rank=rank, chunk=chunk, sharding=sharding,
    )  # fmt: skip
