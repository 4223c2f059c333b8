"""What a generator makes of noise, and the score of it."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_kind, check_number, check_same_process
from jaxdiff._tree import Number, as_number, is_known
from jaxdiff.denoiser import Denoiser, check_denoiser
from jaxdiff.distillation._shared import (
    check_flow_map,
    draw_scale,
    scale_range,
    told_scale,
)
from jaxdiff.flow_map import FlowMap
from jaxdiff.losses import DenoisingLoss, TimeLaw, each_example, stratified_uniform
from jaxdiff.losses._batch import check_batch, time_dtype
from jaxdiff.losses._frozen import still
from jaxdiff.training import Frozen


def _as_start(start: Any) -> tuple[Number, ...] | None:
    if start is None:
        return None
    several = isinstance(start, tuple | list) or np.ndim(start) == 1
    times = tuple(map(as_number, start if several else [start]))
    if not times:
        raise ValueError("`start` must be a time, or several, got none. Pass None for t_max.")
    for time in times:
        check_number("start", time, above=0.0)
    known = [time for time in times if isinstance(time, float)]
    if sorted(set(known), reverse=True) != known:
        raise ValueError(
            f"`start` must decrease, got {start!r}. Sort it: sorted(..., reverse=True)."
        )
    return times


def start_times() -> Any:
    """A dataclass field for where a generator starts: None, a time, or several of its steps.

    Raises:
        ValueError: when given times that are not positive, or do not decrease.
    """
    return eqx.field(default=None, converter=_as_start)


def check_start(process: Any, start: Any) -> None:
    """Reject starts beyond the process, where both are known.

    Raises:
        ValueError: for e.g. a noise level in place of a time.
    """
    if not is_known(process.t_max):
        return
    last = float(process.t_max)
    for time in start or ():
        if is_known(time) and np.any(np.asarray(time) > last * (1 + 1e-6)):
            raise ValueError(
                f"`start` must be a time of the process, at most {last:g}, got {time}. For a noise "
                "level sigma / alpha pass process.time(-2 * jnp.log(level))."
            )


class Begun(eqx.Module):
    """Where the last jump of a generator begins, for the examples of a batch.

    Attributes:
        x: the states, `(B, *event)`, which no gradient passes.
        t: their times, `(B,)`.
        cond: conditions, with leading axis B.
        scale: of guidance, `(B,)`, or None.
    """

    x: Array
    t: Array
    cond: PyTree
    scale: Array | None

    @property
    def told(self) -> PyTree:
        """The condition of the generator and of the fake score."""
        return told_scale(self.cond, self.scale)


def begin(
    model: FlowMap,
    key: PRNGKeyArray,
    batch: dict[str, Any],
    start: tuple[Number, ...] | None = None,
    scales: tuple[Number, Number] | None = None,
) -> Begun:
    """Noise, or what a generator of K steps comes to before its k-th, k uniform in 1..K.

    From t_k to t_{k+1} a generator jumps to time 0 and is noised again by the process, as
    `solvers.FlowMapSteps(gamma=1)` does: the inputs that it will meet. K - 1 passes.

    Args:
        model: the generator.
        key: typed key; example i draws from its fold_in with i.
        batch: gives the conditions, and the shape of x.
        start: times t_1 > ... > t_K of its steps; None for t_max alone.
        scales: of guidance, (least, most), or None.
    """
    check_flow_map(model)
    check_batch(batch)
    check_start(model.process, start)
    x, process, quiet = batch["x"], model.process, still(model)
    times = jnp.stack([jnp.asarray(t, time_dtype(x)) for t in start or (process.t_max,)])

    def one(i, like, cond):
        keys = jax.random.split(jax.random.fold_in(key, i), 4)
        scale = draw_scale(keys[0], scales)
        z = process.prior(keys[1], like.shape, times[0], like.dtype)
        if len(times) == 1:
            return z, times[0], scale
        told = told_scale(cond, scale)

        def step(z, row):
            n, t, s = row
            x0 = quiet(z, t, jnp.zeros_like(t), told)
            eps = jax.random.normal(jax.random.fold_in(keys[2], n), z.shape, z.dtype)
            z = process.renoise(x0, eps, jnp.zeros_like(t), s).astype(z.dtype)
            return z, z

        rows = jnp.arange(len(times) - 1), times[:-1], times[1:]
        later = jax.lax.scan(step, z, rows)[1]
        stage = jax.random.randint(keys[3], (), 0, len(times))
        return jnp.concatenate([z[None], later])[stage], times[stage], scale

    z, t, scale = jax.vmap(one)(jnp.arange(len(x)), x, batch.get("cond"))
    return Begun(jax.lax.stop_gradient(z), t, batch.get("cond"), scale)


def finish(model: FlowMap, begun: Begun) -> Array:
    """The generator's examples `(B, *event)`: one jump to time 0, a single pass, no dropout."""

    def one(x, t, cond):
        return model(x, t, jnp.zeros_like(t), cond)

    return jax.vmap(one)(begun.x, begun.t, begun.told)


def noise_and_times(
    process: Any, key: PRNGKeyArray, x0: Array, time_law: TimeLaw
) -> tuple[Array, Array]:
    """Noise `(B, *event)` and stratified times `(B,)` for a batch.

    Args:
        process: the forward process.
        key: typed key; example i draws from its fold_in with i.
        x0: `(B, *event)`, of which only the shape is looked at.
        time_law: of the times.
    """
    time_key, noise_key = jax.random.split(key)
    t = time_law.quantile(process, stratified_uniform(time_key, len(x0))).astype(time_dtype(x0))

    def one(i):
        return jax.random.normal(jax.random.fold_in(noise_key, i), x0.shape[1:], x0.dtype)

    return jax.vmap(one)(jnp.arange(len(x0))), t


def generator_of(frozen: Any, model: Any, name: str = "generator") -> FlowMap:
    """The generator among what a loss is given, all of it constant.

    Args:
        frozen: as a loss finds it.
        model: one of the same process, or None.
        name: of the player, or of a constant.

    Raises:
        ValueError: if there is none, or one of another process.
        TypeError: if it is no `FlowMap`.
    """
    if name not in frozen:
        raise ValueError(
            f"`frozen` must have a generator {name!r}, got {sorted(frozen)}. Train a player "
            f"{name!r}, such as Jump(denoiser), beside this one."
        )
    check_flow_map(frozen[name], name)
    if model is not None:
        check_same_process(name, frozen[name].process, model.process)
    return still(frozen[name])


def weighted_mean(losses: Array, weight: Array | None) -> Array:
    """The mean of weight times losses, both `(B,)`; examples of weight 0 are not looked at."""
    if weight is None:
        return losses.mean()
    return jnp.where(weight == 0, 0, weight * losses).mean()


class FakeScoreLoss(eqx.Module):
    """The denoising loss of a generator's examples: it trains the score of what is made.

    A pass of the generator, without a gradient, and one of the denoiser. Give it the `start` and
    `scales` that the generator's own loss has.

    **Fixed point**: E[x_g | x_t] under the generator as it is. It must keep ahead of the generator:
    start it from the teacher, and let it learn more often (`Player(every=...)` of the generator).

    Args:
        denoising: the loss; with a `null_cond` the fake score may be guided.
        start: where the generator starts: a time; its times of several steps, decreasing, of which
            each example draws one; None for the process's t_max.
        scales: of guidance, told to the generator and to the fake score; None for none.

    Raises:
        ValueError: when called, without a player "generator".
        TypeError: when called, for a generator that is no `FlowMap`.

    Reference: Luo, Hu, Zhang, Sun, Li, Zhang, "Diff-Instruct: A Universal Approach for
    Transferring Knowledge From Pre-trained Diffusion Models", 2023, arXiv 2305.18455, algorithm 1.
    """

    denoising: DenoisingLoss = DenoisingLoss()
    start: tuple[Number, ...] | None = start_times()
    scales: tuple[Number, Number] | None = scale_range()

    def __check_init__(self):
        check_kind("denoising", self.denoising, DenoisingLoss, "losses.DenoisingLoss()")

    def __call__(
        self, model: Denoiser, key: PRNGKeyArray, batch: dict[str, Any], frozen: Frozen
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the fake score.
            key: typed key; example i draws from its fold_in with i.
            batch: `{"x": (B, *event), "cond": ...}`, of whose x only the shape is looked at.
            frozen: holds the generator.

        Returns:
            The scalar loss, and `{"x0_mse": mean error}`.
        """
        return self.weighted(model, key, batch, frozen)

    def weighted(
        self,
        model: Denoiser,
        key: PRNGKeyArray,
        batch: dict[str, Any],
        frozen: Frozen,
        weight: Array | None = None,
        levels: Array | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """The same, each example with a weight of its own.

        Args:
            model: as of a call.
            key: likewise.
            batch: likewise.
            frozen: likewise.
            weight: `(B,)`; None for 1.
            levels: of the times, in [0, 1), `(B,)`; None for stratified ones.
        """
        check_denoiser(model)
        generator = generator_of(frozen, model)
        begin_key, loss_key = jax.random.split(key)
        begun = begin(generator, begin_key, batch, self.start, self.scales)
        x0 = jax.lax.stop_gradient(finish(generator, begun))

        def one(key, u, x0, cond):
            t = self.denoising.time_law.quantile(model.process, u).astype(time_dtype(x0))
            return self.denoising.per_example(model, key, x0, t, cond)

        losses, errors = each_example(one, loss_key, {"x": x0, "cond": begun.told}, levels)
        return weighted_mean(losses, weight), {"x0_mse": errors.mean()}
