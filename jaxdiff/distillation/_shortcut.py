"""Shortcut models: a student whose step is two of its own steps of half the length."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_count, check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.conditions import null_where
from jaxdiff.distillation._jump import check_told, ddim_jump
from jaxdiff.distillation._mean_flow import mean_velocity, straightened
from jaxdiff.distillation._shared import (
    noised,
)
from jaxdiff.flow_map import FlowMap
from jaxdiff.losses import TimeLaw, UniformTime, stratified_uniform
from jaxdiff.losses._batch import check_batch, drop_cond, wide
from jaxdiff.losses._frozen import said_by, target_of, teacher_of
from jaxdiff.training import Frozen


class Shortcut(eqx.Module):
    """A student of steps over 1, 2, 4, ... cells of a grid, each made of the two shorter ones.

        mean of |u(x_t, t, s) - stop_gradient(goal)|^2,    u = `mean_velocity`,

    where for one example in `one_in`, t to s is 2, 4, ... N cells of the grid, all lengths alike,
    and the goal is the mean velocity to where two jumps of the target get, to the middle and on;
    and for the others t to s is a single cell, and the goal the example's velocity eps - x0: flow
    matching. The student is told s. One pass of it over the whole batch, and two of the target
    without a gradient over the examples that bootstrap.

    **Fixed point**: over n cells, the map composed of n steps of DDIM, of the exact denoiser of
    the data or of the teacher: off the flow map by O(1/N) over any length. At it the bootstrapping
    part is 0, and with a teacher the other one, too. The exact flow map makes the bootstrapping
    part 0 as well; what a single cell is decides.

    With `null_cond`, jumps over a single cell inside of a goal are guided, and everything longer
    has the guided flow map for its fixed point; steps over one cell remain as they are, so that a
    sampler of N steps guides itself. The two passes of the target are then over twice as many.

    Sample with `FlowMapSteps` and `times = grid.quantile(process, jnp.linspace(1, 0, n + 1))`, n
    a power of 2 up to N.

    Args:
        grid: how the times lie; uniform in the paper.
        steps: N, a power of 2.
        one_in: the share of the batch that bootstraps, one in so many.
        target: whose weights the jumps of a goal have: None for the student's own, the own player
            for its average, as in the paper, or another player.
        teacher: name of a denoiser in `frozen`, whose velocity takes the place of eps - x0, a
            distillation; one pass of it. None for data.
        null_cond: the condition that means "none", of the network's entries; None for no guidance.
        label_dropout: probability with which the condition of an example that does not bootstrap
            is replaced by `null_cond`.
        scale: of guidance.

    Raises:
        TypeError: when called, for a student that is no `FlowMap` with a clean end.
        ValueError: for steps that are no power of 2, or guidance beside a teacher; when called,
            for a `Jump` that is not told where to, or a batch smaller than `one_in`.

    Reference: Frans, Hafner, Levine, Abbeel, "One Step Diffusion via Shortcut Models", 2024, arXiv
    2410.12557, algorithm 1. There the network is told the length of the step, and goals are
    clipped; other processes than `RectifiedFlow` are seen as one, see `straightened`.
    """

    grid: TimeLaw = UniformTime()
    steps: int = eqx.field(static=True, default=128)
    one_in: int = eqx.field(static=True, default=4)
    target: str | None = eqx.field(static=True, default=None)
    teacher: str | None = eqx.field(static=True, default=None)
    null_cond: PyTree = None
    label_dropout: Number = number(0.1)
    scale: Number = number(1.5)

    def __check_init__(self):
        check_kind("grid", self.grid, TimeLaw, "losses.UniformTime()")
        check_count("one_in", self.one_in)
        check_number("label_dropout", self.label_dropout, least=0.0, most=1.0)
        check_number("scale", self.scale)
        check_count("steps", self.steps)
        if self.steps < 2 or self.steps & (self.steps - 1):
            raise ValueError(f"`steps` must be a power of 2, 2 or more, got {self.steps}.")
        if self.teacher is not None and self.null_cond is not None:
            raise ValueError(
                f"`null_cond` is of guidance without a teacher, got {self.null_cond!r} beside the "
                f"teacher {self.teacher!r}. Guide the teacher: guidance.ClassifierFree(...)."
            )

    def goal(
        self,
        target: FlowMap,
        x: Array,
        times: Array,
        cond: PyTree = None,
        *,
        single: Array | bool = False,
        key: PRNGKeyArray | None = None,
    ) -> Array:
        """The mean velocity, of one example, to where two jumps get.

        Args:
            target: who jumps.
            x: `(*event)`.
            times: where from, by way of, and where to, `(3,)`.
            cond: its condition.
            single: whether each jump is over a single cell, and guided, if there is guidance.
            key: of the network's own randomness.

        Returns:
            (y_t - y_s) / (tau_t - tau_s), `(*event)`, see `straightened`.
        """

        def jump(x, t, s):
            if self.null_cond is None:
                return target(x, t, s, cond, key=key)
            conds = [cond, null_where(jnp.asarray(True), cond, self.null_cond)]
            both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *conds)
            given, none = jax.vmap(lambda c: target.clean(x, t, s, c, key=key))(both)  # type: ignore[attr-defined]
            clean = jnp.where(single, none + self.scale * (given - none), given)
            return ddim_jump(target.process, x, clean, t, s)

        there = jump(jump(x, times[0], times[1]), times[1], times[2])
        (k_t, tau_t), (k_s, tau_s) = (straightened(target.process, times[i]) for i in (0, 2))
        return ((x / k_t - there / k_s) / (tau_t - tau_s)).astype(x.dtype)

    def __call__(
        self, model: FlowMap, key: PRNGKeyArray, batch: dict[str, Any], frozen: Frozen
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the student, a `Jump` that is told where to.
            key: typed key; example i draws from its fold_in with i.
            batch: `{"x": (B, *event), "cond": pytree with leading axis B}`; the first examples
                bootstrap.
            frozen: other models; the teacher, if it is asked for.

        Returns:
            The scalar loss, and the mean squares of its parts, `{"flow": ..., "bootstrap": ...}`.
        """
        check_told(model)
        check_batch(batch)
        x0, cond, process = batch["x"], batch.get("cond"), model.process
        count, few = len(x0), len(x0) // self.one_in
        if not few:
            raise ValueError(
                f"A batch must have an example that bootstraps, one in {self.one_in}, got {count} "
                "examples. Pass more, or a smaller `one_in`."
            )
        target = target_of(frozen, self.target, model)
        level_key, place_key, flow_key, example_key = jax.random.split(key, 4)
        # Lengths 2^level of the first examples, from a multiple of it down to the one before.
        levels = jnp.floor(stratified_uniform(level_key, few) * math.log2(self.steps)) + 1
        place = stratified_uniform(place_key, few)
        rest = stratified_uniform(flow_key, max(count - few, 1))[: count - few]
        length = jnp.exp2(jnp.concatenate([levels, jnp.zeros_like(rest)]))
        start = jnp.floor(jnp.concatenate([place, rest]) * self.steps / length) + 1
        nodes = jnp.stack([start, start - 0.5, start - 1]) * length / self.steps
        times = self.grid.quantile(process, nodes).T

        def one(i, x0, t):
            draw_key, drop_key = jax.random.split(jax.random.fold_in(example_key, i))
            eps, x, _, own = noised(process, draw_key, x0, t, None)
            return x, eps - x0, drop_key, own

        x, v, drop_keys, keys = jax.vmap(one)(jnp.arange(count), x0, times[:, 0])

        def bootstrapped(x, times, level, cond, key):
            return self.goal(target, x, times, cond, single=level == 1, key=key)

        def split(tree):
            return (jax.tree.map(part, tree) for part in (lambda a: a[:few], lambda a: a[few:]))

        (cond_few, cond_rest), (few_of, rest_of) = split(cond), split((x, times, keys))
        goals = jax.vmap(bootstrapped)(few_of[0], few_of[1], levels, cond_few, few_of[2])
        flow = v[few:]
        if self.teacher is not None:
            teacher = teacher_of(frozen, model, self.teacher)

            def velocity(x, t, cond):
                size, tau = straightened(process, t)
                return (x / size - said_by(teacher, x, t, cond)) / tau

            flow = jax.vmap(velocity)(rest_of[0], rest_of[1][:, 0], cond_rest)
        goals = jax.lax.stop_gradient(jnp.concatenate([goals, flow.astype(goals.dtype)]))
        if self.null_cond is not None:
            told = jax.vmap(lambda k, c: drop_cond(k, c, self.null_cond, self.label_dropout))(
                drop_keys[few:], cond_rest
            )
            cond = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond_few, told)

        def said(x, times, cond, key):
            return mean_velocity(model, x, times[0], times[2], cond, key=key)

        found = jax.vmap(said)(x, times, cond, keys)
        squares = jax.vmap(lambda a, b: jnp.mean(wide(a - b) ** 2))(found, goals)
        boot, plain = squares[:few].mean(), squares[few:].sum() / max(count - few, 1)
        return squares.mean(), {"flow": plain, "bootstrap": boot}
