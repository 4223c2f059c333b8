"""Laws made of laws: products, quotients and mixtures of the noisy densities of several models."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_number
from jaxdiff._tree import as_number
from jaxdiff.conditions import as_entries, from_entries
from jaxdiff.denoiser import Denoiser, DenoiserMap, Estimate, check_denoiser, combined
from jaxdiff.energy import check_density


class Conditioned(DenoiserMap):
    """A denoiser under one condition, the same for all examples.

    Kind 1. Entries of an example's own condition that are not fixed here go on to the base.

    Args:
        base: any conditional denoiser.
        fixed: its condition, of one example.
    """

    base: Denoiser
    fixed: PyTree

    def check_cond(self, cond: PyTree) -> None:
        """See `Denoiser`: with what is fixed."""
        super().check_cond(self._whole(cond))

    def _whole(self, cond: PyTree) -> PyTree:
        return from_entries({**as_entries(cond), **as_entries(self.fixed)})

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        return self.base.estimate(x, t, self._whole(cond), key=key)

    def log_prob(self, x: Array, t: Array, cond: PyTree = None) -> Array:
        """The base's log p_t(x | fixed)."""
        return check_density(self.base, "Conditioned").log_prob(x, t, self._whole(cond))


class _Composition(DenoiserMap):
    """Base of the laws of several models of one process and shape, with a weight for each."""

    bases: tuple[Denoiser, ...] = eqx.field(converter=tuple)
    weights: tuple[Any, ...] = eqx.field(converter=lambda weights: tuple(map(as_number, weights)))

    def __check_init__(self):
        if len(self.bases) != len(self.weights) or not self.bases:
            raise ValueError(
                "`weights` must be one number for each of `bases`, got "
                f"{len(self.weights)} for {len(self.bases)}."
            )
        for base in self.bases:
            check_denoiser(base, "bases")
        for weight in self.weights:
            check_number("weights", weight)

    @property
    def base(self) -> Denoiser:
        """The first of them."""
        return self.bases[0]

    def _estimates(self, x, t, cond, key) -> list[Estimate]:
        return [base.estimate(x, t, cond, key=key) for base in self.bases]

    def _log_probs(self, x, t, cond) -> Array:
        asked_by = type(self).__name__
        known = [check_density(base, asked_by) for base in self.bases]
        return jnp.stack([base.log_prob(x, t, cond) for base in known])

    def _weights(self) -> Array:
        return jnp.stack([jnp.asarray(weight) for weight in self.weights])


def _notes(found: list[Estimate]) -> dict[int, PyTree]:
    return {slot: memory for one in found for slot, memory in one.notes.items()}


class Product(_Composition):
    """The law with log p_t = sum_i w_i log p_i,t: a product, and a quotient for w_i < 0.

        score = sum_i w_i score_i,    D = sum_i w_i D_i + (1 - sum_i w_i) x / alpha.

    Kind 1, with several children. At t = 0 this is prod_i p_i^w_i. In between it is *not* the
    noised law of that, of which no step is exact: a plain sampler draws from neither. `Corrected`
    with corrections at each noise level does, as far as they mix. A quotient must be normalisable:
    negative weights where the law is the wider one.

    Args:
        bases: denoisers of one process and shape, called under the same condition; fix another by
            `Conditioned`.
        weights: w_i, a number for each.

    Raises:
        ValueError: for another number of weights.

    Reference: as of `EnergyDenoiser`; scores in Liu, Li, Du, Torralba, Tenenbaum, "Compositional
    Visual Generation with Composable Diffusion Models", 2022, arXiv 2206.01714.
    """

    @property
    def bounded_start(self) -> bool:
        """True: scores are added, and weights need not add up to 1."""
        return True

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        found = self._estimates(x, t, cond, key)

        def rule(*each):
            return sum(w * one for w, one in zip(self.weights, each, strict=True))

        total = combined(rule, self.process, x, t, *found)
        # The noise is a multiple of the score, and adds up as it is.
        rest = 1 - sum(self.weights)
        x0 = total.x0 + rest * x / self.process.alpha(t)
        return total.replace(x0=x0.astype(x.dtype), notes=_notes(found))

    def log_prob(self, x: Array, t: Array, cond: PyTree = None) -> Array:
        """sum_i w_i log p_i,t(x | cond), up to a constant.

        Raises:
            TypeError: for a base that does not know its density.
        """
        return self._weights() @ self._log_probs(x, t, cond)


class Mixture(_Composition):
    """The law with p_t = sum_i w_i p_i,t: D = sum_i r_i D_i, r = softmax(log w_i + log p_i,t).

    Kind 1, with several children that know their densities. It is the noised law of the mixture,
    exactly, where the densities are normalised; where each is known up to a constant, that is part
    of its weight, at every t another one.

    Args:
        bases: as of `Product`, with `log_prob`.
        weights: w_i > 0, a number for each.

    Raises:
        ValueError: for another number of weights.
        TypeError: when called, for a base that does not know its density.

    Reference: as of `EnergyDenoiser`.
    """

    def __check_init__(self):
        for weight in self.weights:
            check_number("weights", weight, above=0.0)

    def _joint(self, x: Array, t: Array, cond: PyTree) -> Array:
        return jnp.log(self._weights()) + self._log_probs(x, t, cond)

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        found = self._estimates(x, t, cond, key)
        shares = jax.nn.softmax(self._joint(x, t, cond))
        total = combined(
            lambda *each: jnp.tensordot(shares, jnp.stack(each), 1), self.process, x, t, *found
        )
        return total.replace(notes=_notes(found))

    def log_prob(self, x: Array, t: Array, cond: PyTree = None) -> Array:
        """log sum_i w_i p_i,t(x | cond), up to a constant."""
        return jax.nn.logsumexp(self._joint(x, t, cond))
