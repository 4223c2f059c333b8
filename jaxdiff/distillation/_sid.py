"""Score identity distillation: a generator by the Fisher divergence of two denoisers."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxdiff._checks import check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.denoiser import Denoiser
from jaxdiff.distillation._generated import start_times
from jaxdiff.distillation._matching import DistributionMatching
from jaxdiff.distillation._shared import scale_range
from jaxdiff.losses import Karras, TimeLaw
from jaxdiff.losses._batch import wide
from jaxdiff.losses._frozen import said_by


class SiD(DistributionMatching):
    """<p - s, (p - x_g) - alpha (p - s)> / mean |p - x_g|, p and s the teacher's and fake denoiser.

    Both at x_t of what the generator makes, **and the gradient goes through x_t inside both**: with
    respect to the generator, their own weights are constants, and so is the normaliser. A sum over
    the numbers of an example. Where s is exact, <p - s, p - x_g> has the mean |p - s|^2, and the
    loss (1 - alpha) |p - s|^2: not a distance for alpha > 1, so watch "gap" instead. One pass of
    the generator, one of each denoiser; no data.

    **Fixed point**: the teacher's law, where p = s and the mean gradient is 0.

    **Sign**: for a Gaussian teacher of variance tau^2 and a generator of the same mean and standard
    deviation s, d loss / ds = -2 s D ((1 - a_tau) + alpha D) at one level, with
    a_s = s^2 / (s^2 + sigma^2) and D = a_tau - a_s. For alpha <= 1 it draws s to tau. For alpha > 1
    it drives s away where alpha a_s - (alpha - 1) a_tau > 1: a generator much too wide at a small
    noise level, s >> sigma >> tau. Start from the teacher, and with levels that are not all small.

    Args:
        alpha: the published 1.2, or 1.0.
        time_law: of the noise level; the published one is `Karras()` to a level of about 13.
        start: as of `DiffInstruct`; the published level is 2.5, the time
            `process.time(-2 * log(2.5))`, where the teacher is the first generator. That of
            `FakeScoreLoss` too.
        scales: as of `DiffInstruct`.
        normalise: divide by mean |p - x_g|.
        floor: of that, > 0.

    Raises:
        TypeError: when called, for a generator that is no `FlowMap`.
        ValueError: when called, without a "teacher" or a "fake", or of another process.

    Reference: Zhou, Zheng, Wang, Yin, Huang, "Score identity Distillation: Exponentially Fast
    Distillation of Pretrained Diffusion Models for One-Step Generation", 2024, arXiv 2404.04057,
    algorithm 1.
    """

    alpha: Number = number(1.2)
    time_law: TimeLaw = Karras()
    start: tuple[Number, ...] | None = start_times()
    scales: tuple[Number, Number] | None = scale_range()
    normalise: bool = eqx.field(static=True, default=True)
    floor: Number = number(1e-5)

    def __check_init__(self):
        check_number("alpha", self.alpha)
        check_number("floor", self.floor, above=0.0)
        check_kind("time_law", self.time_law, TimeLaw, "losses.Karras()")

    def per_example(
        self,
        fake: Any,
        teacher: Denoiser,
        x0: Array,
        eps: Array,
        t: Array,
        fake_cond: PyTree = None,
        teacher_cond: PyTree = None,
    ) -> tuple[Array, Array]:
        """See `DistributionMatching`: gradients go through x0, and x_t in both denoisers."""
        x = teacher.process.marginal(x0, eps, t).astype(x0.dtype)
        target, own = wide(said_by(teacher, x, t, teacher_cond)), wide(fake(x, t, fake_cond))
        difference, residual = target - own, target - wide(x0)
        loss = jnp.sum(difference * (residual - self.alpha * difference))
        if self.normalise:
            size = jax.lax.stop_gradient(jnp.mean(jnp.abs(residual)))
            loss = loss / jnp.maximum(size, self.floor)
        return loss, jax.lax.stop_gradient(jnp.mean(difference**2))
