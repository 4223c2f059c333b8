"""Matching of distributions: what a teacher and a fake score say of a generator's examples."""

from abc import abstractmethod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._tree import Number
from jaxdiff.denoiser import Denoiser
from jaxdiff.distillation._generated import Begun, begin, finish, noise_and_times, weighted_mean
from jaxdiff.distillation._shared import (
    at_scale,
    with_gradient,
)
from jaxdiff.flow_map import FlowMap
from jaxdiff.losses import TimeLaw
from jaxdiff.losses._batch import wide
from jaxdiff.losses._frozen import said_by, teacher_of
from jaxdiff.training import Frozen


class DistributionMatching(eqx.Module):
    """Base: a generator's examples, noised, as the teacher and the fake score see them.

    A subclass defines the loss of one example. The fake score is a player "fake", the teacher a
    constant "teacher"; neither gets a gradient. One pass of the generator, one of each score.
    """

    time_law: eqx.AbstractVar[TimeLaw]
    start: eqx.AbstractVar[tuple[Number, ...] | None]
    scales: eqx.AbstractVar[tuple[Number, Number] | None]

    @abstractmethod
    def per_example(
        self,
        fake: Any,
        teacher: Denoiser,
        x0: Array,
        eps: Array,
        t: Array,
        fake_cond: PyTree = None,
        teacher_cond: PyTree = None,
    ) -> tuple[Array, Array]:
        """The loss of one example, and the mean square of what teacher and fake score differ by.

        Args:
            fake: the fake score, constant; None where a method has none.
            teacher: the teacher, constant.
            x0: what the generator made, `(*event)`; gradients of the loss go through it alone.
            eps: noise, `(*event)`.
            t: scalar time to which x0 is noised.
            fake_cond: the fake score's condition.
            teacher_cond: the teacher's, which may be another one.

        Returns:
            Two scalars; no gradient passes the second.
        """

    def fake_of(self, frozen: Frozen, model: FlowMap) -> Any:
        """The fake score; None for a method that has none."""
        return teacher_of(frozen, model, "fake")

    def __call__(
        self, model: FlowMap, key: PRNGKeyArray, batch: dict[str, Any], frozen: Frozen
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the generator, such as a `Jump`.
            key: typed key; example i draws from its fold_in with i.
            batch: `{"x": (B, *event), "cond": pytree with leading axis B}`; of x only the shape is
                looked at.
            frozen: holds the teacher and the fake score.

        Returns:
            The scalar loss, whose value may mean nothing where only its gradient is known; and
            `{"gap": mean square of what teacher and fake score differ by}`, which tells how far
            they are apart.
        """
        return self.matched(model, key, batch, frozen)

    def matched(
        self,
        model: FlowMap,
        key: PRNGKeyArray,
        batch: dict[str, Any],
        frozen: Frozen,
        *,
        teacher_cond: PyTree = None,
        weight: Array | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """The same, towards the teacher's law under other conditions.

        Args:
            model: as of a call.
            key: likewise.
            batch: likewise; its conditions are those of the generator and of the fake score.
            frozen: likewise.
            teacher_cond: the teacher's, with leading axis B; None for the batch's.
            weight: of each example, `(B,)`; None for 1.
        """
        begin_key, noise_key = jax.random.split(key)
        begun = begin(model, begin_key, batch, self.start, self.scales)
        x0 = finish(model, begun)
        noise = noise_and_times(model.process, noise_key, x0, self.time_law)
        losses, gaps = self.compared(model, noise, x0, begun, frozen, teacher_cond)
        return weighted_mean(losses, weight), {"gap": gaps.mean()}

    def compared(
        self,
        model: FlowMap,
        noise: tuple[Array, Array],
        x0: Array,
        begun: Begun,
        frozen: Frozen,
        teacher_cond: PyTree = None,
    ) -> tuple[Array, Array]:
        """Losses and gaps of a batch that the generator made, `(B,)` each.

        Args:
            model: the generator.
            noise: eps `(B, *event)` and times `(B,)`, as of `noise_and_times`.
            x0: `(B, *event)`.
            begun: where it is from.
            frozen: as of a call.
            teacher_cond: as of `matched`.
        """
        teacher, fake = teacher_of(frozen, model), self.fake_of(frozen, model)
        eps, t = noise
        teacher_cond = begun.cond if teacher_cond is None else teacher_cond

        def one(x0, eps, t, scale, fake_cond, teacher_cond):
            guided = at_scale(teacher, scale)
            return self.per_example(fake, guided, x0, eps, t, fake_cond, teacher_cond)

        return jax.vmap(one)(x0, eps, t, begun.scale, begun.told, teacher_cond)


class ScoreDifference(DistributionMatching):
    """Base: a gradient w(t) (reference - D_teacher) on the examples, through neither of both.

    The loss is `with_gradient` of it, summed over the numbers of an example.
    """

    weighting: eqx.AbstractVar[Any]

    @abstractmethod
    def reference(self, fake: Any, x0: Array, x: Array, t: Array, cond: PyTree) -> Array:
        """What the teacher's answer is compared with, `(*event)`; arguments of one example."""

    def factor(self, x0: Array, target: Array) -> Array | float:
        """A further factor of one example, given what it is and what the teacher makes of it."""
        del x0, target
        return 1.0

    def per_example(
        self,
        fake: Any,
        teacher: Denoiser,
        x0: Array,
        eps: Array,
        t: Array,
        fake_cond: PyTree = None,
        teacher_cond: PyTree = None,
    ) -> tuple[Array, Array]:
        """See `DistributionMatching`."""
        still_x0 = jax.lax.stop_gradient(x0)
        x = teacher.process.marginal(still_x0, eps, t).astype(x0.dtype)
        reference = self.reference(fake, still_x0, x, t, fake_cond)
        return self.pulled(teacher, x0, x, t, reference, teacher_cond)

    def pulled(
        self,
        teacher: Denoiser,
        x0: Array,
        x: Array,
        t: Array,
        reference: Array,
        teacher_cond: PyTree,
    ) -> tuple[Array, Array]:
        """`per_example`, given the noisy example and the reference."""
        target = said_by(teacher, x, t, teacher_cond)
        weight = self.weighting(teacher.process, t, self.time_law.density(teacher.process, t))
        difference = jax.lax.stop_gradient(wide(reference) - wide(target))
        factor = self.factor(jax.lax.stop_gradient(wide(x0)), jax.lax.stop_gradient(wide(target)))
        return with_gradient(x0, weight * factor * difference), jnp.mean(difference**2)
