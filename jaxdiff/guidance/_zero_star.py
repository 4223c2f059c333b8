"""CFG-Zero*: guidance of flows with an unconditional velocity of the right size."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_count
from jaxdiff._tree import number
from jaxdiff.denoiser import Denoiser, Estimate
from jaxdiff.guidance._scale import Scale, WithNull, check_scale, inner, scale_at
from jaxdiff.stepwise import Stepwise, index_of, kept_notes


class CFGZeroStar(Stepwise, WithNull):
    """v = s v_null + scale (v_cond - s v_null), s = <v_cond, v_null> / |v_null|^2; v = 0 at first.

    Kind 2: decides by the number of the step. v = D - eps is the velocity of rectified flow, to
    which any process comes down at u = sigma / (alpha + sigma) by rescaling x; its zero leaves
    x / (alpha + sigma) where it is. Skipped steps cost nothing.

    Of numbers, and wherever v_cond and v_null are parallel, this guides not at all; and skipped
    steps bias an exact model.

    Args:
        base: a denoiser trained with label dropout.
        null_cond: as of `ClassifierFree`.
        scale: as of `ClassifierFree`.
        zero_steps: steps at the start without any movement; the paper's 4 %, one of 25.

    Reference: Fan, Zheng, Yeh, Liu, "CFG-Zero*: Improved Classifier-Free Guidance for Flow Matching
    Models", 2025, arXiv 2503.18886, algorithm 1.
    """

    base: Denoiser
    null_cond: PyTree
    scale: Scale = number(1.0)
    zero_steps: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        check_scale(self.scale)
        check_count("zero_steps", self.zero_steps, least=0)

    @property
    def evaluations(self) -> Array | int:
        """Twice the base denoiser's, or nothing where the step is skipped."""
        if self.bound is None or self.zero_steps == 0:
            return 2 * self.base.evaluations
        return jnp.where(index_of(self) < self.zero_steps, 0, 2 * self.base.evaluations)

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`.

        Raises:
            ValueError: where steps have no number, as adaptive ones.
        """
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)

        def guided():
            given, none = self.both(x, t, cond, key)
            # D - eps = ((alpha + sigma) D - x) / sigma.
            v_given, v_none = (((alpha + sigma) * x0 - x) / sigma for x0 in (given.x0, none.x0))
            size = inner(v_none, v_none)
            share = inner(v_given, v_none) / jnp.where(size > 0, size, 1)
            start = share * v_none
            v = start + scale_at(self.scale, self.process, t) * (v_given - start)
            x0 = ((x + sigma * v) / (alpha + sigma)).astype(x.dtype)
            # The noise is the one that x0 implies: clipped outside, both stay consistent.
            return given.replace(x0=x0, eps=None)

        if self.zero_steps == 0:
            return guided()
        still = (x / (alpha + sigma)).astype(x.dtype)
        empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(guided))
        resting = empty.replace(x0=still, notes=kept_notes(self.base))
        return jax.lax.cond(index_of(self) < self.zero_steps, lambda: resting, guided)
