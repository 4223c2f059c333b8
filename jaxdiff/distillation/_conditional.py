"""Conditional diffusion distillation: a new condition and few steps, learned at once."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jaxdiff._checks import check_callable, check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.distillation._grids import Curriculum, FixedSteps, cell
from jaxdiff.distillation._jump import ddim_jump
from jaxdiff.distillation._shared import (
    Distance,
    Squared,
    check_flow_map,
    noised,
)
from jaxdiff.flow_map import FlowMap
from jaxdiff.losses import TimeLaw, UniformTime, each_example
from jaxdiff.losses._frozen import said_by, target_of, teacher_of


class ConditionalDistillation(eqx.Module):
    """A student of an unconditional teacher that takes a condition, and few steps.

        consistency distance(f(x_t, t, c), stop_gradient(f'(x_s, s, c))) + data distance(f, x0)

    f(x, t, c) = model(x, t, t_min, c), t and s are neighbours of a grid, and x_s is a step of DDIM
    with the teacher, which sees no condition and no guidance. The condition comes from the second
    term alone, of pairs of examples and conditions. The student is usually the teacher's network
    with an adapter (`finetuning.make_adapter`, `finetuning.AdaptedNetwork`), of which the adapter
    learns. Two passes of the student, one of them without a gradient, and one of the teacher.

    **Fixed point**, of squared distances with factors p and q:
    f_n = (p f_{n-1}(x_s, c) + q E[x0 | x_t, c]) / (p + q), f_0 = x. With q = 0 it is the composed
    DDIM map of the teacher, for every condition the same; with p = 0 the conditional denoiser; in
    between it is between these two, and no flow map of the conditional law.

    Args:
        distance: of two examples, in both terms; any function of two.
        grid: how the times lie.
        steps: how many; the paper's 20.
        consistency: factor on the first term, >= 0.
        data: factor on the second term, >= 0.
        target: whose weights the target has: None for the student's own, the own player for its
            average, as in the paper, or another player.

    Raises:
        TypeError: when called, for a student that is no `FlowMap`, or a teacher that is no
            denoiser.
        ValueError: when called, without a teacher, or one of another process.

    Reference: Mei, Delbracio, Talebi, Tu, Patel, Milanfar, "CoDi: Conditional Diffusion
    Distillation for Higher-Fidelity and Faster Image Generation", 2023, arXiv 2310.01407.
    """

    distance: Distance | Any = Squared()
    grid: TimeLaw = UniformTime()
    steps: Curriculum = FixedSteps(20)
    consistency: Number = number(1.0)
    data: Number = number(1.0)
    target: str | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_callable("distance", self.distance, "distillation.Squared()")
        check_kind("grid", self.grid, TimeLaw, "losses.UniformTime()")
        check_kind("steps", self.steps, Curriculum, "distillation.FixedSteps(20)")
        check_number("consistency", self.consistency, least=0.0)
        check_number("data", self.data, least=0.0)

    def __call__(
        self, model: FlowMap, key: PRNGKeyArray, batch: dict[str, Any], frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the student.
            key: typed key; example i draws from its fold_in with i.
            batch: `{"x": (B, *event), "cond": pytree with leading axis B}`.
            frozen: with the "teacher"; its step is that of the grid's steps.

        Returns:
            The scalar loss, and `{"consistency": first term, "data": second}`, without factors.
        """
        check_flow_map(model)
        teacher, process = teacher_of(frozen, model), model.process
        target = target_of(frozen, self.target, model)
        steps = self.steps(jnp.asarray(getattr(frozen, "step", 0)))

        def one(key, u, x0, cond):
            t, s = cell(self.grid, None, process, u, steps)
            _, x, _, own = noised(process, key, x0, t, None)
            x_s = ddim_jump(process, x, said_by(teacher, x, t), t, s)
            end = jnp.full_like(t, process.t_min)
            goal = jax.lax.stop_gradient(target(x_s, s, end, cond, key=own))
            answer = model(x, t, end, cond, key=own)
            return self.distance(answer, goal), self.distance(answer, x0)

        consistency, data = (terms.mean() for terms in each_example(one, key, batch))
        metrics = {"consistency": consistency, "data": data}
        return self.consistency * consistency + self.data * data, metrics
