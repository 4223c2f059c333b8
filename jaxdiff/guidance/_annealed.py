"""Condition-annealed sampling: noise on the condition in early steps."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, number
from jaxdiff.conditions import LABEL, as_entries, from_entries
from jaxdiff.denoiser import Denoiser, Estimate, find_network
from jaxdiff.guidance._scale import spread
from jaxdiff.stepwise import Stepwise


class ConditionAnnealed(Stepwise):
    """c -> sqrt(g) c + size sqrt(1 - g) n, g from 0 at u >= t_high to 1 at u <= t_low: variety.

    Kind 2: draws once a step. u is the `unit_time` of the process, in [0, 1]. The noisy condition
    is moved back to the mean and the standard deviation that c has over its numbers, as far as
    `mix` says. A class becomes the network's own embedding of it; the class that means none stays
    as it is. Put guidance around it, and not inside.

    Args:
        base: a conditional denoiser.
        size: of the noise, in the condition's own units.
        t_low: u below which the condition is whole.
        t_high: u above which it is noise.
        mix: 1 rescales in full, less is more various.
        entry: of the condition.

    Raises:
        TypeError: when called with a class, if there is no network inside.
        ValueError: when called, without such an entry.

    Reference: Sadat, Buhmann, Bradley, Hilliges, Weber, "CADS: Unleashing the Diversity of
    Diffusion Models through Condition-Annealed Sampling", 2023, arXiv 2310.17347, algorithm 1.
    """

    base: Denoiser
    size: Number = number(0.1)
    t_low: Number = number(0.6)
    t_high: Number = number(0.9)
    mix: Number = number(1.0)
    entry: str = eqx.field(static=True, default=LABEL)

    def __check_init__(self):
        check_number("size", self.size, least=0.0)
        check_number("t_low", self.t_low)
        check_number("t_high", self.t_high)
        check_number("mix", self.mix)

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        entries = as_entries(cond)
        if self.entry not in entries:
            raise ValueError(
                f"`cond` must have the entry {self.entry!r} for ConditionAnnealed, got "
                f"{sorted(entries) or 'no condition'}."
            )
        clean, none = entries[self.entry], jnp.zeros((), bool)
        if jnp.issubdtype(jnp.result_type(clean), jnp.integer):
            network: Any = find_network(self.base).network
            embedding = network.embedding
            none = clean == embedding.num_classes
            clean = embedding.classes(clean)
        u = self.process.unit_time(self.step.t)
        share = jnp.clip((self.t_high - u) / (self.t_high - self.t_low), 0, 1)
        noise = jax.random.normal(self.step.key, clean.shape, clean.dtype)
        noisy = jnp.sqrt(share) * clean + self.size * jnp.sqrt(1 - share) * noise
        size = spread(noisy)
        unit = (noisy - jnp.mean(noisy)) / jnp.where(size > 0, size, 1)
        moved = unit * spread(clean) + jnp.mean(clean)
        changed = self.mix * moved + (1 - self.mix) * noisy
        whole = none | (share >= 1)  # to the last digit
        entries[self.entry] = jnp.where(whole, clean, changed).astype(clean.dtype)
        return self.base.estimate(x, t, from_entries(entries), key=key)
