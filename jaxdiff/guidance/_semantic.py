"""Semantic guidance: edits of what a condition asks for, each where it matters most."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_count, check_number
from jaxdiff._tree import Number, number
from jaxdiff.conditions import as_entries, from_entries, null_where, take
from jaxdiff.denoiser import Denoiser, Estimate
from jaxdiff.guidance._scale import Scale, WithNull, check_scale, extrapolated, scale_at
from jaxdiff.stepwise import Stepwise, index_of


class SemanticGuidance(Stepwise, WithNull):
    """Classifier-free guidance, and k edits of it, each by its largest numbers alone.

    With eps of none, of the condition, and of the edits e_i,

        eps_null + scale (eps_cond - eps_null) + g,    g = sum_i w_i m_i psi_i + momentum v,
        psi_i = edit_scale (eps_i - eps_null),    v <- decay v + (1 - decay) g,

    m_i is 1 where |psi_i| reaches its quantile, over all places of a channel, and 0 elsewhere. An
    edit whose weight is positive is added, one of a negative weight taken away.

    Kind 2: remembers v, and decides by the number of the step; with data of the example: its
    condition has the entries "edits", conditions of the network with a leading axis of k, and
    "edit_weights" `(k,)`. All k + 2 evaluations run as one batch. Without quantile, momentum and
    warm-up it is `Composable`. A momentum b is, after many steps, a weight of 1 / (1 - b) on g.

    Args:
        base: a denoiser trained with label dropout.
        null_cond: as of `ClassifierFree`.
        count: k.
        scale: as of `ClassifierFree`.
        edit_scale: of all edits; 3 to 20 in the paper's code.
        quantile: share of numbers that an edit leaves alone, in [0, 1]; 0.9 to 0.99 there.
        momentum: of v.
        decay: of v.
        warm_up: the first step with edits; v is made before, too.
        cool_down: the first step without edits, whose evaluations are skipped; None for no such
            step.

    Raises:
        ValueError: when called, for a condition without edits and weights, or of another number;
            where steps have no number.

    Reference: Brack, Friedrich, Hintersdorf, Struppek, Schramowski, Kersting, "SEGA: Instructing
    Text-to-Image Models using Semantic Guidance", 2023, arXiv 2301.12247. One warm-up for all
    edits here, and weights as they are given.
    """

    base: Denoiser
    null_cond: PyTree
    count: int = eqx.field(static=True)
    scale: Scale = number(1.0)
    edit_scale: Number = number(5.0)
    quantile: Number = number(0.9)
    momentum: Number = number(0.1)
    decay: Number = number(0.4)
    warm_up: Number = number(10.0)
    cool_down: int | None = eqx.field(static=True, default=None)

    takes: ClassVar[tuple[str, ...]] = ("edits", "edit_weights")

    def __check_init__(self):
        check_count("count", self.count)
        check_scale(self.scale)
        check_number("edit_scale", self.edit_scale)
        check_number("quantile", self.quantile, least=0.0, most=1.0)
        check_number("momentum", self.momentum)
        check_number("decay", self.decay)
        check_number("warm_up", self.warm_up)
        if self.cool_down is not None:
            check_count("cool_down", self.cool_down, least=0)

    def check_cond(self, cond: PyTree) -> None:
        """See `Denoiser`: every edit, the condition, and none."""
        super().check_cond(cond)
        entries = as_entries(cond)
        edits = as_entries(entries.get("edits"))
        super().check_cond(from_entries({**entries, **edits}))

    @property
    def evaluations(self) -> Array | int:
        """Those of the base for each edit, the condition and none; or for these two."""
        every = (self.count + 2) * self.base.evaluations
        if self.bound is None or self.cool_down is None:
            return every
        return jnp.where(index_of(self) < self.cool_down, every, 2 * self.base.evaluations)

    @property
    def needs_signal(self) -> bool:
        """True: v is kept in the noise, and x0 moves by it over alpha."""
        return True

    def init_memory(self, x: Array) -> Array:
        """v: nothing."""
        return jnp.zeros_like(x)

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`; a learned variance, and what maps remember, are the condition's."""
        edits, weights, rest = take(cond, "edits", "edit_weights", by="SemanticGuidance")
        sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves((edits, weights))}
        if sizes != {(self.count,)}:
            raise ValueError(
                f"`edits` and `edit_weights` of an example must have a leading axis of `count`, "
                f"{self.count}, got {sorted(sizes)}."
            )
        scale = scale_at(self.scale, self.process, t)
        # eps_null - eps_i over D_i - D_null.
        ratio = self.process.alpha(t) / self.process.sigma(t)
        before = self.step.memory

        def edited():
            none, given, others = self._every(x, t, rest, edits, key)
            apart = -self.edit_scale * ratio * (others - none.x0)
            kept = jnp.where(self._largest(apart), apart, 0)
            push = jnp.tensordot(weights.astype(x.dtype), kept, 1) + self.momentum * before
            after = self.decay * before + (1 - self.decay) * push
            shown = jnp.where(index_of(self) >= self.warm_up, push, 0) / ratio
            found = extrapolated(scale, self.process, x, t, given, none)
            return found.moved(self.process, t, found.x0 - shown), after.astype(x.dtype)

        def plain():
            given, none = self.both(x, t, rest, key)
            return extrapolated(scale, self.process, x, t, given, none), before

        if self.cool_down is None:
            return self.remember(*edited())
        return self.remember(*jax.lax.cond(index_of(self) < self.cool_down, edited, plain))

    def _every(
        self, x: Array, t: Array, rest: PyTree, edits: PyTree, key: PRNGKeyArray | None
    ) -> tuple[Estimate, Estimate, Array]:
        """The estimates of none and of the condition, and x0 of every edit, by one batch."""
        changed, entries = as_entries(edits), as_entries(rest)
        *values, _ = take(rest, *changed, by="SemanticGuidance")
        own = dict(zip(changed, values, strict=True))
        # The condition twice, replaced by none the first time.
        rows = jax.tree.map(lambda c, e: jnp.concatenate([c[None], c[None], e]), own, changed)

        def one(row, null):
            whole = from_entries({**entries, **row})
            return self.base.estimate(x, t, null_where(null, whole, self.null_cond), key=key)

        found = jax.vmap(one)(rows, jnp.arange(self.count + 2) == 0)
        none, given = (jax.tree.map(lambda leaf, i=i: leaf[i], found) for i in (0, 1))
        return none, given, found.x0[2:]

    def _largest(self, apart: Array) -> Array:
        """Where an edit `(k, *event)` reaches its quantile, over the places of each channel."""
        size = jnp.abs(apart).astype(jnp.promote_types(apart.dtype, jnp.float32))
        channels = apart.shape[-1] if apart.ndim > 2 else 1
        flat = size.reshape(len(apart), -1, channels)
        limit = jnp.quantile(flat, self.quantile, axis=1, keepdims=True)
        # Programs may compute a number twice, and round it differently.
        return (flat >= (1 - 1e-6) * limit).reshape(apart.shape)
