"""The classifier score (Inception score)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from jaxdiff.metrics._pair import features


def classifier_score(logits: Float[Array, "n classes"]) -> Scalar:
    """exp E KL(p(y | x) | p(y)): how sure a classifier is, and of how many classes.

    With Inception's logits it is the Inception score. It never looks at real data.

    Args:
        logits: (n, classes) of samples.

    Returns:
        The score, a scalar in [1, classes]; biased upwards at small n.

    Raises:
        ValueError: for other shapes, or logits that are not finite.

    Reference: Salimans, Goodfellow, Zaremba, Cheung, Radford, Chen, "Improved Techniques for
    Training GANs", 2016, arXiv 1606.03498, section 4.
    """
    log_p = jax.nn.log_softmax(features("logits", logits))
    log_mean = jax.nn.logsumexp(log_p, 0) - jnp.log(len(log_p))
    divergence = jnp.sum(jnp.exp(log_p) * (log_p - log_mean), 1)
    return jnp.exp(jnp.mean(divergence))
