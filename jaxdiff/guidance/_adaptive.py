"""Adaptive guidance: no second evaluation once it says nothing new."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_count, check_number
from jaxdiff._tree import Number, number
from jaxdiff.denoiser import Denoiser, Estimate
from jaxdiff.guidance._scale import (
    Scale,
    WithNull,
    check_scale,
    extrapolated,
    inner,
    norm,
    scale_at,
)
from jaxdiff.predictions import Eps
from jaxdiff.stepwise import Stepwise, index_of


class AdaptiveGuidance(Stepwise, WithNull):
    """Classifier-free guidance until eps_cond and eps_null point the same way, then D_cond alone.

    Kind 2: remembers, for each example, whether its cosine has reached `agreement`; from the next
    step on the conditional model is all there is. Of a batch both branches are computed as long
    as one example wants them: the count of evaluations is what an example needed, and time is
    saved where all are done. `skip_after` is the same by the number of the step, and really skips.

    Args:
        base: a denoiser trained with label dropout.
        null_cond: as of `ClassifierFree`.
        scale: as of `ClassifierFree`.
        agreement: cosine from which on guidance stops; above 1 it never does.
        skip_after: the first step without guidance, whatever the cosine; None for no such step.

    Reference: Castillo, Kohler, Perez, Perez, Pumarola, Ghanem, Arbelaez, Thabet, "Adaptive
    Guidance: Training-free Acceleration of Conditional Diffusion Models", 2023, arXiv 2312.12487.
    """

    base: Denoiser
    null_cond: PyTree
    scale: Scale = number(1.0)
    agreement: Number = number(0.991)
    skip_after: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_scale(self.scale)
        check_number("agreement", self.agreement)
        if self.skip_after is not None:
            check_count("skip_after", self.skip_after, least=0)

    @property
    def evaluations(self) -> Array | int:
        """Twice the base denoiser's while there is guidance, and once after that."""
        if self.bound is None:
            return 2 * self.base.evaluations
        return jnp.where(self.bound.memory | self._skipped(), 1, 2) * self.base.evaluations

    def init_memory(self, x: Array) -> Array:
        """Whether the branches have agreed: not yet."""
        return jnp.zeros((), bool)

    def _skipped(self) -> Array | bool:
        return False if self.skip_after is None else index_of(self) >= self.skip_after

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`.

        Raises:
            ValueError: for `skip_after` where steps have no number, as adaptive ones.
        """
        latched = self.step.memory

        def plain():
            return self.base.estimate(x, t, cond, key=key), latched

        def guided():
            given, none = self.both(x, t, cond, key)
            eps = [Eps().from_x0(self.process, x, t, found.x0) for found in (given, none)]
            length = norm(eps[0]) * norm(eps[1])
            cosine = inner(*eps) / jnp.where(length > 0, length, 1)
            scale = scale_at(self.scale, self.process, t)
            found = extrapolated(scale, self.process, x, t, given, none)
            return found, cosine > self.agreement

        def chosen():
            return jax.lax.cond(latched, plain, guided)

        if self.skip_after is None:
            found, agree = chosen()
        else:
            # Shared by all examples, so that nothing is computed there.
            found, agree = jax.lax.cond(self._skipped(), plain, chosen)
        return self.remember(found, latched | agree)
