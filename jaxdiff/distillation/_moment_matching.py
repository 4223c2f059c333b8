"""Multistep moment matching: a few-step student with the teacher's conditional means."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_callable, check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.denoiser import Denoiser, check_denoiser
from jaxdiff.distillation._generated import generator_of
from jaxdiff.distillation._shared import (
    check_flow_map,
    with_gradient,
)
from jaxdiff.flow_map import FlowMap
from jaxdiff.losses import TimeLaw, Uniform, UniformTime, Weighting, stratified_uniform
from jaxdiff.losses._batch import check_batch, time_dtype, wide
from jaxdiff.losses._frozen import said_by, teacher_of
from jaxdiff.predictions import X0
from jaxdiff.training import Frozen


class Bridged(eqx.Module):
    """What a student makes of noised data, and a state on the way to it.

    Attributes:
        x0: model(z_t, t, 0), `(B, *event)`.
        z: z_s ~ q(z_s | z_t, x0), `(B, *event)`, which no gradient passes.
        s: `(B,)`.
        cond: conditions.
    """

    x0: Array
    z: Array
    s: Array
    cond: PyTree


def bridge(
    model: FlowMap, z: Array, eps: Array, t: Array, s: Array, cond: PyTree = None
) -> tuple[Array, Array]:
    """What a student makes of one example, and q(z_s | z_t, x0) of it, which no gradient passes.

    Args:
        model: the student.
        z: z_t, `(*event)`.
        eps: noise, `(*event)`.
        t: scalar time of z.
        s: scalar time to go to, s <= t.
        cond: its condition.
    """
    process = model.process
    x0 = model(z, t, jnp.zeros_like(t), cond)
    made = jax.lax.stop_gradient(x0)
    mean, _ = process.posterior(made, (z - process.alpha(t) * made) / process.sigma(t), t, s)
    # The posterior's own deviation, in a form that is safe where s is next to t.
    std = process.added_std(s, t) * process.sigma(s) / process.sigma(t)
    return x0, jax.lax.stop_gradient(mean + std * eps).astype(z.dtype)


class _Bridge(eqx.Module):
    """Base: how a batch is noised, denoised by the student, and noised again, less."""

    steps: eqx.AbstractVar[Number]
    weighting: eqx.AbstractVar[Any]
    time_law: eqx.AbstractVar[TimeLaw]

    def __check_init__(self):
        check_number("steps", self.steps, least=1.0)
        check_callable("weighting", self.weighting, "losses.Uniform(predictions.X0())")
        check_kind("time_law", self.time_law, TimeLaw, "losses.UniformTime()")

    def bridged(self, model: FlowMap, key: PRNGKeyArray, batch: dict[str, Any]) -> Bridged:
        """One pass of the student.

        Args:
            model: the student.
            key: typed key; example i draws from its fold_in with i.
            batch: data, `{"x": (B, *event), "cond": ...}`.
        """
        check_batch(batch)
        x, process = batch["x"], model.process
        time_key, example_key = jax.random.split(key)

        def one(i, u, x, cond):
            keys = jax.random.split(jax.random.fold_in(example_key, i), 3)
            v = jnp.minimum(u + jax.random.uniform(keys[0]) / self.steps, 1)
            s, t = (
                self.time_law.quantile(process, level).astype(time_dtype(x)) for level in (u, v)
            )
            z = process.noise(keys[1], x, t)
            fresh = jax.random.normal(keys[2], x.shape, x.dtype)
            return *bridge(model, z, fresh, t, s, cond), s

        u = stratified_uniform(time_key, len(x))
        x0, z, s = jax.vmap(one)(jnp.arange(len(x)), u, x, batch.get("cond"))
        return Bridged(x0, z, s, batch.get("cond"))

    def weight(self, process: Any, s: Array) -> Array:
        """w(s)."""
        return self.weighting(process, s, self.time_law.density(process, s))


class MultistepMomentMatching(_Bridge):
    """A gradient w(s) (D_fake(z_s) - D_teacher(z_s)) on x~ = model(z_t, t, 0).

    z_t are noised data, z_s a draw of q(z_s | z_t, x~), s < t: what ancestral sampling with the
    student goes on from, after t. The fake score learns E[x~ | z_s], together with the teacher, by
    `MomentMatchingAuxiliary` as a player "fake". One pass of the student, one of the fake score,
    one of the teacher.

    **Fixed point**: E[x~ | z_s] = D_teacher(z_s) for every s. The best auxiliary denoiser is half
    of either, so this is half the gradient of |E[x~ | z_s] - D_teacher(z_s)|^2 / 2 by x~, with the
    same zero. Sample the denoiser of a `Jump` by `solvers.Ancestral`, in that many steps.

    Args:
        steps: k, of the student: v - u is uniform on [0, 1 / k], with u and v the levels of s and t
            in the time law, v at most 1.
        weighting: w(s), a factor in x0.
        time_law: of s.

    Raises:
        TypeError: when called, for a student that is no `FlowMap`.
        ValueError: when called, without a "teacher" or a "fake", or of another process.

    Reference: Salimans, Mensink, Heek, Hoogeboom, "Multistep Distillation of Diffusion Models via
    Moment Matching", 2024, arXiv 2406.04103; the variant with alternating optimisation.
    """

    steps: Number = number(8.0)
    weighting: Weighting = Uniform(X0())
    time_law: TimeLaw = UniformTime()

    def __call__(
        self, model: FlowMap, key: PRNGKeyArray, batch: dict[str, Any], frozen: Frozen
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch, whose value means nothing.

        Args:
            model: the student.
            key: typed key; example i draws from its fold_in with i.
            batch: `{"x": (B, *event), "cond": pytree with leading axis B}`.
            frozen: holds the teacher and the auxiliary denoiser.

        Returns:
            The scalar loss, and `{"gap": mean square of what teacher and auxiliary differ by}`.
        """
        check_flow_map(model)
        teacher, fake = teacher_of(frozen, model), teacher_of(frozen, model, "fake")

        def one(x0, z, s, cond):
            difference = wide(fake(z, s, cond)) - wide(said_by(teacher, z, s, cond))
            return with_gradient(x0, self.weight(model.process, s) * difference), jnp.mean(
                jax.lax.stop_gradient(difference) ** 2
            )

        made = self.bridged(model, key, batch)
        losses, gaps = jax.vmap(one)(made.x0, made.z, made.s, made.cond)
        return losses.mean(), {"gap": gaps.mean()}


class MomentMatchingAuxiliary(_Bridge):
    """w(s) (|x~ - D(z_s)|^2 + |D_teacher(z_s) - D(z_s)|^2), mean over the numbers of an example.

    What the auxiliary denoiser of `MultistepMomentMatching` minimises; x~ and z_s as there, with
    the student's weights as they are. The second term holds it to the teacher. One pass of the
    student, one of the teacher, one of the auxiliary denoiser.

    **Fixed point**: (E[x~ | z_s] + D_teacher(z_s)) / 2.

    Args:
        steps: as of `MultistepMomentMatching`, and the same.
        weighting: likewise.
        time_law: likewise.

    Raises:
        ValueError: when called, without a "teacher" or a player "generator".
        TypeError: when called, for a generator that is no `FlowMap`.

    Reference: as of `MultistepMomentMatching`.
    """

    steps: Number = number(8.0)
    weighting: Weighting = Uniform(X0())
    time_law: TimeLaw = UniformTime()

    def __call__(
        self, model: Denoiser, key: PRNGKeyArray, batch: dict[str, Any], frozen: Frozen
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the auxiliary denoiser.
            key: typed key; example i draws from its fold_in with i.
            batch: `{"x": (B, *event), "cond": pytree with leading axis B}`.
            frozen: holds the teacher and the generator.

        Returns:
            The scalar loss, and `{"x0_mse": mean |x~ - D(z_s)|^2}`.
        """
        check_denoiser(model)
        teacher, generator = teacher_of(frozen, model), generator_of(frozen, model)

        def one(x0, z, s, cond):
            own, target = wide(model(z, s, cond)), wide(said_by(teacher, z, s, cond))
            error = jnp.mean((wide(x0) - own) ** 2)
            loss = error + jnp.mean((jax.lax.stop_gradient(target) - own) ** 2)
            return self.weight(model.process, s) * loss, error

        made = self.bridged(generator, key, batch)
        losses, errors = jax.vmap(one)(made.x0, made.z, made.s, made.cond)
        return losses.mean(), {"x0_mse": errors.mean()}
