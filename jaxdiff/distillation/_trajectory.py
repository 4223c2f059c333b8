"""Consistency trajectory models: jumps between any two times of a teacher's trajectory."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_callable, check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.distillation._adversarial import (
    Adversarial,
    Hinge,
    critic_loss,
    critic_of,
    logits,
    student_of,
)
from jaxdiff.distillation._consistency import Pairs, teacher_step
from jaxdiff.distillation._jump import check_told, ddim_jump
from jaxdiff.distillation._shared import (
    Distance,
    Squared,
    draw_scale,
    noised,
    scale_range,
    told_scale,
)
from jaxdiff.flow_map import FlowMap
from jaxdiff.losses import Karras, LogNormal, TimeLaw, Uniform, Weighting, stratified_uniform
from jaxdiff.losses._batch import check_batch, wide
from jaxdiff.losses._frozen import still, target_of, teacher_of
from jaxdiff.predictions import F
from jaxdiff.solvers import EDMHeun
from jaxdiff.training import Frozen


class ConsistencyTrajectory(eqx.Module):
    """A student whose jumps agree, from wherever on a trajectory they start, and with denoising.

    Times of a grid t > u >= s: the teacher carries x_t to x_u by a step of `solver` for each cell
    between them, and both are carried to s by the student and on to t_min by the target,

        distance(G'(G(x_t, t, s), s, t_min), stop_gradient(G'(G(x_u, u, s), s, t_min))),

    whose gradient goes through G' into G(x_t, t, s) alone. Two terms may be added to its mean:
    `denoising` times the weighted error of the clean end that the student says for a jump of no
    length, E[x0 | x_t]; and `gan` times the loss by which a critic "critic" takes the estimate at
    t_min for real, see `TrajectoryCritic`.

    The number of cells from t to u is one for the batch, 1 to `most`, each as likely as it is
    large. One pass of the student with a gradient, over twice the batch where it denoises, and one
    without; one of the target with a gradient by its input, one without; and of the teacher the
    solver's evaluations for as many steps as there are cells.

    **Fixed point**: between any two times of the grid, the map composed of the solver's steps,
    where the first term is 0; and E[x0 | x_t] where s = t, which the first term never asks for.
    The two agree. A critic that tells the first's error from data moves it.

    Args:
        distance: of two examples at t_min; any function of two.
        grid: how the times lie.
        steps: N, of the grid; the paper's 18 are N + 1 times.
        most: the largest number of cells from t to u, up to N.
        solver: of the teacher's steps; each starts afresh.
        target: whose weights G' has: None for the student's own, the own player for its average,
            as in the paper, or another player.
        denoising: weight of the second term; None to leave it out.
        weighting: of its error, at times of `time_law` and of the grid by turns.
        time_law: likewise.
        gan: weight of the third term; None to leave it out.
        adversarial: its loss.
        scales: guidance scales of the teacher, drawn uniformly and told to the student; None for
            the teacher as it is.

    Raises:
        TypeError: when called, for a student that is no `FlowMap` with a clean end.
        ValueError: when called, for a `Jump` that is not told where to, or without a teacher or a
            critic that is asked for.

    Reference: Kim, Lai, Liao, Murata, Takida, Uesaka, He, Mitsufuji, Ermon, "Consistency Trajectory
    Models: Learning Probability Flow ODE Trajectory of Diffusion", 2023, arXiv 2310.02279. There
    the weights of the terms balance the gradients of the last layer: see `Balanced`.
    """

    distance: Distance | Any = Squared()
    grid: TimeLaw = Karras()
    steps: Number = number(17.0)
    most: Number = number(17.0)
    solver: diffrax.AbstractSolver = EDMHeun()
    target: str | None = eqx.field(static=True, default=None)
    denoising: Number | None = number(1.0)
    weighting: Weighting = Uniform(F())
    time_law: TimeLaw = LogNormal(-1.2, 1.2)
    gan: Number | None = number(None)
    adversarial: Adversarial = Hinge()
    scales: tuple[Number, Number] | None = scale_range()

    def __check_init__(self):
        check_callable("distance", self.distance, "distillation.Squared()")
        check_kind("grid", self.grid, TimeLaw, "losses.Karras()")
        check_number("steps", self.steps, least=1.0)
        check_number("most", self.most, least=1.0)
        if isinstance(self.steps, float):
            check_number("most", self.most, most=self.steps)
        check_number("denoising", self.denoising, least=0.0)
        check_kind("weighting", self.weighting, Weighting, "losses.Uniform(predictions.F())")
        check_kind("time_law", self.time_law, TimeLaw, "losses.LogNormal(-1.2, 1.2)")
        check_number("gan", self.gan, least=0.0)
        check_kind("adversarial", self.adversarial, Adversarial, "distillation.Hinge()")

    def pairs(
        self, model: FlowMap, key: PRNGKeyArray, batch: dict[str, Any]
    ) -> tuple[Pairs, Array, Array]:
        """Noisy examples of a batch at t, and where each is to go.

        Args:
            model: the student.
            key: typed key; example i draws from its fold_in with i.
            batch: as of a call.

        Returns:
            The examples, whose s is that of the jump, `(B,)`; the number n of the grid's time t,
            `(B,)`; and how many cells it is to u, a scalar.
        """
        x0, process = batch["x"], model.process
        cells_key, time_key, jump_key, example_key = jax.random.split(key, 4)
        # The inverse of i (i + 1) / (most (most + 1)), the distribution of i.
        most = jnp.floor(jnp.asarray(self.most))
        level = jax.random.uniform(cells_key) * most * (most + 1)
        cells = jnp.clip(jnp.ceil((jnp.sqrt(1 + 4 * level) - 1) / 2), 1, most)
        u, v = (stratified_uniform(k, len(x0)) for k in (time_key, jump_key))
        n = cells + jnp.floor(u * (jnp.floor(jnp.asarray(self.steps)) - cells + 1))
        t = self.time(model, n)
        s = self.time(model, jnp.floor(v * (n - cells + 1)))

        def one(i, x0, t):
            return noised(process, jax.random.fold_in(example_key, i), x0, t, self.scales)

        eps, x, scale, keys = jax.vmap(one)(jnp.arange(len(x0)), x0, t)
        return Pairs(x0, eps, x, t, s, batch.get("cond"), scale, keys), n, cells

    def time(self, model: FlowMap, n: Array) -> Array:
        """The n-th time of the grid, from t_min at 0."""
        return self.grid.quantile(model.process, n / jnp.floor(jnp.asarray(self.steps)))

    def parts(
        self, model: FlowMap, key: PRNGKeyArray, batch: dict[str, Any], frozen: Frozen
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """The terms of the loss, by name, without their weights, and metrics; as of a call."""
        check_told(model)
        check_batch(batch)
        teacher = teacher_of(frozen, model)
        target = target_of(frozen, self.target, model)
        critic = None if self.gan is None else critic_of(frozen)
        process, count = model.process, len(batch["x"])
        pair_key, teacher_key, level_key, noise_key = jax.random.split(key, 4)
        pairs, n, cells = self.pairs(model, pair_key, batch)
        told, end = pairs.told, jnp.full_like(pairs.t, process.t_min)

        def earlier(i, x):
            ends = (self.time(model, n - i).astype(pairs.t.dtype) for i in (i, i + 1))
            here = Pairs(pairs.x0, pairs.eps, x, *ends, pairs.cond, pairs.scale, pairs.keys)
            moved = teacher_step(teacher, jax.random.fold_in(teacher_key, i), here, self.solver)
            return moved.astype(x.dtype)

        x_u = jax.lax.fori_loop(0, cells.astype(jnp.int32), earlier, pairs.x)
        u = self.time(model, n - cells)

        def jump(model, x, t, s):
            def one(x, t, s, cond, key):
                return model(x, t, s, cond, key=key)

            return jax.vmap(one)(x, t, s, told, pairs.keys)

        def clean(x, t, s, cond, keys):
            def one(x, t, s, cond, key):
                return model.clean(x, t, s, cond, key=key)  # type: ignore[attr-defined]

            return jax.vmap(one)(x, t, s, cond, keys)

        found = {}
        starts = (pairs.x, pairs.t, pairs.s, told, pairs.keys)
        if self.denoising is None:
            x0_hat = clean(*starts)
        else:
            level = stratified_uniform(level_key, count)
            laws = (law.quantile(process, level) for law in (self.time_law, self.grid))
            tau = jnp.where(jnp.arange(count) % 2 == 0, *laws)

            def noised(i, x0, t):
                return process.noise(jax.random.fold_in(noise_key, i), x0, t)

            x_tau = jax.vmap(noised)(jnp.arange(count), pairs.x0, tau)
            own = jax.vmap(jax.random.fold_in, (0, None))(pairs.keys, 1)
            both = jax.tree.map(lambda *a: jnp.concatenate(a), starts, (x_tau, tau, tau, told, own))
            x0_hat, denoised = jnp.split(clean(*both), 2)
            errors = jax.vmap(lambda a, b: jnp.mean(wide(a - b) ** 2))(denoised, pairs.x0)
            weight = jax.vmap(lambda t: self.weighting(process, t, jnp.ones_like(t)))(tau)
            found["denoising"] = (weight * errors).mean()
        x_s = jax.vmap(lambda *a: ddim_jump(process, *a))(pairs.x, x0_hat, pairs.t, pairs.s)
        estimate = jump(target, x_s, pairs.s, end)
        goal = jump(target, jump(still(model), x_u, u, pairs.s), pairs.s, end)
        apart = jax.vmap(self.distance)(estimate, jax.lax.stop_gradient(goal))
        found["consistency"] = apart.mean()
        if critic is not None:
            fake = logits(critic, estimate, end, pairs.cond)
            found["adversarial"] = self.adversarial.generator(fake).mean()
        return found, {"cells": cells, **jax.lax.stop_gradient(found)}

    @property
    def weights(self) -> dict[str, Number]:
        """Of the terms, by name."""
        named = {"consistency": 1.0, "denoising": self.denoising, "adversarial": self.gan}
        return {name: weight for name, weight in named.items() if weight is not None}

    def __call__(
        self, model: FlowMap, key: PRNGKeyArray, batch: dict[str, Any], frozen: Frozen
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the student, a `Jump` that is told where to.
            key: typed key; example i draws from its fold_in with i.
            batch: `{"x": (B, *event), "cond": pytree with leading axis B}`.
            frozen: the teacher, and the critic if there is one.

        Returns:
            The scalar loss, and the number of "cells" from t to u and the terms by name.
        """
        found, metrics = self.parts(model, key, batch, frozen)
        weights = self.weights
        return sum(weights[name] * value for name, value in found.items()), metrics  # type: ignore[return-value]


class TrajectoryCritic(eqx.Module):
    """What the critic of `ConsistencyTrajectory` minimises: data at t_min, and jumps to there.

    The jumps are of noised examples, from times of the grid, all alike; the critic is told t_min of
    both. One pass of the student, and one of the critic over real and fake together.

    Args:
        loss: the student's own.
        student: name of the player that jumps.

    Raises:
        ValueError: when called, without the student.
    """

    loss: ConsistencyTrajectory
    student: str = eqx.field(static=True, default="student")

    def __check_init__(self):
        check_kind("loss", self.loss, ConsistencyTrajectory, "ConsistencyTrajectory()")

    def __call__(
        self, model: PyTree, key: PRNGKeyArray, batch: dict[str, Any], frozen: Frozen
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the critic, a callable pytree `(x, t, cond) -> logit`.
            key: typed key; example i draws from its fold_in with i.
            batch: `{"x": (B, *event), "cond": pytree with leading axis B}`.
            frozen: the student.

        Returns:
            The scalar loss, and the mean logits, `{"real": ..., "fake": ...}`.
        """
        check_batch(batch)
        x0, cond = batch["x"], batch.get("cond")
        student = student_of(frozen, self.student)
        process, count = student.process, len(x0)
        time_key, example_key = jax.random.split(key)
        steps = jnp.floor(jnp.asarray(self.loss.steps))
        n = jnp.floor(stratified_uniform(time_key, count) * steps) + 1
        t = self.loss.time(student, n)
        end = jnp.full_like(t, process.t_min)

        def one(i, x0, t, end, cond):
            keys = jax.random.split(jax.random.fold_in(example_key, i), 3)
            told = told_scale(cond, draw_scale(keys[2], self.loss.scales))
            fake = student(process.noise(keys[0], x0, t), t, end, told)
            return fake, process.noise(keys[1], x0, end)

        fake, real = jax.vmap(one)(jnp.arange(count), x0, t, end, cond)
        return critic_loss(model, self.loss.adversarial, end, (real, cond), (fake, cond))
