"""Guidance whose answer keeps the contrast of the conditional one."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxdiff._checks import check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.denoiser import Denoiser
from jaxdiff.guidance._scale import PairRule, Scale, check_scale, scale_at, spread
from jaxdiff.predictions import Prediction, V


class RescaledClassifierFree(PairRule):
    """Classifier-free guidance, scaled back towards the standard deviation of the conditional one.

    Kind 1. With m = m_null + scale (m_cond - m_null) in the prediction that is rescaled,
    m' = m std(m_cond) / std(m), and the answer is mix m' + (1 - mix) m. Standard deviations are
    over all numbers of an example.

    Args:
        base: a denoiser trained with label dropout.
        null_cond: as of `ClassifierFree`.
        scale: as of `ClassifierFree`; the paper's is 7.5.
        mix: 0 is plain guidance, 1 rescales in full.
        prediction: in which it is rescaled, which matters: the paper's networks predict v.

    Reference: Lin, Liu, Li, Yang, "Common Diffusion Noise Schedules and Sample Steps are Flawed",
    2023, arXiv 2305.08891, section 3.4.
    """

    base: Denoiser
    null_cond: PyTree
    scale: Scale = number(1.0)
    mix: Number = number(0.7)
    prediction: Prediction = eqx.field(default=V(), kw_only=True)

    def __check_init__(self):
        check_scale(self.scale)
        check_number("mix", self.mix)
        check_kind("prediction", self.prediction, Prediction, "predictions.V()")

    def combine(self, x: Array, t: Array, given: Array, none: Array) -> Array:
        """See `PairRule`."""
        process, scale = self.process, scale_at(self.scale, self.process, t)
        positive = self.prediction.from_x0(process, x, t, given)
        guided = self.prediction.from_x0(process, x, t, none + scale * (given - none))
        size = spread(guided)
        there = size > 0
        ratio = spread(positive) / jnp.where(there, size, 1)
        factor = self.mix * jnp.where(there, ratio, 1) + 1 - self.mix
        return self.prediction.to_x0(process, x, t, factor * guided)
