"""Autoguidance: away from a weaker version of the same model."""

from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._tree import number
from jaxdiff.denoiser import Denoiser, DenoiserMap, Estimate, check_denoiser
from jaxdiff.guidance._scale import Scale, check_scale, extrapolated, scale_at


class Autoguidance(DenoiserMap):
    """D_weak + scale (D - D_weak), both under the same condition.

    Kind 1, with two children. The weak one is a smaller network, one that was trained for less
    long, or both, of the same process and data; no condition is needed. What maps inside remember
    is kept of both. Below 1 it is a blend: of two Gaussians of one covariance the one between, of
    noise, velocity and score by the same weights.

    Args:
        base: the model.
        weak: the weaker one, a denoiser of the same process and conditions.
        scale: 1 is the model; the paper's is about 2.

    Reference: Karras, Aittala, Kynkaanniemi, Lehtinen, Aila, Laine, "Guiding a Diffusion Model with
    a Bad Version of Itself", 2024, arXiv 2406.02507.
    """

    base: Denoiser
    weak: Denoiser
    scale: Scale = number(1.0)

    def __check_init__(self):
        check_denoiser(self.weak, "weak")
        check_scale(self.scale)

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        found = self.base.estimate(x, t, cond, key=key)
        weak = self.weak.estimate(x, t, cond, key=key)
        scale = scale_at(self.scale, self.process, t)
        guided = extrapolated(scale, self.process, x, t, found, weak)
        return guided.replace(notes={**found.notes, **weak.notes})
