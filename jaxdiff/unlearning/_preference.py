"""Preference optimisation: an image and what it should have been, told apart by both errors."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.denoiser import Denoiser, check_denoiser
from jaxdiff.guidance._scale import check_null_cond
from jaxdiff.losses import TimeLaw, Uniform, UniformTime, Weighting, stratified_uniform
from jaxdiff.losses._batch import time_dtype
from jaxdiff.losses._frozen import teacher_of
from jaxdiff.predictions import X0
from jaxdiff.unlearning._shared import Seen, asked, forget_of, replaced


class PreferenceLoss(eqx.Module):
    """The model learns to denoise the safe one of a pair of images, and the other no more.

        -log sigmoid(-beta [(l+ - l*+) - (l- - l*-)]) + preserve mean |D(x_T) - D*(x_T)|^2

    l is the weighted error of an image noised at t, l* that of the frozen teacher; x- is an example
    of `batch["forget"]` and x+ its safe version "safe", of the same noise and time: an edit of it,
    `guidance.sdedit` towards another condition. The second term holds the first step of sampling,
    from pure noise x_T under no condition. What is learned is in the images and needs no prompt.
    Four passes of images, two of them of the student, and one of noise each.

    **Fixed point**: none at finite beta. With n examples it is driven towards l+ small and l-
    large until the sigmoid is flat, which the last term and the number of updates hold up. The
    gradient at the start is beta / 2 grad (l+ - l-), and log 2 the loss there.

    Args:
        beta: how far from the teacher; the paper's 100 to 2000 for mean squares.
        preserve: factor on the second term, >= 0; the paper's 1e4 beta.
        null_cond: the condition that means "none"; needed with `preserve` above 0.
        weighting: factor on errors in x0.
        time_law: law of the time; the paper's ends at 3/4 of the horizon.

    Raises:
        TypeError: when called, for a model that is no denoiser.
        ValueError: when called, without a "teacher", or a batch without "forget" and its "safe".

    Reference: Park, Yun, Kim, Kim, Jang, Jeong, Jo, Lee, "Direct Unlearning Optimization for Robust
    and Safe Text-to-Image Models", 2024, arXiv 2407.21035. Its code draws a time for each image of
    a pair; here they share it, as in the paper.
    """

    beta: Number = number(500.0)
    preserve: Number = number(0.0)
    null_cond: PyTree = None
    weighting: Weighting = Uniform()
    time_law: TimeLaw = UniformTime()

    def __check_init__(self):
        check_number("beta", self.beta, above=0.0)
        check_number("preserve", self.preserve, least=0.0)
        if not (isinstance(self.preserve, float) and self.preserve == 0):
            check_null_cond(self.null_cond)
        check_kind("weighting", self.weighting, Weighting, "losses.Uniform()")
        check_kind("time_law", self.time_law, TimeLaw, "losses.UniformTime()")

    def __call__(
        self, model: Denoiser, key: PRNGKeyArray, batch: dict[str, Any], frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the denoiser that forgets.
            key: typed key; example i draws from its fold_in with i.
            batch: with "forget", which has "safe" `(F, *event)` beside "x" and "cond".
            frozen: holds the teacher.

        Returns:
            The scalar loss; "margin", the mean of the brackets; and "noise", the second term
            without its factor.
        """
        check_denoiser(model)
        teacher, rows = teacher_of(frozen, model), forget_of(batch)
        found = jnp.shape(rows["safe"]) if "safe" in rows else "none"
        if found != jnp.shape(rows["x"]):
            raise ValueError(
                "`batch['forget']` must have a safe version of every example as 'safe', of shape "
                f"{jnp.shape(rows['x'])}, got {found}."
            )
        time_key, noise_key, end_key = jax.random.split(key, 3)
        process, x, cond = model.process, rows["x"], rows["cond"]
        levels = stratified_uniform(time_key, len(x))
        t = self.time_law.quantile(process, levels).astype(time_dtype(x))
        density = self.time_law.density(process, t)

        def normal(key, i):
            return jax.random.normal(jax.random.fold_in(key, i), x.shape[1:], x.dtype)

        def errors(denoiser, x0):
            def noised(i, x0, t):
                return process.marginal(x0, normal(noise_key, i), t).astype(x.dtype)

            seen = Seen(jax.vmap(noised)(jnp.arange(len(x)), x0, t), t, density)
            return seen.error(self.weighting, model, asked(denoiser, seen.x, t, cond) - x0)

        def excess(x0):
            return errors(model, x0) - jax.lax.stop_gradient(errors(teacher, x0))

        margin = excess(rows["safe"]) - excess(x)
        loss = -jax.nn.log_sigmoid(-self.beta * margin).mean()
        end = jnp.full_like(t, process.t_max)

        def prior(i):
            own = jax.random.fold_in(end_key, i)
            return process.prior(own, x.shape[1:], end[0], x.dtype)

        z = jax.vmap(prior)(jnp.arange(len(x)))
        none = cond if self.null_cond is None else replaced(cond, self.null_cond)
        held = Seen(z, end, jnp.ones_like(end))
        same = jax.lax.stop_gradient(asked(teacher, z, end, none))
        moved = held.error(Uniform(X0()), model, asked(model, z, end, none) - same).mean()
        metrics = {"margin": margin.mean(), "noise": moved}
        return loss + self.preserve * moved, jax.lax.stop_gradient(metrics)
