"""Terms of a loss, weighted so that their gradients are alike."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_callable, check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.distillation._trajectory import ConsistencyTrajectory
from jaxdiff.flow_map import FlowMap
from jaxdiff.losses._batch import wide
from jaxdiff.training import Frozen


def _network(model: Any) -> Any:
    return model.network


class Balanced(eqx.Module):
    """A loss of several terms, weighted so that their gradients by some weights are alike.

        gradient of sum_i c_i w_i L_i,    c_i = |dL_0 / dlast| / (|dL_i / dlast| + 1e-4), c_0 = 1

    with L_0 the term "consistency", c_i a constant in [least, most], and `last` the weights that
    are looked at, a network's last layer usually. One backward pass for every term. Fixed points of
    the terms together are kept, as those of any weights above 0.

    Args:
        loss: with `parts` and `weights`, as `ConsistencyTrajectory` has.
        last: `model -> subtree`.
        least: >= 0; 0.01 in the paper for a critic.
        most: 10 in the paper for a critic, 10^4 otherwise.

    Reference: Kim et al., "Consistency Trajectory Models: Learning Probability Flow ODE Trajectory
    of Diffusion", 2023, arXiv 2310.02279, after Esser, Rombach, Ommer, "Taming Transformers for
    High-Resolution Image Synthesis", 2020, arXiv 2012.09841, equation 7.
    """

    loss: ConsistencyTrajectory
    last: Callable[[PyTree], PyTree] = eqx.field(static=True, default=_network)
    least: Number = number(0.01)
    most: Number = number(10.0)

    def __check_init__(self):
        check_kind("loss", self.loss, ConsistencyTrajectory, "ConsistencyTrajectory()")
        check_callable("last", self.last, "lambda m: m.network.last")
        check_number("least", self.least, least=0.0)
        if isinstance(self.least, float):
            check_number("most", self.most, least=self.least)

    def __call__(
        self, model: FlowMap, key: PRNGKeyArray, batch: dict[str, Any], frozen: Frozen
    ) -> tuple[Array, dict[str, Array]]:
        """The loss with its own weights, without a balance; arguments as of the loss."""
        return self.loss(model, key, batch, frozen)

    def gradient(
        self, model: FlowMap, key: PRNGKeyArray, batch: dict[str, Any], frozen: Frozen
    ) -> tuple[tuple[Array, dict[str, Array]], PyTree]:
        """The balanced loss and metrics, and its gradient; see `training.Player`."""
        moves, rest = eqx.partition(model, eqx.is_inexact_array)

        def parts(moves):
            return self.loss.parts(eqx.combine(moves, rest), key, batch, frozen)

        found, pull, metrics = jax.vjp(parts, moves, has_aux=True)
        zeros, weights = jax.tree.map(jnp.zeros_like, found), self.loss.weights
        slopes = {name: pull({**zeros, name: jnp.ones_like(found[name])})[0] for name in found}

        def size(slope):
            leaves = jax.tree.leaves(eqx.filter(self.last(slope), eqx.is_inexact_array))
            return jnp.sqrt(sum(jnp.sum(wide(leaf) ** 2) for leaf in leaves))

        first = size(slopes["consistency"])
        total, gradient = found["consistency"], slopes["consistency"]
        for name in [name for name in found if name != "consistency"]:
            balance = jnp.clip(first / (size(slopes[name]) + 1e-4), self.least, self.most)
            factor = weights[name] * balance
            total = total + factor * found[name]
            gradient = jax.tree.map(
                lambda a, b, c=factor: a + (c * b).astype(a.dtype), gradient, slopes[name]
            )
            metrics = {**metrics, f"{name}_balance": balance}
        return (total, metrics), gradient
