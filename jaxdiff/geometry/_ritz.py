"""Methods for leading singular triplets of a matrix known by its products.

A method turns products with blocks of columns into Ritz triplets. All of it is one program of
fixed shapes, with no round trip to the host.
"""

from abc import abstractmethod
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxdiff._checks import check_count, check_number
from jaxdiff._tree import Number, number
from jaxdiff.geometry._jacobian import Jacobian
from jaxdiff.geometry._linalg import after


class Ritz(eqx.Module):
    """What a method found, in flat columns.

    Attributes:
        values: `(r,)`, decreasing.
        right: `(n, r)`.
        left: `(m, r)`, with J right = left diag(values).
        residuals: ||J^T u - sigma v||, `(r,)`.
        change: sine of the largest angle between the last two right subspaces.
        iterations: how many.
        products: Jacobian products spent, either way.
        converged: whether the tolerance was met.
    """

    values: Array
    right: Array
    left: Array
    residuals: Array
    change: Array
    iterations: Array
    products: Array
    converged: Array


class SpectralMethod(eqx.Module):
    """How leading singular triplets are computed."""

    max_iterations: eqx.AbstractVar[int]

    def __check_init__(self):
        if self.max_iterations < 1:
            raise ValueError(f"`max_iterations` must be at least 1, got {self.max_iterations}.")

    @abstractmethod
    def block_size(self, rank: int, limit: int) -> int:
        """Columns of the starting block, for `rank` triplets of a matrix of rank up to `limit`."""

    @abstractmethod
    def solve(self, jacobian: Jacobian, start: Array, rank: int) -> Ritz:
        """The leading triplets.

        Args:
            jacobian: products with it.
            start: `(n, block_size)`, orthonormal.
            rank: how many.
        """


class SubspaceIteration(SpectralMethod):
    """Block power iteration on J^T J with oversampling and Rayleigh-Ritz.

        Y = J V;  Y = Q R;  R = A S B^T;  u = Q A, v = V B, sigma = S;  V <- orth(J^T u)

    with blocks of k = r + oversample columns. The error of the leading r directions falls by
    (sigma_{k+1} / sigma_r)^2 per iteration, for 2 k products, instead of (sigma_{r+1} / sigma_r)^2
    without oversampling. It stops when the error of the subspace, estimated from the last changes
    as of a geometric series, is below `tolerance`.

    Simple and forgiving: a warm start takes one or two iterations. From scratch
    `GolubKahanLanczos` needs fewer products.

    Args:
        oversample: columns beyond the rank.
        tolerance: sine of the angle between the computed and the true subspace, about.
        max_iterations: at most this many.

    Raises:
        ValueError: for a negative `oversample`, or `max_iterations` < 1.

    Reference: Halko, Martinsson, Tropp, "Finding Structure with Randomness", 2009,
    arXiv 0909.4061, algorithm 4.4, iterated to a tolerance. The published code of Park, Kwon,
    Choi, Jo, Uh, "Understanding the Latent Space of Diffusion Models through the Lens of
    Riemannian Geometry", 2023, arXiv 2307.12868, iterates without oversampling or Rayleigh-Ritz,
    and compares signed vectors, whose signs may flip for ever.
    """

    oversample: int = eqx.field(static=True, default=8)
    tolerance: Number = number(1e-4)
    max_iterations: int = eqx.field(static=True, default=50)

    def __check_init__(self):
        check_count("oversample", self.oversample, least=0)
        check_number("tolerance", self.tolerance, least=0.0)
        check_count("max_iterations", self.max_iterations)

    def block_size(self, rank: int, limit: int) -> int:
        """rank + oversample, or all there are."""
        return min(rank + self.oversample, limit)

    @jax.default_matmul_precision("highest")
    def solve(self, jacobian: Jacobian, start: Array, rank: int) -> Ritz:
        """See `SpectralMethod`."""
        block = start.shape[1]

        def iterate(carry):
            basis, old = carry
            orthonormal, triangle = jnp.linalg.qr(jacobian.forward(basis))
            inner, values, outer = jnp.linalg.svd(after(triangle, orthonormal))
            left, right = orthonormal @ inner, basis @ outer.T
            back = jacobian.backward(left)
            residuals = jnp.linalg.norm(back - right * values, axis=0)
            found = right[:, :rank] * _significant(values[:rank])
            change = _sine(old.right, found)
            # Errors that fall by a constant rate sum to change * rate / (1 - rate).
            rate = jnp.clip(change / old.change, 0.0, 0.98)
            error = jnp.where(old.iterations > 1, change * rate / (1 - rate), jnp.inf)
            found = Ritz(
                values[:rank],
                found,
                left[:, :rank],
                residuals[:rank],
                change,
                old.iterations + 1,
                old.products + 2 * block,
                error < self.tolerance,
            )
            return jnp.linalg.qr(back)[0], found

        return _repeat(iterate, start, self.max_iterations, _nothing(jacobian, rank))


class GolubKahanLanczos(SpectralMethod):
    """Block Lanczos bidiagonalisation with full reorthogonalisation.

    Grows orthonormal bases V of span {W, J^T J W, ...}, for a starting block W, and U of J V,
    with J V = U B. The singular values of the small B and its vectors give the triplets; their
    residuals come for nothing. It stops when the leading subspace moves by less than `tolerance`
    from one step to the next; the error is then a good deal smaller.

    The number of products for given accuracy grows as the root of what subspace iteration needs.
    The bases take (n + m) block max_iterations numbers.

    Args:
        block: columns per step; None for half the rank, at least 2. Small blocks need fewer
            products, large ones fewer steps. Values of higher multiplicity than the block are
            found late.
        tolerance: sine of the angle between successive subspaces.
        max_iterations: at most this many steps; fewer where the bases fill the space.

    Raises:
        ValueError: for `block` or `max_iterations` < 1.

    Reference: Golub, Luk, Overton, "A Block Lanczos Method for Computing the Singular Values and
    Corresponding Singular Vectors of a Matrix", ACM TOMS 7, 1981.
    """

    block: int | None = eqx.field(static=True, default=None)
    tolerance: Number = number(1e-4)
    max_iterations: int = eqx.field(static=True, default=30)

    def __check_init__(self):
        if self.block is not None:
            check_count("block", self.block)
        check_number("tolerance", self.tolerance, least=0.0)
        check_count("max_iterations", self.max_iterations)

    def block_size(self, rank: int, limit: int) -> int:
        """`block`, or a little more where the bases fill the space: then they do so evenly."""
        block = min(max(2, -(-rank // 2)) if self.block is None else self.block, limit)
        return limit // (limit // block)

    @jax.default_matmul_precision("highest")
    def solve(self, jacobian: Jacobian, start: Array, rank: int) -> Ritz:
        """See `SpectralMethod`."""
        block = start.shape[1]
        limit = min(jacobian.in_size, jacobian.out_size)
        steps = min(max(self.max_iterations, -(-rank // block)), limit // block)
        size = steps * block
        if size < rank:
            raise ValueError(
                f"`block` must leave room for {rank} triplets in whole blocks of at most {limit} "
                f"columns, got {block}. Take a block that divides {limit}, or SubspaceIteration()."
            )

        def iterate(carry):
            (right, left, small), old = carry
            now = old.iterations * block
            column = jax.lax.dynamic_slice_in_dim(right, now, block, 1)
            fresh, above, corner = _extend(left, jacobian.forward(column))
            left = jax.lax.dynamic_update_slice_in_dim(left, fresh, now, 1)
            above = jax.lax.dynamic_update_slice_in_dim(above, corner, now, 0)
            small = jax.lax.dynamic_update_slice_in_dim(small, above, now, 1)
            fresh, _, corner = _extend(right, jacobian.backward(fresh))
            inner, values, outer = jnp.linalg.svd(after(small, fresh))
            last = jax.lax.dynamic_slice_in_dim(inner[:, :rank], now, block, 0)
            found = right[:, :size] @ (outer[:rank].T * _significant(values[:rank]))
            change = _sine(old.right, found)
            # The block after the last one lies beyond the basis, and is not used.
            right = jax.lax.dynamic_update_slice_in_dim(right, fresh, now + block, 1)
            found = Ritz(
                values[:rank],
                found,
                left @ inner[:, :rank],
                jnp.linalg.norm(corner @ last, axis=0),
                change,
                old.iterations + 1,
                old.products + 2 * block,
                (change < self.tolerance) & (now >= rank),
            )
            return (right, left, small), found

        right = jnp.zeros((jacobian.in_size, size + block), start.dtype).at[:, :block].set(start)
        left = jnp.zeros((jacobian.out_size, size), start.dtype)
        small = jnp.zeros((size, size), start.dtype)
        return _repeat(iterate, (right, left, small), steps, _nothing(jacobian, rank))


def _repeat(iterate: Callable, state: PyTree, max_iterations: int, nothing: Ritz) -> Ritz:
    """Iterate until converged."""

    def unfinished(carry):
        found = carry[1]
        return ~found.converged & (found.iterations < max_iterations)

    return jax.lax.while_loop(unfinished, iterate, (state, nothing))[1]


def _nothing(jacobian: Jacobian, rank: int) -> Ritz:
    """Before the first iteration: zero vectors, infinite residuals."""
    zero, dtype = jnp.zeros((), jnp.int32), jacobian.dtype
    infinite = jnp.full(rank, jnp.inf, dtype)
    right, left = (jnp.zeros((n, rank), dtype) for n in (jacobian.in_size, jacobian.out_size))
    return Ritz(infinite, right, left, infinite, infinite[0], zero, zero, jnp.zeros((), bool))


def _sine(old: Array, new: Array) -> Array:
    """Sine of the angles between two subspaces, `(n, r)` each, in the Frobenius norm.

    The remainder of a projection keeps small angles, which r - ||old^T new||^2 loses to rounding.
    """
    return jnp.linalg.norm(new - old @ (old.T @ new))


def _significant(values: Array) -> Array:
    """1 for values beyond rounding, 0 for the others, whose vectors are anything."""
    return (values > 8 * jnp.finfo(values.dtype).eps * values[0]).astype(values.dtype)


def _extend(basis: Array, columns: Array) -> tuple[Array, Array, Array]:
    """columns = basis above + fresh corner, with fresh orthonormal and orthogonal to the basis.

    Unused columns of the basis are zero. Where `columns` bring too few new directions, random ones
    take the place of those that a factorisation would make up, which may lie in the basis.
    """
    above = basis.T @ columns
    rest = columns - basis @ above
    again = basis.T @ rest
    fresh, corner = jnp.linalg.qr(rest - basis @ again)
    scale = jnp.linalg.norm(columns, axis=0).max()
    missing = jnp.abs(jnp.diagonal(corner)) <= 16 * jnp.finfo(corner.dtype).eps * scale
    drawn = jax.random.normal(jax.random.key(0), fresh.shape, fresh.dtype) / fresh.shape[0] ** 0.5
    fresh, corner = jnp.where(missing, drawn, fresh), jnp.where(missing[:, None], 0, corner)
    for _ in range(2):
        fresh, change = jnp.linalg.qr(fresh - basis @ (basis.T @ fresh))
        corner = change @ corner
    return fresh, above + again, corner
