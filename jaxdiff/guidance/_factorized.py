"""Factorized diffusion: one condition for each part of an image."""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_callable
from jaxdiff.conditions import as_entries, from_entries, take
from jaxdiff.denoiser import Denoiser, DenoiserMap, Estimate, combined


class Factorized(DenoiserMap):
    """sum_i F_i D(x, t, c_i), with linear F_i that add up to the identity.

    Kind 1, with data of the example: the entry "parts" of its condition are k conditions of the
    network, along a leading axis. Parts may be frequencies, colours, regions: an image that is one
    thing from far away and another from near.

    Args:
        base: a conditional denoiser; guidance of one, for parts under guidance.
        parts: F_1, ..., F_k, each a linear function of an example. What they leave over is not
            restored.

    Reference: Geng, Park, Owens, "Factorized Diffusion: Perceptual Illusions by Noise
    Decomposition", 2024, arXiv 2404.11615; in x0, which is the same for parts that add up
    to the identity.
    """

    base: Denoiser
    parts: tuple[Callable[[Array], Array], ...]

    def __check_init__(self):
        if not isinstance(self.parts, tuple) or not self.parts:
            raise ValueError(f"`parts` must be a tuple of functions, got {self.parts!r}.")
        for part in self.parts:
            check_callable("parts", part, "jax.tree_util.Partial(low_pass)")

    def check_cond(self, cond: PyTree) -> None:
        """See `Denoiser`: every part's."""
        entries = as_entries(cond)
        if "parts" in entries:
            parts, rest = take(cond, "parts", by="Factorized")
            super().check_cond(from_entries({**as_entries(rest), **as_entries(parts)}))

    @property
    def evaluations(self) -> Array | int:
        """Those of the base for each part."""
        return len(self.parts) * self.base.evaluations

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`; a learned variance, and what maps remember, are those of the first part.

        Raises:
            ValueError: for a condition without parts, or of another number.
        """
        parts, rest = take(cond, "parts", by="Factorized")
        sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(parts)}
        if sizes != {(len(self.parts),)}:
            raise ValueError(
                f"`parts` of an example must have a leading axis of {len(self.parts)}, "
                f"got {sorted(sizes)}."
            )

        def one(part):
            whole = from_entries({**as_entries(rest), **as_entries(part)})
            return self.base.estimate(x, t, whole, key=key)

        found = jax.vmap(one)(parts)
        answers = [jax.tree.map(lambda leaf, i=i: leaf[i], found) for i in range(len(self.parts))]

        def rule(*each):
            return sum(part(one) for part, one in zip(self.parts, each, strict=True))

        return combined(rule, self.process, x, t, *answers)


class FixedPart(DenoiserMap):
    """P known + (1 - P) D: one part of the image is that of a real one, the other is made to fit.

    Kind 1, with data of the example: the entry "known" of its condition, an example whose
    part is kept.

    Args:
        base: any denoiser.
        part: P, a linear projection of an example, such as its low frequencies.

    Reference: as of `Factorized`; there the noisy part is put in place at every step,
    here the estimate of it, which DDIM takes to the same image.
    """

    base: Denoiser
    part: Callable[[Array], Array]

    takes: ClassVar[tuple[str, ...]] = ("known",)

    def __check_init__(self):
        check_callable("part", self.part, "jax.tree_util.Partial(low_pass)")

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`.

        Raises:
            ValueError: for a known example of another shape than x.
        """
        known, rest = take(cond, "known", by="FixedPart")
        if jnp.shape(known) != x.shape:
            raise ValueError(
                f"`known` must be an example of shape {x.shape}, got {jnp.shape(known)}."
            )
        found = self.base.estimate(x, t, rest, key=key)
        return found.moved(self.process, t, found.x0 + self.part(known - found.x0))
