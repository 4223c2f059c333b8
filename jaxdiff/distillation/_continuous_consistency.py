"""Consistency models in continuous time, on the angle between data and noise."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.distillation._jump import check_clean
from jaxdiff.distillation._learned_weight import Weighted
from jaxdiff.distillation._shared import (
    at_scale,
    noised,
    scale_range,
    told_scale,
)
from jaxdiff.distillation._tangents import relative
from jaxdiff.flow_map import FlowMap
from jaxdiff.losses import LogNormal, TimeLaw, each_example
from jaxdiff.losses._batch import wide
from jaxdiff.losses._frozen import said_by, teacher_of
from jaxdiff.predictions import Velocity
from jaxdiff.processes import TrigFlow
from jaxdiff.training import Frozen


class ContinuousConsistency(eqx.Module):
    """A student that says the same all along a trajectory, by its derivative along it.

    With f(x, t) = cos t x - sin t u the clean end that the student says, u = sigma_data F, and
    dx/dt the velocity of the teacher, or cos t sigma_data eps - sin t x0 of data alone,

        g = (1 - r) cos^2 t (dx/dt - u) + r cos t df/dt,    g <- g / (rms(g) + floor),
        mean of |F - stop_gradient(F + g)|^2,

    df/dt along (dx/dt, 1) by `jax.jvp`, so that there is no grid and no error of one. r grows from
    0, where F learns dx/dt as a diffusion model does, to 1 over `warmup` steps. Processes of
    `TrigFlow`. One pass of the student, with its forward derivative, and one of the teacher.

    **Fixed point**: the exact flow map to data, of the teacher, where the loss is 0, or of the
    data, where g alone vanishes in the mean and the loss does not; the division by rms(g) moves the
    latter as it does `MeanFlow`'s. As a value the loss is no measure: it is that of |g|^2.

    A network of a label of order one is a condition for this: see `time_sensitivity`.

    With a student `Weighted(model, LogWeight(jnp.zeros(16)))` the mean is of exp(w) |.|^2 - w.

    Args:
        time_law: of t.
        warmup: steps until r = 1; 0 for r = 1 from the first.
        floor: c of the division, of a root mean square; None for no division. The paper's norm is
            of all numbers of an example, with the same 0.1.
        teacher: name of a denoiser in `frozen`, to distil (sCD); None to train on data (sCT).
        scales: guidance scales of the teacher, drawn uniformly and told to the student; None for
            the teacher as it is.

    Raises:
        TypeError: when called, for a student that is no `FlowMap` with a clean end.
        ValueError: for `scales` without a teacher; when called, for another process than
            `TrigFlow`, or without the teacher.

    Reference: Lu, Song, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models",
    2024, arXiv 2410.11081, algorithm 1.
    """

    time_law: TimeLaw = LogNormal(-1.0, 1.4)
    warmup: Number = number(10_000.0)
    floor: Number | None = number(0.1)
    teacher: str | None = eqx.field(static=True, default=None)
    scales: tuple[Number, Number] | None = scale_range()

    def __check_init__(self):
        check_kind("time_law", self.time_law, TimeLaw, "losses.LogNormal(-1.0, 1.4)")
        check_number("warmup", self.warmup, least=0.0)
        check_number("floor", self.floor, above=0.0)
        if self.teacher is None and self.scales is not None:
            raise ValueError(
                f"`scales` are of a guided teacher, got {self.scales} without one. Pass "
                "`teacher='teacher'`."
            )

    def tangent(
        self,
        model: FlowMap,
        x: Array,
        t: Array,
        velocity: Array,
        cond: PyTree = None,
        *,
        ratio: Array | float = 1.0,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Array, Array, Array]:
        """F of one example, g before its division, and dF/dt.

        Args:
            model: the student.
            x: `(*event)`.
            t: scalar time of x.
            velocity: dx/dt, `(*event)`.
            cond: what the student is told.
            ratio: r.
            key: of the network's own randomness.

        Returns:
            Each `(*event)`; no gradient passes the latter two.
        """
        cos, sin, size = jnp.cos(t), jnp.sin(t), model.process.sigma_data  # type: ignore[attr-defined]
        end = jnp.zeros_like(t)

        def clean(x, t):
            return model.clean(x, t, end, cond, key=key)  # type: ignore[attr-defined]

        f, df = jax.jvp(clean, (x, t), (velocity.astype(x.dtype), jnp.ones_like(t)))
        u = (cos * x - f) / sin
        g = (1 - ratio) * cos**2 * (velocity - u) + ratio * cos * df
        du = (cos * velocity - sin * x - df - cos * u) / sin
        return u / size, jax.lax.stop_gradient(g), jax.lax.stop_gradient(du / size)

    def __call__(
        self, model: FlowMap, key: PRNGKeyArray, batch: dict[str, Any], frozen: Frozen
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the student, such as a `Jump`, or `Weighted`.
            key: typed key; example i draws from its fold_in with i.
            batch: `{"x": (B, *event), "cond": pytree with leading axis B}`.
            frozen: other models; its step is that of the warm-up.

        Returns:
            The scalar loss, and `{"tangent": root mean square of dF/dt over that of F, "rms_g":
            that of g before its division, "ratio": r}`.
        """
        student = model.model if isinstance(model, Weighted) else model
        check_clean(student)
        process = student.process
        if not isinstance(process, TrigFlow):
            raise ValueError(
                f"The student must be of the process TrigFlow, got {type(process).__name__}. Make "
                "it so from the first, or use MeanFlow or ConsistencyDistillation."
            )
        teacher = None if self.teacher is None else teacher_of(frozen, student, self.teacher)
        step = jnp.asarray(getattr(frozen, "step", 0), float)
        ratio = jnp.minimum((step + 1e-6) / (self.warmup + 1e-6), 1.0)

        def one(key, u, x0, cond):
            t = self.time_law.quantile(process, u)
            eps, x, scale, own = noised(process, key, x0, t, self.scales)
            if teacher is None:
                velocity = jnp.cos(t) * process.sigma_data * eps - jnp.sin(t) * x0
            else:
                x0_hat = said_by(at_scale(teacher, scale), x, t, cond)
                velocity = Velocity().from_x0(process, x, t, x0_hat)
            told = told_scale(cond, scale)
            F, g, dF = self.tangent(student, x, t, velocity, told, ratio=ratio, key=own)
            squares = [jnp.mean(wide(part) ** 2) for part in (F, g, dF)]
            if self.floor is not None:
                g = g / (jnp.sqrt(squares[1]) + self.floor)
            loss = jnp.mean(wide(F - jax.lax.stop_gradient(F + g)) ** 2)
            if isinstance(model, Weighted):
                w = model.weight(process, t)
                loss = jnp.exp(w) * loss - w
            return loss, *squares

        loss, size, g, slope = each_example(one, key, batch)
        metrics = {"tangent": relative(slope.mean(), size.mean()), "rms_g": jnp.sqrt(g.mean())}
        return loss.mean(), {**jax.lax.stop_gradient(metrics), "ratio": ratio}
