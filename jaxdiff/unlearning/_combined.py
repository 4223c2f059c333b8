"""Two losses of one model: their sum, or one that gives way to the other."""

from abc import abstractmethod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_callable, check_number
from jaxdiff._tree import Number, number
from jaxdiff.losses._batch import wide
from jaxdiff.unlearning._shared import check_inner


class Both(eqx.Module):
    """The loss of what is forgotten, and that of what is kept.

        forget + weight retain

    Args:
        forget: any `loss(model, key, batch, frozen)`, such as `Relabelled(...)`.
        retain: likewise, such as `losses.DenoisingLoss()`, which looks at the kept examples.
        weight: factor on `retain`.
    """

    forget: Any
    retain: Any
    weight: Number = number(1.0)

    def __check_init__(self):
        check_callable("forget", self.forget, "unlearning.Relabelled(unlearning.NextClass(10))")
        check_callable("retain", self.retain, "losses.DenoisingLoss()")
        check_number("weight", self.weight)
        check_inner(self.forget, self.retain)

    def __call__(
        self, model: PyTree, key: PRNGKeyArray, batch: dict[str, Any], frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        """The sum; both parts as "forget" and "retain"."""
        forget_key, retain_key = jax.random.split(key)
        forget, _ = self.forget(model, forget_key, batch, frozen)
        retain, _ = self.retain(model, retain_key, batch, frozen)
        parts = {"forget": forget, "retain": retain}
        return forget + self.weight * retain, jax.lax.stop_gradient(parts)


def _dot(a: PyTree, b: PyTree) -> Array:
    products = jax.tree.map(
        lambda x, y: (
            jnp.vdot(x.astype(jnp.float32), y.astype(jnp.float32))
            if x.dtype != jnp.float64
            else jnp.vdot(x, y)
        ),
        a,
        b,
    )
    return sum(jax.tree.leaves(products), jnp.zeros(()))


class _TwoGradients(Both):
    """Base: the gradients of both, and a rule for what becomes of them."""

    @abstractmethod
    def combine(self, forget: PyTree, retain: PyTree) -> PyTree:
        """The gradient of an update, of those of both losses, models with gradients for weights."""

    def gradient(
        self, model: PyTree, key: PRNGKeyArray, batch: dict[str, Any], frozen: Any
    ) -> tuple[tuple[Array, dict[str, Array]], PyTree]:
        """The values as of a call, and the gradient by the rule."""
        found, gradients = self.gradients(model, key, batch, frozen)
        return found, self.combine(*gradients)

    def gradients(
        self, model: PyTree, key: PRNGKeyArray, batch: dict[str, Any], frozen: Any
    ) -> tuple[tuple[Array, dict[str, Array]], tuple[PyTree, PyTree]]:
        """See `Player`: the values as of a call, and both gradients."""
        forget_key, retain_key = jax.random.split(key)

        def of(loss, key):
            return eqx.filter_value_and_grad(loss, has_aux=True)(model, key, batch, frozen)

        (forget, _), g_forget = of(self.forget, forget_key)
        (retain, _), g_retain = of(self.retain, retain_key)
        parts = {"forget": forget, "retain": retain}
        return (forget + self.weight * retain, parts), (g_forget, g_retain)


class EraseDiff(_TwoGradients):
    """Descend on what is kept, as far as what is forgotten is descended on, too.

        g = weight g_r + lambda g_f,    lambda = max(0, rate - weight <g_r, g_f> / |g_f|^2),

    so that <g, g_f> >= rate |g_f|^2: every step lowers the loss of forgetting at that rate at
    least, and beyond it follows the loss of what is kept alone. Two gradients, of one pass each.

    **Fixed point**: g_f = 0 first, and the least loss of what is kept among those: forgetting wins.
    Along the level sets of forgetting it follows g_r, so that steps of a finite length stay off by
    a distance that falls with the rate. With a constant lambda it would be a weighted sum, which
    `Both` is.

    Args:
        forget: loss of what is forgotten, such as `Relabelled(AnyOf(kept))`.
        retain: loss of what is kept.
        weight: factor on its gradient.
        rate: eta > 0.

    Reference: Wu, Le, Hayat, Harandi, "Erasing Undesirable Influence in Diffusion Models", 2024,
    arXiv 2401.05779, algorithm 1. There the loss of forgetting is the excess over its value a few
    steps of descent further on, which is a constant of the gradient and changes no update; its
    released code has a constant lambda, or one by a cosine that guarantees nothing.
    """

    rate: Number = number(0.1)

    def __check_init__(self):
        check_number("rate", self.rate, above=0.0)

    def combine(self, forget: PyTree, retain: PyTree) -> PyTree:
        """See above."""
        square = _dot(forget, forget)
        along = self.weight * _dot(retain, forget) / jnp.where(square > 0, square, 1)
        share = jnp.maximum(0, self.rate - along)
        return jax.tree.map(
            lambda f, r: (self.weight * r + share * f).astype(f.dtype), forget, retain
        )


class GradientSurgery(_TwoGradients):
    """The sum of both gradients, the one of forgetting without what opposes the other.

        g = weight g_r + g_f - min(0, <g_f, g_r>) / |g_r|^2 g_r,

    in each array of weights by itself. Afterwards no array's part of forgetting is against keeping:
    <g_f, g_r> >= 0, and 0 where it was below. Two gradients, of one pass each.

    Args:
        forget: loss of what is forgotten.
        retain: loss of what is kept.
        weight: factor on its gradient.

    Reference: Wu, Zhou, Yang, Wang, Chang, Zhu, Hu, Zhou, Yang, "Unlearning Concepts in Diffusion
    Model via Concept Domain Correction and Concept Preserving Gradient", 2024, arXiv 2405.15304.
    Its released code takes the cosine's part of a unit vector off a gradient that is none; here it
    is the projection.
    """

    def combine(self, forget: PyTree, retain: PyTree) -> PyTree:
        """See above."""

        def projected(f, r):
            inner, square = jnp.vdot(wide(f), wide(r)), jnp.vdot(wide(r), wide(r))
            opposed = jnp.minimum(inner, 0) / jnp.where(square > 0, square, 1)
            return (self.weight * r + f - opposed * r).astype(f.dtype)

        return jax.tree.map(projected, forget, retain)
