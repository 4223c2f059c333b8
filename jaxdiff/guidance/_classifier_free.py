"""Classifier-free guidance."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, number
from jaxdiff.conditions import null_where
from jaxdiff.denoiser import Denoiser, DenoiserMap, Estimate


class ClassifierFree(DenoiserMap):
    """D_null + scale (D_cond - D_null): extrapolate from the unconditional to the conditional.

    Kind 1: denoiser to denoiser, stateless. Both evaluations run as one batch of two. A learned
    variance, and what maps inside remember, are those of the conditional branch.

    Args:
        base: a denoiser trained with label dropout.
        null_cond: the condition that means "none", e.g. `num_classes`; broadcast to what it
            replaces, and of a mapping only the entries that it names.
        scale: 1 is the conditional model, 0 the unconditional one, above 1 guides.

    Raises:
        ValueError: when called, if the condition lacks what `null_cond` replaces.

    Examples:
        >>> network = networks.MLP(2, hidden=8, num_classes=10, rngs=nnx.Rngs(0))
        >>> denoiser = jaxdiff.NetworkDenoiser(network, processes.VP())
        >>> guided = guidance.ClassifierFree(denoiser, null_cond=10, scale=3.0)
        >>> jaxdiff.sample(jax.random.key(0), guided, (2,), 4, cond=jnp.arange(4), times=5).x.shape
        (4, 2)

    Reference: Ho, Salimans, "Classifier-Free Diffusion Guidance", 2022, arXiv 2207.12598,
    equation 6. The paper's w is scale - 1. In x0 instead of eps, which is the same by
    linearity.
    """

    base: Denoiser
    null_cond: PyTree
    scale: Number = number(1.0)

    def __check_init__(self):
        check_number("scale", self.scale)
        if self.null_cond is None:
            raise ValueError(
                "`null_cond` must be the condition that means none, got None. Pass e.g. the "
                "number of classes, as in training."
            )

    def check_cond(self, cond: PyTree) -> None:
        """See `Denoiser`; the null condition too."""
        super().check_cond(cond)
        super().check_cond(self.null_cond)

    @property
    def evaluations(self) -> Array | int:
        """Twice the base denoiser's."""
        return 2 * self.base.evaluations

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""

        def branch(null):
            return self.base.estimate(x, t, null_where(null, cond, self.null_cond), key=key)

        pair = jax.vmap(branch)(jnp.asarray([True, False]))
        found = jax.tree.map(lambda leaf: leaf[1], pair)

        def guided(both):
            return None if both is None else both[0] + self.scale * (both[1] - both[0])

        return found.replace(x0=guided(pair.x0), eps=guided(pair.eps))
