"""Several conditions at once: conjunction, negation, and one condition in place of none."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_count
from jaxdiff._tree import number
from jaxdiff.conditions import as_entries, from_entries, null_where, take
from jaxdiff.denoiser import Denoiser, DenoiserMap, Estimate, combined
from jaxdiff.energy import check_density
from jaxdiff.guidance._scale import (
    Scale,
    WithNull,
    both_answers,
    check_scale,
    extrapolated,
    scale_at,
)


class Composable(WithNull):
    """D_null + scale sum_i w_i (D_i - D_null): several conditions of one example together.

    Kind 1, with data of the example: its condition has the entries "concepts", conditions of the
    network with a leading axis of k, and "weights" `(k,)`. Positive weights ask for a concept,
    negative ones for its absence. All k + 1 evaluations run as one batch.

    Of laws in which the concepts are independent given x_t it samples their product; as that
    holds at t = 0 alone, samples are off in between, by what `Corrected` repairs.

    Args:
        base: a denoiser trained with label dropout.
        null_cond: as of `ClassifierFree`.
        count: k.
        scale: on all weights; a schedule may return one for each concept, `(k,)`.

    Reference: Liu, Li, Du, Torralba, Tenenbaum, "Compositional Visual Generation with Composable
    Diffusion Models", 2022, arXiv 2206.01714.
    """

    base: Denoiser
    null_cond: PyTree
    count: int = eqx.field(static=True)
    scale: Scale = number(1.0)

    def __check_init__(self):
        check_count("count", self.count)
        check_scale(self.scale)

    takes: ClassVar[tuple[str, ...]] = ("concepts", "weights")

    def check_cond(self, cond: PyTree) -> None:
        """See `Denoiser`: every concept, and the null condition."""
        entries = as_entries(cond)
        concepts = as_entries(entries.get("concepts"))
        super().check_cond(from_entries({**entries, **concepts}))

    @property
    def evaluations(self) -> Array | int:
        """Those of the base for each concept, and for none."""
        return (self.count + 1) * self.base.evaluations

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`; a learned variance, and what maps remember, are those of no concept.

        Raises:
            ValueError: for a condition without concepts and weights, or of another number.
        """
        concepts, weights, rest = take(cond, "concepts", "weights", by="Composable")
        sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves((concepts, weights))}
        if sizes != {(self.count,)}:
            raise ValueError(
                f"`concepts` and `weights` of an example must have a leading axis of `count`, "
                f"{self.count}, got {sorted(sizes)}."
            )

        def one(concept, null):
            whole = from_entries({**as_entries(rest), **as_entries(concept)})
            return self.base.estimate(x, t, null_where(null, whole, self.null_cond), key=key)

        # The first concept once more, replaced by none.
        every = jax.tree.map(lambda c: jnp.concatenate([c[:1], c]), concepts)
        found = jax.vmap(one)(every, jnp.arange(self.count + 1) == 0)
        answers = [jax.tree.map(lambda leaf, i=i: leaf[i], found) for i in range(self.count + 1)]
        own = weights.astype(x.dtype) * scale_at(self.scale, self.process, t)

        def rule(none, *each):
            return none + jnp.tensordot(own, jnp.stack(each) - none, 1)

        return combined(rule, self.process, x, t, *answers)

    def log_prob(self, x: Array, t: Array, cond: PyTree = None) -> Array:
        """log p_t(x) + scale sum_i w_i log p_t(x | c_i) / p_t(x), up to a constant.

        Raises:
            TypeError: for a base that does not know its density.
        """
        concepts, weights, rest = take(cond, "concepts", "weights", by="Composable")
        base = check_density(self.base, "Composable")

        def one(concept, null):
            whole = from_entries({**as_entries(rest), **as_entries(concept)})
            return base.log_prob(x, t, null_where(null, whole, self.null_cond))

        every = jax.tree.map(lambda c: jnp.concatenate([c[:1], c]), concepts)
        found = jax.vmap(one)(every, jnp.arange(self.count + 1) == 0)
        return found[0] + weights * scale_at(self.scale, self.process, t) @ (found[1:] - found[0])


class NegativePrompt(DenoiserMap):
    """D_negative + scale (D_cond - D_negative): another condition in place of none.

    Kind 1, with data of the example: the entry "negative" of its condition, a condition of the
    network.

    Args:
        base: any conditional denoiser.
        scale: as of `ClassifierFree`.

    Reference: the practice of text-to-image users; e.g. Ban, Wang, Zhou, Cheng, Gong, Hsieh,
    "Understanding the Impact of Negative Prompts: When and How Do They Take Effect?", 2024, arXiv
    2406.02965.
    """

    base: Denoiser
    scale: Scale = number(1.0)

    def __check_init__(self):
        check_scale(self.scale)

    def check_cond(self, cond: PyTree) -> None:
        """See `Denoiser`: both conditions."""
        entries = as_entries(cond)
        if "negative" in entries:
            negative, rest = take(cond, "negative", by="NegativePrompt")
            super().check_cond(rest)
            super().check_cond(negative)

    @property
    def evaluations(self) -> Array | int:
        """Twice the base denoiser's."""
        return 2 * self.base.evaluations

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        negative, rest = take(cond, "negative", by="NegativePrompt")
        given, other = both_answers(self.base, x, t, rest, negative, key)
        scale = scale_at(self.scale, self.process, t)
        return extrapolated(scale, self.process, x, t, given, other)
