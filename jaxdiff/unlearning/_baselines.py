"""Plain baselines: ascent, the opposite of a task's vector, flight from what was learned."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_callable, check_number
from jaxdiff._tree import Number, number
from jaxdiff.losses import DenoisingLoss
from jaxdiff.unlearning._shared import check_inner, forget_of


class GradientAscent(eqx.Module):
    """The loss of what is forgotten, climbed up to a bound.

        -min(loss, bound)

    A denoising loss has no greatest value: without a bound weights grow without end. Beyond it
    there is no gradient. It has no target, and knows no difference between forgetting and breaking.

    Args:
        loss: any loss, of the examples of `batch["forget"]`.
        bound: where climbing ends; 1 is the denoising loss of noise of a network that says 0.

    Reference: Golatkar, Achille, Soatto, "Eternal Sunshine of the Spotless Net", 2019, arXiv
    1911.04933, and many since; the bound is ours.
    """

    loss: Any = DenoisingLoss()
    bound: Number = number(1.0)

    def __check_init__(self):
        check_callable("loss", self.loss, "losses.DenoisingLoss()")
        check_inner(self.loss)
        check_number("bound", self.bound)

    def __call__(
        self, model: PyTree, key: PRNGKeyArray, batch: dict[str, Any], frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        """The negative loss; the loss itself as "climbed"."""
        value, _ = self.loss(model, key, forget_of(batch), frozen)
        return -jnp.minimum(value, self.bound), {"climbed": jax.lax.stop_gradient(value)}


def weights_of(model: PyTree) -> PyTree:
    """The arrays of a model's network; of what has none, its own."""
    return eqx.filter(getattr(model, "network", model), eqx.is_inexact_array)


def negate_task(base: PyTree, tuned: PyTree, scale: Number = 1.0) -> PyTree:
    """The base, moved away from what tuning on the forgotten examples made of it.

        base - scale (tuned - base)

    Args:
        base: a model.
        tuned: the same, fine-tuned on what is to be forgotten.
        scale: 0 is the base, -1 the tuned one.

    Returns:
        A model of the base's dtypes.

    Reference: Ilharco, Ribeiro, Wortsman, Gururangan, Schmidt, Hajishirzi, Farhadi, "Editing
    Models with Task Arithmetic", 2022, arXiv 2212.04089, section 3.
    """
    check_number("scale", scale)

    def move(a, b):
        return (a - scale * (b - a)).astype(a.dtype) if eqx.is_inexact_array(a) else a

    return jax.tree.map(move, base, tuned)


class Repulsion(eqx.Module):
    """What is kept is learned, away from the weights of a model that was adapted to the forgotten.

        loss + gamma exp(-u),    u = |theta - theta_N|^2 / V,  V the number of weights times width^2

    theta_N the constant "adapted", a model of the same kind that was tuned on the forgotten
    examples. The term's gradient, -gamma (2 / V) exp(-u) (theta - theta_N), points away from
    theta_N everywhere and vanishes far off, unlike -u, which has no end.

    Args:
        loss: of what is kept.
        gamma: factor on the term, >= 0.
        width: the root mean square distance of weights at which it has fallen by e.

    Raises:
        ValueError: when called, without "adapted".

    Reference: Tiwary, Guha, Panda, P, "Adapt then Unlearn: Exploring Parameter Space Semantics for
    Unlearning in Generative Adversarial Networks", 2023, arXiv 2309.14054, their
    exponential form; for a generator there, with V its distance at the start.
    """

    loss: Any = DenoisingLoss()
    gamma: Number = number(1.0)
    width: Number = number(0.01)

    def __check_init__(self):
        check_callable("loss", self.loss, "losses.DenoisingLoss()")
        check_inner(self.loss)
        check_number("gamma", self.gamma, least=0.0)
        check_number("width", self.width, above=0.0)

    def __call__(
        self, model: PyTree, key: PRNGKeyArray, batch: dict[str, Any], frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        """The sum; u as "distance"."""
        if "adapted" not in frozen:
            raise ValueError(
                "`frozen` must have the model that was tuned on what is forgotten as 'adapted', "
                f"got {sorted(frozen)}. Pass `constants={{'adapted': model}}` to the step."
            )
        value, metrics = self.loss(model, key, batch, frozen)
        distance = quadratic(
            weights_of(model), jax.lax.stop_gradient(weights_of(frozen["adapted"]))
        )
        count = sum(leaf.size for leaf in jax.tree.leaves(weights_of(model)))
        u = distance / (count * self.width**2)
        metrics = {**metrics, "distance": jax.lax.stop_gradient(u)}
        return value + self.gamma * jnp.exp(-u), metrics


def quadratic(weights: PyTree, other: PyTree, factors: PyTree = None) -> Array:
    """sum of factors (theta - theta')^2 over arrays, a scalar in float32 at least."""

    def term(a, b, f=1.0):
        wide = jnp.promote_types(a.dtype, jnp.float32)
        return jnp.sum(f * (a.astype(wide) - b.astype(wide)) ** 2)

    trees = (weights, other) if factors is None else (weights, other, factors)
    return sum(jax.tree.leaves(jax.tree.map(term, *trees)), jnp.zeros(()))
