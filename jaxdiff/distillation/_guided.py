"""Distillation of guidance into one pass of a student that is told the scale."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff._checks import check_kind
from jaxdiff._tree import Number
from jaxdiff.denoiser import Denoiser, check_denoiser
from jaxdiff.distillation._shared import (
    at_scale,
    noised,
    scale_range,
    told_scale,
)
from jaxdiff.losses import TimeLaw, TruncatedSNR, UniformTime, Weighting, each_example
from jaxdiff.losses._batch import wide
from jaxdiff.losses._frozen import said_by, teacher_of


class GuidedDistillation(eqx.Module):
    """A student that says in one pass what a guided teacher says in two, at every scale.

        mean of weight(t) |D(x_t, t, cond, w) - D_w(x_t, t, cond)|^2,    w ~ U(scales)

    The student is told w as the entry "scale" of its condition
    (`networks.UNet(scalars=("scale",))`). One pass of the student, and one of the guided teacher,
    which is two of its network.

    **Fixed point**: D_w for every w in the range, which for classifier-free guidance is linear in
    w. It is a denoiser like any other; fewer steps are the second stage, by
    `ProgressiveDistillation` with the same `scales` and this student for its teacher.

    Args:
        scales: guidance scales, drawn uniformly; the paper's w are these minus 1.
        weighting: factor on the error in x0.
        time_law: law of the training time.

    Raises:
        TypeError: when called, for a student or a teacher that is no denoiser.
        ValueError: for no scales; when called, without a teacher, or one without a `scale`, or of
            another process.

    Reference: Meng, Rombach, Gao, Kingma, Ermon, Ho, Salimans, "On Distillation of Guided
    Diffusion Models", 2022, arXiv 2210.03142, section 3.1.
    """

    scales: tuple[Number, Number] = scale_range()
    weighting: Weighting = TruncatedSNR()
    time_law: TimeLaw = UniformTime()

    def __check_init__(self):
        if self.scales is None:
            raise ValueError("`scales` must be (least, most), got None. Pass (1.0, 5.0), say.")
        check_kind("weighting", self.weighting, Weighting, "losses.TruncatedSNR()")
        check_kind("time_law", self.time_law, TimeLaw, "losses.UniformTime()")

    def __call__(
        self, model: Denoiser, key: Array, batch: dict[str, Any], frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the student, a denoiser.
            key: typed key; example i draws from its fold_in with i.
            batch: `{"x": (B, *event), "cond": pytree with leading axis B}`.
            frozen: with the guided "teacher".

        Returns:
            The scalar loss, and `{"x0_mse": mean error without the weight}`.
        """
        check_denoiser(model, "model")
        teacher, process = teacher_of(frozen, model), model.process

        def one(key, u, x0, cond):
            t = self.time_law.quantile(process, u)
            _, x, scale, own = noised(process, key, x0, t, self.scales)
            goal = jax.lax.stop_gradient(said_by(at_scale(teacher, scale), x, t, cond))
            answer = model(x, t, told_scale(cond, scale), key=own)
            error = jnp.mean(wide(answer - goal) ** 2)
            return self.weighting(process, t, self.time_law.density(process, t)) * error, error

        losses, errors = each_example(one, key, batch)
        return losses.mean(), {"x0_mse": errors.mean()}
