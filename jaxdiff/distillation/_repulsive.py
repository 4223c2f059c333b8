"""Repulsive score distillation: particles that seek modes, and keep away from one another."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jaxdiff._checks import check_callable, check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.distillation._generated import begin, finish, noise_and_times
from jaxdiff.distillation._score_distillation import SDS
from jaxdiff.distillation._shared import (
    with_gradient,
)
from jaxdiff.flow_map import FlowMap
from jaxdiff.losses._batch import wide
from jaxdiff.losses._frozen import still
from jaxdiff.metrics._kernels import squared_distances
from jaxdiff.training import Frozen


class Repulsive(eqx.Module):
    """`SDS` of the N examples of a batch, and a gradient -gamma sigma_t R_i that parts them.

        R_i = J_i^T sum_(j != i) (2/h) k_ij (f_i - f_j) / sum_(j != i) k_ij,
        k_ij = exp(-|f_i - f_j|^2 / h),    h = median |f_i - f_j|^2 / log N

    of their features f_i with derivatives J_i, a step of descent along which moves f_i away from
    the others. The batch is one population: its examples should have one condition. As `SDS`, one
    pass of the generator and one of the teacher, and one of the features.

    **Fixed point**: no law, but particles about the modes, where pull and repulsion are one. With
    gamma = 0 it is `SDS`, bit for bit.

    Trap: with log(N - 1) in place of log N, two particles have an infinite h and no repulsion.

    Args:
        gamma: strength of the repulsion, >= 0.
        features: of one example, `(*event)` to an array, a pytree of constant weights; None for the
            example itself.
        sds: the pull.

    Raises:
        TypeError: when called, for a generator that is no `FlowMap`.
        ValueError: when called, for fewer than two examples, and as `SDS`.

    Reference: Zilberstein, Mardani, Segarra, "Repulsive Latent Score Distillation for Solving
    Inverse Problems", 2024, arXiv 2406.16683; without its measurements.
    """

    gamma: Number = number(1.0)
    features: Callable[[Array], Array] | None = None
    sds: SDS = SDS()

    def __check_init__(self):
        check_number("gamma", self.gamma, least=0.0)
        check_kind("sds", self.sds, SDS, "distillation.SDS()")
        if self.features is not None:
            check_callable("features", self.features, "jax.tree_util.Partial(features, weights)")

    def repulsion(self, f: Array) -> Array:
        """sum_(j != i) (2/h) k_ij (f_i - f_j) / sum_(j != i) k_ij of features `(N, d)`, N >= 2."""
        count = len(f)
        others = ~jnp.eye(count, dtype=bool)
        squares = squared_distances(f, f)
        h = jnp.median(squares[jnp.triu_indices(count, 1)]) / jnp.log(count)
        h = jnp.where(h > 0, h, 1)
        shares = jax.nn.softmax(jnp.where(others, -squares / h, -jnp.inf), axis=1)
        return 2 / h * (f - shares @ f)

    def __call__(
        self, model: FlowMap, key: PRNGKeyArray, batch: dict[str, Any], frozen: Frozen
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch, whose value means nothing.

        Args:
            model: the generator.
            key: typed key; example i draws from its fold_in with i.
            batch: `{"x": (N, *event), "cond": ...}`, of whose x only the shape is looked at.
            frozen: holds the teacher.

        Returns:
            The scalar loss, and `{"gap": as of `SDS`, "repulsion": mean |R_i|^2 of features}`.
        """
        begin_key, noise_key = jax.random.split(key)
        begun = begin(model, begin_key, batch, self.sds.start, self.sds.scales)
        if len(begun.t) < 2:
            raise ValueError("A population must have two examples at least, got a batch of one.")
        x0 = finish(model, begun)
        noise = noise_and_times(model.process, noise_key, x0, self.sds.time_law)
        losses, gaps = self.sds.compared(model, noise, x0, begun, frozen)
        look = (lambda x: x) if self.features is None else still(self.features)
        f = wide(jax.vmap(lambda x: jnp.ravel(look(x)))(x0))
        apart = self.repulsion(jax.lax.stop_gradient(f))
        slopes = -self.gamma * model.process.sigma(noise[1])[:, None] * apart
        pushes = jax.vmap(with_gradient)(f, slopes)
        metrics = {"gap": gaps.mean(), "repulsion": jnp.mean(jnp.sum(apart**2, axis=1))}
        return losses.mean() + pushes.mean(), metrics
