"""One adapter for every request to forget, each behind a gate, so that requests go together."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_callable, check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.conditions import as_entries
from jaxdiff.denoiser import Denoiser, DenoiserMap, Estimate
from jaxdiff.finetuning import Adapter, adapt
from jaxdiff.unlearning._shared import check_inner


class Requests(DenoiserMap):
    """A denoiser whose answer to a forgotten class is that of the adapter which forgets it.

    Kind 1: denoiser to denoiser, stateless. All other classes, and none, are the base's own, bit
    for bit: the gate is the class. What comes unasked is not forgotten. Where a batch has several
    classes all branches are computed, and one is kept.

    Args:
        base: a network's denoiser, or guidance and other maps of one.
        adapters: one for each request, in order, trained by `Apart`.
        classes: those that each is for, a tuple of integers each, no class twice.

    Raises:
        ValueError: for unequal numbers, or a class of two requests.
        TypeError: when called, without a class.

    Reference: Gao, Wang, Ding, Weng, Wang, Zhu, "On Large Language Model Continual Unlearning",
    2024, arXiv 2407.10223. There a detector of text that is out of distribution makes a soft gate;
    a class is its own.
    """

    base: Denoiser
    adapters: tuple[Adapter, ...]
    classes: tuple[tuple[int, ...], ...] = eqx.field(static=True)

    def __check_init__(self):
        for adapter in self.adapters:
            check_kind("adapters", adapter, Adapter, "finetuning.make_adapter(network, key)")
        named = [c for group in self.classes for c in group]
        if len(self.adapters) != len(self.classes) or len(set(named)) < len(named):
            raise ValueError(
                "`classes` must be those of each adapter, and no class twice, got "
                f"{len(self.adapters)} adapters and {self.classes}."
            )

    @property
    def evaluations(self) -> int | Array:
        """The base's."""
        return self.base.evaluations

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        label = as_entries(cond).get("label")
        known = label is not None and jnp.ndim(label) == 0
        if not known or not jnp.issubdtype(jnp.result_type(label), jnp.integer):
            raise TypeError(
                "`cond` must have a class, an integer, by which Requests chooses, got "
                f"{'none' if label is None else jnp.result_type(label)}."
            )
        of_class = [jnp.any(jnp.asarray(group) == label) for group in self.classes]
        which = jnp.argmax(jnp.stack([*of_class, jnp.bool_(True)]))
        models = [*(adapt(self.base, adapter) for adapter in self.adapters), self.base]
        return jax.lax.switch(which, [lambda m=m: m.estimate(x, t, cond, key=key) for m in models])


def overlap(adapter: Adapter, *earlier: Adapter) -> Array:
    """How much adapters look at the same inputs: sum over layers and others of |A^T A_i|^2.

    A are the `down` of their kernels, `(inputs, r)`. At 0 an adapter changes nothing for inputs in
    the span of another's, and inputs outside of both are none of its business: adapters are kept
    from one another, and what is kept from neither.

    Args:
        adapter: the one.
        *earlier: others; layers that both have are looked at.
    """
    found = [
        jnp.sum(jnp.einsum("...ij,...ik->...jk", low.down, other.kernels[name].down) ** 2)
        for other in earlier
        for name, low in adapter.kernels.items()
        if name in other.kernels
    ]
    return sum(found, jnp.zeros(()))


class Apart(eqx.Module):
    """A loss of forgetting, and the overlap of its adapter with those of earlier requests.

        loss + weight overlap(adapter, earlier),

    the adapter being the last of the model's network, `adapt(base, adapter)`, which alone learns:
    `Player(..., trainable=finetuning.adapter_weights)`. The earlier ones are the constant
    "earlier", a tuple; they take no part in the model.

    Args:
        loss: any `loss(model, key, batch, frozen)`, such as `Relabelled(...)`.
        weight: >= 0; the paper's 0.1.

    Raises:
        TypeError: when called, for a model without an adapter.
        ValueError: when called, without "earlier".

    Reference: as of `Requests`.
    """

    loss: Any
    weight: Number = number(0.1)

    def __check_init__(self):
        check_callable("loss", self.loss, "unlearning.Relabelled(unlearning.NextClass(10))")
        check_number("weight", self.weight, least=0.0)
        check_inner(self.loss)

    def __call__(
        self, model: Denoiser, key: PRNGKeyArray, batch: dict[str, Any], frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        """The sum; see `Player`. The overlap is logged as "overlap"."""
        adapters = getattr(getattr(model, "network", None), "adapters", ())
        if not adapters:
            raise TypeError(
                "`model` must have an adapter, finetuning.adapt(denoiser, adapter), got "
                f"{type(model).__name__} without."
            )
        if "earlier" not in frozen:
            raise ValueError(
                f"`frozen` must have the adapters of earlier requests, got {sorted(frozen)}. Pass "
                '`constants={"earlier": (...)}` to the step, () for the first.'
            )
        loss, metrics = self.loss(model, key, batch, frozen)
        earlier = jax.lax.stop_gradient(frozen["earlier"])
        shared = overlap(adapters[-1], *earlier)
        return loss + self.weight * shared, {**metrics, "overlap": jax.lax.stop_gradient(shared)}
