"""Classifier-free guidance."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._tree import number
from jaxdiff.denoiser import Denoiser, DenoiserMap


class ClassifierFree(DenoiserMap):
    """D_null + scale (D_cond - D_null): extrapolate from the unconditional to the conditional.

    Kind 1: denoiser to denoiser, stateless. Both evaluations run as one batch of two.

    Args:
        base: a denoiser trained with label dropout.
        null_cond: the condition that means "none", e.g. `num_classes`.
        scale: 1 is the conditional model, 0 the unconditional one, above 1 guides.

    Reference: Ho, Salimans, "Classifier-Free Diffusion Guidance", 2022, arXiv 2207.12598,
    equation 6. The paper's w is scale - 1. In x0 instead of eps, which is the same by
    linearity.
    """

    base: Denoiser
    null_cond: PyTree
    scale: float = number(1.0)

    @property
    def evaluations(self) -> int:
        """Twice the base denoiser's."""
        return 2 * self.base.evaluations

    def __call__(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Array:
        """See `Denoiser`."""
        pair = jax.tree.map(
            lambda null, c: jnp.stack([jnp.asarray(null, jnp.result_type(c)), c]),
            self.null_cond,
            cond,
        )
        unconditional, conditional = jax.vmap(lambda c: self.base(x, t, c, key=key))(pair)
        return unconditional + self.scale * (conditional - unconditional)
