"""One basis for many points: means of vectors, beyond the means of what they span."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxdiff.geometry._grassmann import karcher_mean
from jaxdiff.geometry._linalg import (
    canonical_signs,
    check_bases,
    cosine_and_sinc,
    flat_basis,
    nearest_orthonormal,
    polished,
)


def frechet_basis(bases: Array, *, tolerance: float = 1e-5, max_iterations: int = 100) -> Array:
    """One basis for N bases: the mean of their spans, and within it the mean of their rotations.

    With X the Karcher mean of the spans, R_i = polar(X Y_i^T) is the orthogonal matrix that turns
    X into the part of Y_i in it. Singular vectors are known up to sign, so R_i is known up to signs
    of its columns: they are chosen to agree with the first basis, then with the mean of that. If
    the determinant still differs from the reference's, the sign of the least certain vector is
    turned, which is the smallest change of signs that gives it the same orientation: then all R_i
    lie in one component of O(r), where R <- R exp(mean_i log(R^T R_i)) finds their mean.

    Vectors are matched by their order; see `matched_basis` where singular values may cross.

    Args:
        bases: `(N, r, *shape)`.
        tolerance: norm of a step at which to stop, in either mean.
        max_iterations: at most this many steps of either mean.

    Returns:
        A basis `(r, *shape)`, with canonical signs.

    Raises:
        ValueError: if `bases` has fewer than three axes.

    Reference: Park, Kwon, Choi, Jo, Uh, "Understanding the Latent Space of Diffusion Models through
    the Lens of Riemannian Geometry", 2023, arXiv 2307.12868, for global bases; the paper gives no
    algorithm, this one is ours. Means of rotations: Moakher, "Means and Averaging in the
    Group of Rotations", 2002.
    """
    check_bases(bases)
    mean = karcher_mean(bases, tolerance=tolerance, max_iterations=max_iterations).basis
    with jax.default_matmul_precision("highest"):
        x, flat = flat_basis(mean), jax.vmap(flat_basis)(bases)
        rotations = nearest_orthonormal(jnp.einsum("im,njm->nij", x, flat))
        reference = rotations[0]
        for _ in range(2):
            rotations = jax.vmap(_same_orientation, (None, 0))(reference, rotations)
            reference = nearest_orthonormal(jnp.mean(rotations, 0))
        rotations = jax.vmap(_same_orientation, (None, 0))(reference, rotations)
        rotation = _rotation_mean(reference, rotations, tolerance, max_iterations)
        return canonical_signs(rotation.T @ x).reshape(bases.shape[1:])


@jax.default_matmul_precision("highest")
def matched_basis(bases: Array, *, passes: int = 3) -> Array:
    """One basis for N bases: the mean of their vectors, matched and with signs that agree.

    Vectors are matched to a reference so that the sum of |cosines| is largest. The reference is the
    first basis, then the mean of the pass before. The mean is replaced by the nearest orthonormal
    vectors.

    Args:
        bases: `(N, r, *shape)`.
        passes: how often to match and average.

    Returns:
        A basis `(r, *shape)`, with canonical signs, in the order of the first basis.

    Raises:
        ValueError: if `bases` has fewer than three axes.

    Reference: Park et al., 2023, arXiv 2307.12868, for a global basis by matching, whose details
    are ours. The nearest orthonormal vectors treat all alike; a QR decomposition would
    favour the first.
    """
    check_bases(bases)
    flat = jax.vmap(flat_basis)(bases)

    def match(reference, basis):
        overlap = reference @ basis.T
        rows, columns = optax.assignment.hungarian_algorithm(-jnp.abs(overlap))
        order = jnp.zeros_like(columns).at[rows].set(columns)
        sign = jnp.sign(jnp.take_along_axis(overlap, order[:, None], 1))
        return jnp.where(sign < 0, -1, 1).astype(basis.dtype) * basis[order]

    def refine(_, reference):
        return nearest_orthonormal(jnp.mean(jax.vmap(match, (None, 0))(reference, flat), 0))

    mean = jax.lax.fori_loop(0, passes, refine, flat[0])
    return canonical_signs(mean).reshape(bases.shape[1:])


def _rotation_log(rotation: Array) -> Array:
    """The skew-symmetric logarithm, for angles below pi.

    Of a square root, the polar factor of I + R, whose angles stay below pi/2: there the Cayley
    transform is skew-symmetric with values tan(theta / 4).
    """
    eye = jnp.eye(len(rotation), dtype=rotation.dtype)
    half = nearest_orthonormal(eye + rotation)
    cayley = jnp.linalg.solve(eye + half, half - eye)
    cayley = (cayley - cayley.T) / 2
    values, vectors = jnp.linalg.eigh(cayley.T @ cayley)
    tangent = jnp.sqrt(jnp.maximum(values, jnp.finfo(values.dtype).tiny))
    return 4 * cayley @ (vectors * (jnp.arctan(tangent) / tangent)) @ vectors.T


def _rotation_exp(skew: Array) -> Array:
    cosine, sinc = cosine_and_sinc(skew.T @ skew)
    return polished(cosine + skew @ sinc)


def _rotation_mean(start: Array, rotations: Array, tolerance: float, limit: int) -> Array:
    """The Karcher mean of orthogonal matrices in one component of O(r)."""

    def step(carry):
        mean, _, count = carry
        tangent = jnp.mean(jax.vmap(_rotation_log)(mean.T @ rotations), 0)
        return mean @ _rotation_exp(tangent), jnp.linalg.norm(tangent), count + 1

    def unfinished(carry):
        return (carry[1] >= tolerance) & (carry[2] < limit)

    carry = start, jnp.full((), jnp.inf, start.dtype), jnp.zeros((), jnp.int32)
    return jax.lax.while_loop(unfinished, step, carry)[0]


def _same_orientation(reference: Array, rotation: Array) -> Array:
    """Signs of the columns that agree with the reference, in its component of O(r)."""
    cosines = jnp.sum(reference * rotation, 0)
    signs = jnp.where(cosines < 0, -1, 1).astype(rotation.dtype)
    turned = jnp.linalg.det(reference.T @ rotation) * jnp.prod(signs) < 0
    least = jnp.argmin(jnp.abs(cosines))
    return rotation * signs.at[least].multiply(jnp.where(turned, -1, 1).astype(signs.dtype))
