"""Directions from labels: what tells two classes of activations apart."""

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike


def supervised_direction(h: Array, labels: Array) -> Array:
    """mean(h | y = 1) - mean(h | y = 0): the step from one class to the other.

    Args:
        h: activations of a population, `(n, *shape)`, at one time or along the whole trajectory;
            also states x.
        labels: their classes, `(n,)`, boolean or 0 and 1.

    Returns:
        The direction, `(*shape)`, with its length.

    Raises:
        ValueError: if `labels` do not fit, or, where that is known, lack a class.

    Reference: Haas, Huberman-Spiegelglas, Mulayoff, Grasshof, Brandt, Michaeli, "Discovering
    Interpretable Directions in the Semantic Latent Space of Diffusion Models", 2023,
    arXiv 2303.11073.
    """
    zero, one = _class_means(h, labels)
    return one - zero


@jax.default_matmul_precision("highest")
def lda_direction(h: Array, labels: Array, *, ridge: float = 1e-2) -> Array:
    """Sigma^{-1} (mean(h | y = 1) - mean(h | y = 0)): the normal that separates best.

    Sigma is the unbiased covariance within the classes, plus `ridge` times its mean eigenvalue
    tr(Sigma) / d. For Gaussian classes of equal covariance no direction separates better; unlike
    `supervised_direction` it ignores what varies within the classes. It is a normal to measure
    along; to edit, the difference of the means stays on the data.

    Computed from the singular value decomposition of the centred population: with n < d nothing of
    size d x d is formed.

    Args:
        h: activations of a population, `(n, *shape)`, n >= 3.
        labels: their classes, `(n,)`, boolean or 0 and 1.
        ridge: > 0; what is added, relative to the mean variance. It decides how much the directions
            count in which the classes do not vary, of which there are at least d + 2 - n.

    Returns:
        The direction, `(*shape)`, not normalised.

    Raises:
        ValueError: as `supervised_direction`, and for n < 3.

    Reference: Friedman, "Regularized Discriminant Analysis", 1989; Hastie, Tibshirani, Friedman,
    "The Elements of Statistical Learning", 2009, section 4.3.
    """
    zero, one = _class_means(h, labels)
    count = h.shape[0]
    if count < 3:
        raise ValueError(f"`h` must hold at least 3 examples for a covariance, got {count}.")
    own = jnp.where(_as_columns(labels, h) > 0, one, zero)
    within = (h - own).reshape(count, -1) / (count - 2) ** 0.5
    _, values, basis = jnp.linalg.svd(within, full_matrices=False)
    added = ridge * jnp.sum(values**2) / within.shape[1]
    difference = (one - zero).ravel()
    inside = basis @ difference
    direction = (inside / (values**2 + added)) @ basis
    if basis.shape[0] < basis.shape[1]:
        direction = direction + _outside(difference, basis) / added
    return direction.reshape(h.shape[1:])


@jax.default_matmul_precision("highest")
def disentangle(direction: Array, keep: Array) -> Array:
    """v - N (N^T N)^+ N^T v: a direction without its part in the span of others.

    Args:
        direction: v, `(*shape)`.
        keep: directions N of what an edit shall not change, `(q, *shape)`; linearly dependent ones,
            and zeros, do no harm.

    Returns:
        `(*shape)`, orthogonal to all of `keep`; 0 up to rounding if v lies in their span.

    Raises:
        ValueError: if the shapes do not match.

    Reference: Haas, Huberman-Spiegelglas, Mulayoff, Grasshof, Brandt, Michaeli, "Discovering
    Interpretable Directions in the Semantic Latent Space of Diffusion Models", 2023,
    arXiv 2303.11073.
    """
    if keep.shape[1:] != direction.shape or keep.ndim == direction.ndim:
        raise ValueError(
            f"`keep` must have shape (q, *shape) with shape {direction.shape} of `direction`, got "
            f"{keep.shape}. Pass a single direction as keep[None]."
        )
    columns = keep.reshape(keep.shape[0], -1)
    # Unit lengths, so that the rank does not depend on how strong a direction is.
    lengths = jnp.linalg.norm(columns, axis=1, keepdims=True)
    columns = columns / jnp.where(lengths > 0, lengths, 1.0)
    _, values, basis = jnp.linalg.svd(columns, full_matrices=False)
    smallest = max(columns.shape) * jnp.finfo(columns.dtype).eps * values[0]
    basis = jnp.where((values > smallest)[:, None], basis, 0.0)
    return _outside(direction.ravel(), basis).reshape(direction.shape)


def _outside(v: Array, basis: Array) -> Array:
    """The part of v orthogonal to orthonormal rows; twice, for full accuracy if it is small."""
    v = v - (basis @ v) @ basis
    return v - (basis @ v) @ basis


def _as_columns(labels: ArrayLike, h: Array) -> Array:
    return jnp.asarray(labels).astype(h.dtype).reshape(-1, *(1,) * (h.ndim - 1))


def _class_means(h: Array, labels: ArrayLike) -> tuple[Array, Array]:
    """Means of class 0 and class 1, `(*shape)` each."""
    check_labels(h.shape[0], labels)
    member = _as_columns(labels, h)
    one = jnp.sum(member * h, 0) / jnp.sum(member)
    return jnp.sum((1 - member) * h, 0) / jnp.sum(1 - member), one


def check_labels(count: int, labels: ArrayLike) -> None:
    """Reject labels that are not two classes, one entry per example.

    Raises:
        ValueError: if they are not.
    """
    if jnp.shape(labels) != (count,):
        raise ValueError(
            f"`labels` must have one entry per example, shape ({count},), got {jnp.shape(labels)}."
        )
    if isinstance(labels, jax.core.Tracer):
        return
    found = np.unique(np.asarray(labels))
    if found.tolist() != [0, 1]:
        raise ValueError(
            f"`labels` must hold both classes, 0 and 1, got {found[:5].tolist()}. For one of "
            "several classes pass labels == c."
        )
