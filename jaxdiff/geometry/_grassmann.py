"""Subspaces: angles, distances, geodesics and means on the Grassmannian.

A basis of a subspace is an array `(r, *shape)`: r orthonormal vectors along the leading axis. All
but the vectors of a result depends on spans alone. No matrix of the size of the space is formed.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jaxdiff._tree import batched
from jaxdiff.geometry._linalg import (
    after,
    canonical_signs,
    check_bases,
    cosine_and_sinc,
    flat_basis,
    polished,
)


@jax.default_matmul_precision("highest")
def principal_angles(
    a: Float[Array, "r *shape"], b: Float[Array, "s *shape"]
) -> Float[Array, "min(r,s)"]:
    """Principal angles between two subspaces, increasing, in [0, pi/2].

    Cosines are the singular values of A B^T, sines those of what is left of one basis after
    projection on the other. The arc tangent of both is accurate for angles small and large:
    cosines alone lose all angles below the root of the rounding error.

    Args:
        a: a basis, `(r, *shape)`.
        b: another, `(s, *shape)`.

    Returns:
        `(min(r, s),)`.

    Raises:
        ValueError: if the vectors differ in shape.

    Reference: Bjorck, Golub, "Numerical Methods for Computing Angles Between Linear Subspaces",
    Mathematics of Computation 27, 1973.
    """
    _check_pair(a, b)
    small, large = (flat_basis(basis) for basis in sorted((a, b), key=len))
    overlap = small @ large.T
    cosines = jnp.linalg.svd(overlap, compute_uv=False)
    remainder = small - after(overlap, cosines) @ large
    remainder = jnp.linalg.qr(remainder.T, mode="r")
    sines = jnp.linalg.svd(remainder, compute_uv=False)[::-1]
    return jnp.arctan2(sines, cosines)


def grassmann_distance(
    a: Float[Array, "r *shape"], b: Float[Array, "s *shape"]
) -> Float[Array, ""]:
    """Length of the geodesic between two subspaces: the 2-norm of their principal angles.

    0 if and only if one of them contains the other; for equal dimensions, if they are the same.

    Args:
        a: a basis, `(r, *shape)`.
        b: another, `(s, *shape)`.

    Raises:
        ValueError: if the vectors differ in shape.

    Examples:
        >>> a, b = jnp.eye(3)[:1], jnp.eye(3)[1:2]
        >>> round(float(geometry.grassmann_distance(a, b)), 4)  # a right angle
        1.5708

    Reference: Edelman, Arias, Smith, "The Geometry of Algorithms with Orthogonality Constraints",
    1998, arXiv physics/9806030, section 4.3; unequal dimensions: Ye, Lim, "Schubert Varieties and
    Distances between Subspaces of Different Dimensions", 2014, arXiv 1407.0900.
    """
    return jnp.linalg.norm(principal_angles(a, b))


def chordal_distance(a: Float[Array, "r *shape"], b: Float[Array, "s *shape"]) -> Float[Array, ""]:
    """2-norm of the sines of the principal angles: ||P_a - P_b|| / sqrt(2) for projectors P.

    Args:
        a: a basis, `(r, *shape)`.
        b: another, `(s, *shape)`.

    Returns:
        A scalar.

    Reference: Conway, Hardin, Sloane, "Packing Lines, Planes, etc.: Packings in Grassmannian
    Spaces", 1996, arXiv math/0208004.
    """
    return jnp.linalg.norm(jnp.sin(principal_angles(a, b)))


def pairwise_distances(
    bases: Array,
    *,
    distance: Callable[[Array, Array], Array] = grassmann_distance,
    batch_size: int | None = 16,
) -> Array:
    """Distances between all pairs of N subspaces.

    Args:
        bases: `(N, r, *shape)`.
        distance: a symmetric function of two bases, e.g. `chordal_distance`.
        batch_size: pairs computed at a time, to bound memory; None for all at once.

    Returns:
        `(N, N)`, symmetric, with zeros on the diagonal.

    Raises:
        ValueError: if `bases` has fewer than three axes.
    """
    check_bases(bases)
    rows, columns = np.triu_indices(len(bases), 1)
    values = batched(lambda i, j: distance(bases[i], bases[j]), batch_size)(rows, columns)
    upper = jnp.zeros((len(bases), len(bases)), values.dtype).at[rows, columns].set(values)
    return upper + upper.T


def random_distance(
    key: PRNGKeyArray,
    rank: int,
    size: int,
    *,
    num_subspaces: int = 12,
    distance: Callable[[Array, Array], Array] = grassmann_distance,
) -> tuple[Array, Array]:
    """How far random subspaces are from each other: what distances between found ones compare to.

    Spans of Gaussian matrices are uniform on the Grassmannian. In many dimensions all angles are
    nearly right, and the distance is close to sqrt(rank) pi / 2.

    Args:
        key: typed PRNG key.
        rank: r, dimension of the subspaces.
        size: n, dimension of the space, at least r.
        num_subspaces: N; all pairs of them are measured.
        distance: a symmetric function of two bases.

    Returns:
        Mean and standard deviation over the N (N - 1) / 2 pairs, scalars.
    """
    normal = jax.random.normal(key, (num_subspaces, size, rank))
    bases = jnp.linalg.qr(normal)[0].mT
    upper = np.triu_indices(num_subspaces, 1)
    values = pairwise_distances(bases, distance=distance)[upper]
    return jnp.mean(values), jnp.std(values)


@jax.default_matmul_precision("highest")
def grassmann_log(
    base: Float[Array, "r *shape"], target: Float[Array, "r *shape"]
) -> Float[Array, "r *shape"]:
    """The tangent vector at `base` whose geodesic reaches the span of `target` at time 1.

    Delta = sum_i theta_i h_i u_i^T over principal angles theta_i, with u_i the principal vector
    in the base in coordinates, and h_i the unit vector that points from it to its partner.

    Args:
        base: X, a basis `(r, *shape)`.
        target: Y, a basis `(r, *shape)`. Where an angle is pi/2 there are several geodesics, and
            one of them is returned.

    Returns:
        Delta, `(r, *shape)`: row i is the velocity of vector i of the base, orthogonal to all of
        the base. Its norm is `grassmann_distance(base, target)`.

    Raises:
        ValueError: if the shapes differ.

    Reference: Edelman, Arias, Smith, 1998, arXiv physics/9806030, section 2.5, in a form without
    the inverse of X Y^T: angles enter through theta / sin(theta), a smooth function of the cosine.
    """
    _check_equal(base, target)
    x, y = flat_basis(base), flat_basis(target)
    towards, back, _ = _log_coefficients(x @ y.T)
    return (towards @ y - back @ x).reshape(base.shape)


@jax.default_matmul_precision("highest")
def grassmann_exp(
    base: Float[Array, "r *shape"], tangent: Float[Array, "r *shape"]
) -> Float[Array, "r *shape"]:
    """The basis that the geodesic from `base` along a tangent vector reaches at time 1.

    Y = cos(S) X + sin(S) / S Delta with S = (Delta Delta^T)^{1/2}. The vectors of the base are
    carried along without turning among themselves.

    Args:
        base: X, a basis `(r, *shape)`.
        tangent: Delta, `(r, *shape)`, orthogonal to all of the base.

    Returns:
        Y, an orthonormal basis `(r, *shape)`.

    Raises:
        ValueError: if the shapes differ.

    Reference: Edelman, Arias, Smith, 1998, arXiv physics/9806030, theorem 2.3.
    """
    _check_equal(base, tangent)
    x, delta = flat_basis(base), flat_basis(tangent)
    cosine, sinc = cosine_and_sinc(delta @ delta.T)
    return polished(cosine @ x + sinc @ delta).reshape(base.shape)


@jax.default_matmul_precision("highest")
def extrinsic_mean(bases: Array, *, weights: Array | None = None) -> Array:
    """The subspace nearest to N subspaces in the chordal distance: top of their mean projector.

    From the eigenvectors of the N r x N r Gram matrix of all vectors.

    Args:
        bases: `(N, r, *shape)`.
        weights: `(N,)`, >= 0, of which not all are 0; None for equal ones.

    Returns:
        A basis `(r, *shape)`, principal direction first. Unique if the eigenvalues r and r + 1
        of the mean projector differ.

    Raises:
        ValueError: if `bases` has fewer than three axes.

    Reference: Edelman, Arias, Smith, 1998, arXiv physics/9806030, section 4.3; Draper, Kirby,
    Marks, Marrinan, Peterson, "A Flag Representation for Finite Collections of Subspaces of Mixed
    Dimensions", Linear Algebra and its Applications 451, 2014.
    """
    check_bases(bases)
    count, rank = bases.shape[:2]
    scale = jnp.ones(count) if weights is None else jnp.sqrt(weights)
    vectors = jax.vmap(flat_basis)(bases)
    vectors = (scale.astype(vectors.dtype)[:, None, None] * vectors).reshape(count * rank, -1)
    values, coefficients = jnp.linalg.eigh(vectors @ vectors.T)
    top = coefficients[:, ::-1][:, :rank] / jnp.sqrt(values[::-1][:rank])
    return canonical_signs(polished(top.T @ vectors)).reshape(bases.shape[1:])


class KarcherMean(eqx.Module):
    """A mean on the Grassmannian.

    Attributes:
        basis: `(r, *shape)`.
        variance: mean squared geodesic distance to it, one step before the last.
        change: norm of the last step, which vanishes at the mean.
        iterations: how many steps.
        converged: whether the change fell below the tolerance.
    """

    basis: Array
    variance: Array
    change: Array
    iterations: Array
    converged: Array


@jax.default_matmul_precision("highest")
def karcher_mean(
    bases: Array,
    *,
    weights: Array | None = None,
    tolerance: float = 1e-5,
    max_iterations: int = 100,
) -> KarcherMean:
    """The subspace of least mean squared geodesic distance to N subspaces.

    X <- Exp_X(mean_i Log_X(Y_i)) from the extrinsic mean. A step never increases the mean squared
    distance, because the curvature is not negative. The mean is unique if all subspaces lie within
    pi/4 of one; otherwise it is a local one.

    Args:
        bases: `(N, r, *shape)`.
        weights: `(N,)`, >= 0, of which not all are 0; None for equal ones.
        tolerance: norm of a step at which to stop.
        max_iterations: at most this many steps.

    Returns:
        A `KarcherMean`.

    Raises:
        ValueError: if `bases` has fewer than three axes.

    Reference: Karcher, "Riemannian Center of Mass and Mollifier Smoothing", 1977; Begelfor,
    Werman, "Affine Invariance Revisited", CVPR 2006, for the iteration on the Grassmannian.
    """
    check_bases(bases)
    flat = jax.vmap(flat_basis)(bases)
    weights = jnp.ones(len(bases)) if weights is None else weights
    weights = (weights / jnp.sum(weights)).astype(flat.dtype)

    def step(mean):
        overlaps = jnp.einsum("im,njm->nij", mean.basis, flat)
        towards, back, angles = jax.vmap(_log_coefficients)(overlaps)
        tangent = jnp.einsum("n,nij,njm->im", weights, towards, flat)
        tangent -= jnp.einsum("n,nij->ij", weights, back) @ mean.basis
        change = jnp.linalg.norm(tangent)
        return KarcherMean(
            grassmann_exp(mean.basis, tangent),
            weights @ jnp.sum(angles**2, 1),
            change,
            mean.iterations + 1,
            change < tolerance,
        )

    def unfinished(mean):
        return ~mean.converged & (mean.iterations < max_iterations)

    start = flat_basis(extrinsic_mean(bases, weights=weights))
    infinite = jnp.full((), jnp.inf, flat.dtype)
    zero, no = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
    mean = KarcherMean(start, infinite, infinite, zero, no)
    mean = jax.lax.while_loop(unfinished, step, mean)
    shape = bases.shape[1:]
    return eqx.tree_at(lambda m: m.basis, mean, canonical_signs(mean.basis).reshape(shape))


def _check_pair(a: Array, b: Array) -> None:
    if a.ndim < 2 or a.shape[1:] != b.shape[1:]:
        raise ValueError(
            "`a` and `b` must be bases (r, *shape) and (s, *shape) of vectors of one shape, got "
            f"{a.shape} and {b.shape}."
        )


def _check_equal(base: Array, other: Array) -> None:
    if base.ndim < 2 or base.shape != other.shape:
        raise ValueError(
            "A basis and its target or tangent must have one shape (r, *shape), got "
            f"{base.shape} and {other.shape}."
        )


def _log_coefficients(overlap: Array) -> tuple[Array, Array, Array]:
    """A and B of Log_X(Y) = A Y - B X, and the principal angles, from X Y^T."""
    left, cosines, right = jnp.linalg.svd(overlap)
    # theta / sin(theta) as a function of 1 - cos(theta), smooth also where that vanishes.
    versine = jnp.maximum(1 - cosines, jnp.finfo(cosines.dtype).eps ** 2)
    angles = 2 * jnp.arcsin(jnp.sqrt(versine / 2))
    scaled = left * (angles / jnp.sqrt(versine * (2 - versine)))
    return scaled @ right, (scaled * cosines) @ left.T, angles
