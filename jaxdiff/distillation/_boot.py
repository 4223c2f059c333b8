"""BOOT: a one-step student that needs no data."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.distillation._grids import Curriculum, FixedSteps, cell
from jaxdiff.distillation._jump import OfDenoiser
from jaxdiff.distillation._shared import (
    draw_scale,
    guided_or_told,
    scale_range,
    told_scale,
)
from jaxdiff.losses import TimeLaw, UniformTime, Weighting, stratified_uniform
from jaxdiff.losses import Uniform as UniformWeighting
from jaxdiff.losses._batch import check_batch, wide
from jaxdiff.losses._frozen import said_by, teacher_of
from jaxdiff.predictions import X0


class SignalMap(OfDenoiser):
    """x_s = alpha_s g(x_T, s) + sigma_s x_T / sigma_T: what becomes of a start x_T, in one call.

    g is a denoiser's network that is given the start in place of a noisy example, and the time that
    is asked for; it says the signal there, which is the sample at t_min and before. From the last
    time alone: it looks at no state in between.

        sample(key, SignalMap(denoiser), shape, count, solver=FlowMapSteps(), times=1)

    Args:
        base: the denoiser that learns to be g. Give its network the prediction `X0`, or one that
            is as tame for a start as for a noisy example.
    """

    @property
    def one_step(self) -> bool:
        """True: it knows no state but the start."""
        return True

    def signal(
        self, x: Array, s: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Array:
        """g(x, s), `(*event)`.

        Args:
            x: the start x_T, `(*event)`.
            s: scalar time; below t_min that of t_min is meant.
            cond: as of a denoiser.
            key: likewise.
        """
        return self.base(x, jnp.maximum(s, self.process.t_min), cond, key=key)

    def __call__(
        self,
        x: Array,
        t: Array,
        s: Array,
        cond: PyTree = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Array:
        """See `FlowMap`; t is to be the last time."""
        process = self.process
        signal = self.signal(x, s, cond, key=key)
        return process.marginal(signal, x / process.sigma(t), s).astype(x.dtype)


class BOOT(eqx.Module):
    """A student that bootstraps its signal from one time to the next, starting from noise alone.

        mean of weight(t) |g(x_T, s) - (k g(x_T, t) + (1 - k) D(x_t, t))|^2 / (1 - k)^2
             + boundary |g(x_T, T) - D(x_T, T)|^2

    with x_T = sigma_T eps, x_t = alpha_t g(x_T, t) + sigma_t eps, k = sigma_s alpha_t /
    (alpha_s sigma_t), and no gradient through the target: one step of DDIM in the signal
    y = (x - sigma eps) / alpha, whose noise stays that of the start. t and s are neighbours of a
    grid. D is the teacher. Of the batch's examples the shape alone is used; its conditions are.

    Errors go down from T, so that the boundary is in every batch. One pass of the student over 2 B
    examples and one without a gradient over B; one of the teacher over 2 B.

    **Fixed point**: y_T = D(x_T, T), and from there the composed steps of DDIM, at which the loss
    is 0; off the exact flow by O(1/N).

    Args:
        grid: how the times lie.
        steps: N.
        weighting: a further factor, in x0.
        boundary: factor on the loss at the last time, > 0.
        scales: guidance scales of the teacher, drawn uniformly and told to the student as the
            entry "scale"; None for the teacher as it is.

    Raises:
        TypeError: when called, for a student that is no `SignalMap`.
        ValueError: when called, without a teacher, or one of another process.

    Reference: Gu, Zhai, Zhang, Liu, Susskind, "BOOT: Data-free Distillation of Denoising Diffusion
    Models with Bootstrapping", 2023, arXiv 2306.05544. There the step is Euler's in log(sigma /
    alpha), and its length squared stands for (1 - k)^2; these agree for small steps, and this form
    has a limit where alpha or sigma vanishes.
    """

    grid: TimeLaw = UniformTime()
    steps: Curriculum = FixedSteps(64)
    weighting: Weighting = UniformWeighting(X0())
    boundary: Number = number(1.0)
    scales: tuple[Number, Number] | None = scale_range()

    def __check_init__(self):
        check_kind("grid", self.grid, TimeLaw, "losses.UniformTime()")
        check_kind("steps", self.steps, Curriculum, "distillation.FixedSteps(64)")
        check_kind("weighting", self.weighting, Weighting, "losses.MinSNR()")
        check_number("boundary", self.boundary, above=0.0)

    def __call__(
        self, model: SignalMap, key: PRNGKeyArray, batch: dict[str, Any], frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the student.
            key: typed key; example i draws from its fold_in with i.
            batch: `{"x": (B, *event), "cond": pytree with leading axis B}`.
            frozen: with the "teacher".

        Returns:
            The scalar loss, and `{"bootstrap": its first term, "boundary": the second, plain}`.
        """
        if not isinstance(model, SignalMap):
            raise TypeError(
                "`model` must be a map of starts to signals, got "
                f"{type(model).__name__}. Wrap a denoiser: distillation.SignalMap(denoiser)."
            )
        check_batch(batch)
        teacher, process, like = teacher_of(frozen, model), model.process, batch["x"]
        count, cond = len(like), batch.get("cond")
        time_key, example_key = jax.random.split(key)
        steps = self.steps(jnp.asarray(getattr(frozen, "step", 0)))
        u = stratified_uniform(time_key, count)
        t, s = cell(self.grid, None, process, u, steps)
        end = jnp.full_like(t, process.t_max)

        def draw(i, like):
            noise_key, scale_key, own = jax.random.split(jax.random.fold_in(example_key, i), 3)
            eps = jax.random.normal(noise_key, like.shape, like.dtype)
            return eps, draw_scale(scale_key, self.scales), own

        eps, scale, keys = jax.vmap(draw)(jnp.arange(count), like)
        start = (process.sigma(end[0]) * eps).astype(like.dtype)
        told = told_scale(cond, scale)

        def signal(x, s, cond, key):
            return model.signal(x, s, cond, key=key)

        def taught(x, t, cond, scale):
            guided, given = guided_or_told(teacher, cond, scale)
            return said_by(guided, x, t, given)

        def twice(*trees):
            return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), trees[0], trees[1])

        ours = twice((start, s, told, keys), (start, end, told, keys))
        now = jax.lax.stop_gradient(jax.vmap(signal)(start, t, told, keys))
        x = jax.vmap(process.marginal)(now, eps, t).astype(like.dtype)
        answers = jax.vmap(taught)(*twice((x, t, cond, scale), (start, end, cond, scale)))
        answers = jax.lax.stop_gradient(answers)
        found = jax.vmap(signal)(*ours)

        def residuals(found, now, answer, t, s):
            ratio = process.sigma(s) * process.alpha(t) / (process.alpha(s) * process.sigma(t))
            off = wide(found - (ratio * now + (1 - ratio) * answer)) / (1 - ratio)
            density = self.grid.density(process, t)
            return self.weighting(process, t, density) * jnp.mean(off**2)

        bootstrap = jax.vmap(residuals)(found[:count], now, answers[:count], t, s).mean()
        boundary = jnp.mean(wide(found[count:] - answers[count:]) ** 2)
        metrics = {"bootstrap": bootstrap, "boundary": boundary}
        return bootstrap + self.boundary * boundary, metrics
