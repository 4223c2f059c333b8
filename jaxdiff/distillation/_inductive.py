"""Inductive moment matching: groups of particles, by a kernel, from one time to the one before."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_count, check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.distillation._shared import (
    check_flow_map,
)
from jaxdiff.flow_map import FlowMap
from jaxdiff.losses import TimeLaw, UniformTime, stratified_uniform
from jaxdiff.losses._batch import check_batch, time_dtype, wide
from jaxdiff.losses._frozen import target_of
from jaxdiff.metrics import Kernel
from jaxdiff.metrics._kernels import squared_distances
from jaxdiff.predictions import Prediction, Velocity
from jaxdiff.processes import GaussianProcess
from jaxdiff.training import Frozen


class Laplace(Kernel):
    """k(u, v) = exp(-|u - v| / bandwidth).

    Args:
        bandwidth: > 0; None for d, the size of u.
    """

    bandwidth: Number | None = number(None)

    def __check_init__(self):
        check_number("bandwidth", self.bandwidth, above=0.0)

    def __call__(self, x: Array, y: Array) -> Array:
        """The Gram matrix."""
        squares = squared_distances(x, y)
        # Where two points are one the distance has no derivative: 0, as between symmetric ones.
        apart = ~(squares <= 0)  # NaN is, too
        distances = jnp.where(apart, jnp.sqrt(jnp.where(apart, squares, 1.0)), 0.0)
        return jnp.exp(-distances / (x.shape[1] if self.bandwidth is None else self.bandwidth))


class Groups(eqx.Module):
    """Groups of particles of noised data, each at three times of its own, t > r >= s.

    Attributes:
        x_t: `(G, M, *event)`.
        x_r: the same data with the same noise, `(G, M, *event)`.
        t: `(G,)`.
        r: `(G,)`.
        s: `(G,)`.
        cond: conditions, with leading axes G and M.
        keys: of the student's own randomness, `(G, M)`.
    """

    x_t: Array
    x_r: Array
    t: Array
    r: Array
    s: Array
    cond: PyTree
    keys: PRNGKeyArray


def neighbours(cond: PyTree, count: int) -> Array:
    """The order in which equal integer conditions are side by side, `(count,)`."""
    columns = [
        column
        for leaf in jax.tree.leaves(cond)
        if jnp.issubdtype(leaf.dtype, jnp.integer)
        for column in leaf.reshape(count, -1).T
    ]
    return jnp.lexsort(columns) if columns else jnp.arange(count)


class InductiveMomentMatching(eqx.Module):
    """Squared MMD of y = model(x_t, t, s) and y' = stop_gradient(model(x_r, r, s)), t > r >= s.

    Over groups of M particles that share (s, r, t), as a V-statistic,

        w (1/M^2) sum_jk k(y_j, y_k) + k(y'_j, y'_k) - 2 k(y_j, y'_k)

    with x_r and x_t of the same data and noise. A kernel sees y over the student's own step,
    |c(s, t)| = |alpha_s - alpha_t sigma_s / sigma_t| |c_out(t)| of a prediction, times sigma_data.
    Particles of different conditions do not see one another, so that the law is matched given the
    condition; a batch is put in the order of its integer conditions first, so that those of a group
    mostly have one. No teacher; two passes of the student, one of them without a gradient.

    **Fixed point**: model(., t, s) carries the noised law at t to that at s, for all t and s, by
    induction from r = s, where y' is x_s itself; which of the maps that do so is left open. At a
    finite M the pairs of one particle, k(y_j, y'_j), are a share 1/M of a consistency loss, whose
    own fixed point is off by the gap between t and r; with M = 1 and `metrics.Energy()` the loss is
    twice that loss, of the distance |y - y'|.

    Args:
        particles: M, a divisor of the batch, >= 1.
        kernel: on vectors; `Laplace()` has a bandwidth of the size of an example.
        gap: k; r is where sigma / alpha is 2^-k of its range below that of t, or s if that is more.
        time_law: of t; s is uniform between t_min and t.
        prediction: of the student's network, whose c_out is in the bandwidth.
        sigma_data: standard deviation of the data, > 0.
        bias: b of w = 1/2 sigmoid(b - l) |dl/dt| alpha^a / (alpha^2 + sigma^2), l the log-SNR at t.
        power: a, 1 or 2.
        target: whose weights the target has, as of `ConsistencyDistillation`.

    Raises:
        TypeError: when called, for a student that is no `FlowMap`.
        ValueError: when called, for a batch that `particles` does not divide.

    Reference: Zhou, Ermon, Song, "Inductive Moment Matching", 2025, arXiv 2503.07565, algorithm 1.
    The order, and the restriction to particles of one condition, are ours.
    """

    particles: int = eqx.field(static=True, default=4)
    kernel: Kernel = Laplace()
    gap: Number = number(12.0)
    time_law: TimeLaw = UniformTime()
    prediction: Prediction = Velocity()
    sigma_data: Number = number(0.5)
    bias: Number = number(5.0)
    power: Number = number(1.0)
    target: str | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_count("particles", self.particles)
        check_kind("kernel", self.kernel, Kernel, "distillation.Laplace()")
        check_number("gap", self.gap, above=0.0)
        check_kind("time_law", self.time_law, TimeLaw, "losses.UniformTime()")
        check_kind("prediction", self.prediction, Prediction, "predictions.Velocity()")
        check_number("sigma_data", self.sigma_data, above=0.0)
        check_number("bias", self.bias)
        check_number("power", self.power)

    def earlier(self, process: GaussianProcess, t: Array, s: Array) -> Array:
        """r of t and s, elementwise."""

        def level(t):
            return jnp.exp(-0.5 * process.log_snr(t))

        low, high = (level(jnp.asarray(end, t.dtype)) for end in (process.t_min, process.t_max))
        left = level(t) - (high - low) / 2**self.gap
        inside = process.time(-2 * jnp.log(jnp.where(left > 0, left, 1.0)))
        return jnp.where(left > 0, jnp.maximum(inside, s), s).astype(t.dtype)

    def groups(self, model: FlowMap, key: PRNGKeyArray, batch: dict[str, Any]) -> Groups:
        """Noised examples of a batch, M neighbours a group, in the order of integer conditions.

        Args:
            model: the student.
            key: typed key; example i draws its noise from a fold_in with i, group g its times from
                one with g, in an order that knows nothing of conditions.
            batch: as of a call.

        Raises:
            ValueError: for a batch that `particles` does not divide.
        """
        check_batch(batch)
        x, process, size = batch["x"], model.process, self.particles
        if len(x) % size:
            raise ValueError(
                f"`particles` must divide the batch of {len(x)}, got {size}. Pass a divisor."
            )
        count = len(x) // size
        law_key, time_key, example_key, order_key = jax.random.split(key, 4)
        levels = jax.random.permutation(order_key, stratified_uniform(law_key, count))
        t = self.time_law.quantile(process, levels).astype(time_dtype(x))
        u = jax.vmap(lambda g: jax.random.uniform(jax.random.fold_in(time_key, g)))(
            jnp.arange(count)
        )
        s = (process.t_min + u * (t - process.t_min)).astype(t.dtype)
        r = self.earlier(process, t, s)

        def one(i, x, t, r):
            noise_key, own = jax.random.split(jax.random.fold_in(example_key, i))
            eps = jax.random.normal(noise_key, x.shape, x.dtype)
            x_t, x_r = (process.marginal(x, eps, time).astype(x.dtype) for time in (t, r))
            return x_t, x_r, own

        rows = neighbours(batch.get("cond"), len(x))
        x, cond = jax.tree.map(lambda leaf: leaf[rows], (x, batch.get("cond")))
        found = jax.vmap(one)(rows, x, jnp.repeat(t, size), jnp.repeat(r, size))
        x_t, x_r, keys, cond = jax.tree.map(
            lambda leaf: leaf.reshape(count, size, *leaf.shape[1:]), (*found, cond)
        )
        return Groups(x_t, x_r, t, r, s, cond, keys)

    def scale(self, process: GaussianProcess, t: Array, s: Array) -> Array:
        """|c(s, t)| sigma_data, scalars."""
        step = process.alpha(s) - process.alpha(t) * process.sigma(s) / process.sigma(t)
        return jnp.abs(step * self.prediction.coefficients(process, t)[1]) * self.sigma_data

    def weight(self, process: GaussianProcess, t: Array) -> Array:
        """w(t), a scalar."""
        log_snr, slope = jax.jvp(process.log_snr, (t,), (jnp.ones_like(t),))
        alpha, sigma = process.alpha(t), process.sigma(t)
        share = jax.nn.sigmoid(self.bias - log_snr) * -slope / 2
        return share * alpha**self.power / (alpha**2 + sigma**2)

    def mmd2(self, y: Array, goal: Array, scale: Array, cond: PyTree = None) -> Array:
        """The V-statistic of one group, >= 0 up to rounding for a positive definite kernel.

        Args:
            y: `(M, *event)`.
            goal: `(M, *event)`.
            scale: what both are divided by, a scalar.
            cond: conditions, with leading axis M.
        """
        count = len(y)
        y, goal = (wide(a).reshape(count, -1) / scale for a in (y, goal))
        meet = jnp.ones((count, count), bool)
        for leaf in jax.tree.leaves(cond):
            rows = leaf.reshape(count, -1)
            meet &= jnp.all(rows[:, None] == rows[None], axis=-1)
        value = self.kernel(y, y) + self.kernel(goal, goal) - 2 * self.kernel(y, goal)
        return jnp.sum(jnp.where(meet, value, 0)) / count**2

    def __call__(
        self, model: FlowMap, key: PRNGKeyArray, batch: dict[str, Any], frozen: Frozen
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the student, a map between any two times.
            key: as of `groups`.
            batch: data, `{"x": (B, *event), "cond": pytree with leading axis B}`.
            frozen: other models, for `target`.

        Returns:
            The scalar loss, and `{"mmd2": mean squared MMD, without weights}`.
        """
        check_flow_map(model)
        groups, target = self.groups(model, key, batch), target_of(frozen, self.target, model)

        def moved(model, x, t):
            def one(x, t, s, cond, key):
                return model(x, t, s, cond, key=key)

            each = jax.vmap(one, in_axes=(0, None, None, 0, 0))
            return jax.vmap(each)(x, t, groups.s, groups.cond, groups.keys)

        y = moved(model, groups.x_t, groups.t)
        goal = jax.lax.stop_gradient(moved(target, groups.x_r, groups.r))
        scales = self.scale(model.process, groups.t, groups.s)
        # Where t is s nothing moves, and nothing is learned.
        moves = scales > 0
        found = jax.vmap(self.mmd2)(y, goal, jnp.where(moves, scales, 1), groups.cond)
        weights = jax.vmap(lambda t: self.weight(model.process, t))(groups.t)
        weights = jnp.where(moves, weights, 0)
        return jnp.mean(weights * found), {"mmd2": found.mean()}
