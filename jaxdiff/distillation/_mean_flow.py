"""Mean flows: a student of mean velocities, from the derivative of itself along the flow."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.conditions import null_where
from jaxdiff.denoiser import Denoiser
from jaxdiff.distillation._jump import check_told
from jaxdiff.distillation._shared import (
    at_scale,
    noised,
    scale_range,
    told_scale,
)
from jaxdiff.distillation._tangents import relative
from jaxdiff.flow_map import FlowMap
from jaxdiff.losses import LogitNormal, TimeLaw, stratified_uniform
from jaxdiff.losses._batch import check_batch, wide
from jaxdiff.losses._frozen import said_by, still, teacher_of
from jaxdiff.processes import GaussianProcess
from jaxdiff.training import Frozen


def straightened(process: GaussianProcess, t: Array) -> tuple[Array, Array]:
    """(k, tau) with x_t / k = (1 - tau) x0 + tau eps: any process as a rectified flow.

    k = alpha + sigma and tau = sigma / k; of a rectified flow itself, 1 and t.

    Args:
        process: the forward process.
        t: scalar time.
    """
    sigma = process.sigma(t)
    size = process.alpha(t) + sigma
    return size, sigma / size


def mean_velocity(
    model: FlowMap,
    x: Array,
    t: Array,
    s: Array,
    cond: PyTree = None,
    *,
    key: PRNGKeyArray | None = None,
) -> Array:
    """A student's mean velocity from t to s, u = (y_t - y_s) / (tau_t - tau_s), y = x / k.

    k and tau as of `straightened`, so that of a rectified flow u = (x_t - x_s) / (t - s). It is
    (y - D) / tau, with D the clean end that the student says, and so finite at s = t, where it is
    the velocity of that instant.

    Args:
        model: the student, such as a `Jump` that is told where to.
        x: the noisy example, `(*event)`.
        t: scalar time of x, sigma_t > 0.
        s: scalar target time.
        cond: its condition.
        key: of the network's own randomness.

    Returns:
        u, `(*event)`.
    """
    size, tau = straightened(model.process, t)
    clean = model.clean(x, t, s, cond, key=key)  # type: ignore[attr-defined]
    return ((x / size - clean) / tau).astype(x.dtype)


class MeanFlow(eqx.Module):
    """A student whose mean velocity agrees with its own derivative along the flow.

        mean of |u - stop_gradient(v - (t - s) du/dt)|^2 / stop_gradient(|.|^2 + floor)^power

    with u = `mean_velocity` from t to s, v = eps - x0 the velocity of the example, and du/dt the
    derivative along (v, 1) in (x, t) at fixed s, by `jax.jvp`. At s = t it is flow matching. One
    pass of the student, with its forward derivative; and as many more without a gradient as
    guidance needs, below. Other processes than `RectifiedFlow` are seen as one, see `straightened`.

    **Fixed point**: the exact flow map of the data, or of the teacher, with no error of a grid: v
    enters linearly, and has the flow's velocity for its mean. With a teacher the loss there is 0;
    without one it is the spread of v. A power above 0 weights an example by its own residual, and
    moves the fixed point as a robust mean differs from a mean: not at all where the spread is
    symmetric.

    Guidance without a teacher needs `null_cond`, and makes the target velocity

        omega v + kappa u(x, t, t, cond) + (1 - omega - kappa) u(x, t, t, none),

    whose fixed point at s = t is the velocity guided with scale omega / (1 - kappa), in one pass
    of a sampler a step. It costs one more pass of the student, or two with a `kappa`, in one batch.
    Examples whose condition is dropped have the plain v.

    Args:
        time_law: of both times, of which the later is t.
        same: share of examples with s = t, in [0, 1].
        power: p of the weight; 0 for none, 1 in the paper.
        floor: c of the weight, of the mean square of an example; the paper's 0.001 is of the sum
            of 4096 numbers.
        null_cond: the condition that means "none", of the network's entries; None for no guidance.
        label_dropout: probability with which a condition is replaced by `null_cond`.
        omega: of the example's velocity; 1 with `kappa` None is no guidance.
        kappa: of the student's own conditional velocity, in [0, 1); None for none.
        teacher: name of a denoiser in `frozen`, whose velocity is v: a distillation; one pass of
            it. None for the example's own.
        scales: guidance scales of the teacher, drawn uniformly and told to the student; None for
            the teacher as it is.

    Raises:
        TypeError: when called, for a student that is no `FlowMap` with a clean end.
        ValueError: for guidance of its own beside a teacher, or `scales` without one; when called,
            for a `Jump` that is not told where to, without a teacher, or one of another process.

    Reference: Geng, Deng, Bai, Kolter, He, "Mean Flows for One-step Generative Modeling", 2025,
    arXiv 2505.13447, algorithm 1. There the network has t - s for an input; here s.
    """

    time_law: TimeLaw = LogitNormal(-0.4, 1.0)
    same: Number = number(0.75)
    power: Number = number(1.0)
    floor: Number = number(1e-6)
    null_cond: PyTree = None
    label_dropout: Number = number(0.1)
    omega: Number = number(1.0)
    kappa: Number | None = number(None)
    teacher: str | None = eqx.field(static=True, default=None)
    scales: tuple[Number, Number] | None = scale_range()

    def __check_init__(self):
        check_kind("time_law", self.time_law, TimeLaw, "losses.LogitNormal(-0.4, 1.0)")
        check_number("same", self.same, least=0.0, most=1.0)
        check_number("power", self.power, least=0.0)
        check_number("floor", self.floor, above=0.0)
        check_number("label_dropout", self.label_dropout, least=0.0, most=1.0)
        check_number("omega", self.omega)
        check_number("kappa", self.kappa, least=0.0, below=1.0)
        if self.teacher is not None and self.null_cond is not None:
            raise ValueError(
                f"`null_cond` is of guidance without a teacher, got {self.null_cond!r} beside the "
                f"teacher {self.teacher!r}. Guide the teacher: guidance.ClassifierFree(...)."
            )
        if self.teacher is None and self.scales is not None:
            raise ValueError(
                f"`scales` are of a guided teacher, got {self.scales} without one. Pass "
                "`teacher='teacher'`, or `null_cond` and `omega`."
            )
        if self.null_cond is None and self.kappa is not None:
            raise ValueError("`kappa` is of guidance, and needs a `null_cond`.")
        if self.null_cond is None and isinstance(self.omega, float) and self.omega != 1:
            raise ValueError(
                f"`omega` is of guidance, and needs a `null_cond`, got {self.omega} without."
            )

    def target(
        self,
        model: FlowMap,
        x: Array,
        t: Array,
        s: Array,
        velocity: Array,
        cond: PyTree = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Array, Array, Array]:
        """What the student says of one example, what it should say, and its derivative.

        Args:
            model: the student.
            x: `(*event)`.
            t: scalar time of x.
            s: scalar target time.
            velocity: v at x, `(*event)`; of y by tau, see `straightened`.
            cond: what the student is told.
            key: of the network's own randomness.

        Returns:
            u; v - (tau_t - tau_s) du/dtau; du/dtau; each `(*event)`. No gradient passes the latter
            two.
        """
        process = model.process
        (size, tau), (d_size, d_tau) = jax.jvp(
            lambda t: straightened(process, t), (t,), (jnp.ones_like(t),)
        )
        dx = size * velocity + d_size / (d_tau * size) * x
        u, du = jax.jvp(
            lambda x, t: mean_velocity(model, x, t, s, cond, key=key),
            (x, t),
            (dx.astype(x.dtype), (1 / d_tau).astype(t.dtype)),
        )
        du = jax.lax.stop_gradient(du)
        goal = velocity - (tau - straightened(process, s)[1]) * du
        return u, jax.lax.stop_gradient(goal), du

    def _guided(self, model: FlowMap, v: Array, x: Array, t: Array, cond: PyTree, key) -> Array:
        """The target velocity with guidance."""
        null = null_where(jnp.asarray(True), cond, self.null_cond)
        conds = [null] if self.kappa is None else [null, cond]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *conds)
        found = jax.vmap(lambda c: mean_velocity(model, x, t, t, c, key=key))(stacked)
        if self.kappa is None:
            return self.omega * v + (1 - self.omega) * found[0]
        rest = 1 - self.omega - self.kappa
        return self.omega * v + self.kappa * found[1] + rest * found[0]

    def __call__(
        self, model: FlowMap, key: PRNGKeyArray, batch: dict[str, Any], frozen: Frozen
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the student, a `Jump` that is told where to.
            key: typed key; example i draws from its fold_in with i.
            batch: `{"x": (B, *event), "cond": pytree with leading axis B}`.
            frozen: other models; the teacher, if it is asked for.

        Returns:
            The scalar loss, and `{"mse": mean squared residual, "tangent": root mean square of
            du/dtau over that of u}`; see `time_sensitivity` for the latter.
        """
        check_told(model)
        check_batch(batch)
        teacher = None if self.teacher is None else teacher_of(frozen, model, self.teacher)
        *level_keys, example_key = jax.random.split(key, 4)
        x0, process = batch["x"], model.process
        levels = jnp.stack([stratified_uniform(k, len(x0)) for k in level_keys])
        times = self.time_law.quantile(process, levels[:2])
        t = times.max(0)
        s = jnp.where(levels[2] < self.same, t, times.min(0))

        def one(i, x0, cond, t, s):
            draw_key, drop_key = jax.random.split(jax.random.fold_in(example_key, i))
            eps, x, scale, own = noised(process, draw_key, x0, t, self.scales)
            v, told = eps - x0, told_scale(cond, scale)
            if teacher is not None:
                v = _velocity(at_scale(teacher, scale), x, t, cond)
            elif self.null_cond is not None:
                drop = jax.random.bernoulli(drop_key, self.label_dropout)
                v = jnp.where(drop, v, self._guided(still(model), v, x, t, cond, own))
                told = null_where(drop, cond, self.null_cond)
            u, goal, du = self.target(model, x, t, s, v.astype(x.dtype), told, key=own)
            sizes = [jnp.mean(wide(part) ** 2) for part in (u, du)]
            return jnp.mean(wide(u - goal) ** 2), *sizes

        square, size, slope = jax.vmap(one)(jnp.arange(len(x0)), x0, batch.get("cond"), t, s)
        weight = jax.lax.stop_gradient(square + self.floor) ** -self.power
        tangent = jax.lax.stop_gradient(relative(slope.mean(), size.mean()))
        return (weight * square).mean(), {"mse": square.mean(), "tangent": tangent}


def _velocity(teacher: Denoiser, x: Array, t: Array, cond: PyTree) -> Array:
    """That of y by tau, see `straightened`."""
    size, tau = straightened(teacher.process, t)
    return (x / size - said_by(teacher, x, t, cond)) / tau
