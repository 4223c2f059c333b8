"""Accuracy of a classifier."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Scalar

from jaxdiff._tree import is_known


def accuracy(logits: Float[Array, "n classes"], labels: Int[Array, "n"]) -> tuple[Scalar, Scalar]:
    """Fraction of examples whose largest logit is their label's, and its standard error.

    Args:
        logits: (n, classes), n >= 1.
        labels: (n,) integers in [0, classes).

    Returns:
        (a, sqrt(a (1 - a) / n)): the fraction and its binomial standard error, scalars. The error
        is 0 at a = 0 and 1, where n says more.

    Raises:
        ValueError: for shapes or dtypes that do not match.

    Examples:
        >>> logits = jnp.eye(4)
        >>> [float(v) for v in metrics.accuracy(logits, jnp.asarray([0, 1, 2, 0]))]
        [0.75, 0.21650634706020355]
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    shape = logits.shape
    if len(shape) != 2 or shape[0] == 0 or jnp.shape(labels) != shape[:1]:
        raise ValueError(
            "`logits` and `labels` must have the shapes (n, classes) and (n,) with n > 0, got "
            f"{shape} and {jnp.shape(labels)}."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"`labels` must be integers, got dtype {labels.dtype}. Pass class numbers, not one-hot "
            "vectors or scores."
        )
    if is_known(labels) and not (labels.min() >= 0 and labels.max() < shape[1]):
        raise ValueError(
            f"`labels` must lie in [0, {shape[1]}), the classes of `logits`, got "
            f"{labels.min()} to {labels.max()}."
        )
    hit = jnp.mean(jnp.argmax(logits, -1) == labels, dtype=logits.dtype)
    return hit, jnp.sqrt(hit * (1 - hit) / shape[0])
