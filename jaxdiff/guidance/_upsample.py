"""Upsample guidance: a model of small images, at several times their size."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_count, check_number
from jaxdiff._tree import Number, number
from jaxdiff.denoiser import Denoiser, DenoiserMap, Estimate
from jaxdiff.geometry import coarse_state, downsample
from jaxdiff.guidance._scale import Scale, check_scale, scale_at


class UpsampleGuidance(DenoiserMap):
    """D + scale U [sqrt(power) D_small(c P x_t, tau) - P D]: P means over blocks, U their inverse.

    Block means of x_t are noisy images of the size that the model was trained at, at the cleaner
    time tau of `geometry.adjusted_time`; c is their intensity. So the model, called at the large
    size, is guided by what it knows at the small one. At scale 1 block means of the estimate are
    the small image's. In eps it is the paper's scale U [eps(c P x_t, tau) / m - P eps].

        large = dataclasses.replace(small, network=small.network.resized(16))
        guided = UpsampleGuidance(large, small)

    Kind 1, with two children. Two evaluations, of which one is of 1 / factor^2 as many pixels;
    below `t_low`, where details are made, one.

    Args:
        base: a denoiser of large images: the same weights, as of `networks.UNet.resized`, or any.
        small: a denoiser of the size that was trained, of the same process and conditions.
        factor: m, of height and width.
        power: variance of block means over that of pixels, `geometry.relative_power`; 1 for smooth
            images.
        scale: 1 is the paper's.
        t_low: times at or below are left alone.

    Raises:
        ValueError: when called, for images that the factor does not divide.

    Reference: Hwang, Park, Jo, "Upsample Guidance: Scale Up Diffusion Models without Training",
    2024, arXiv 2404.01709; tau and c in closed form, of any process.
    """

    base: Denoiser
    small: Denoiser
    factor: int = eqx.field(static=True, default=2)
    power: Number = number(1.0)
    scale: Scale = number(1.0)
    t_low: Number = number(0.0)

    same_network: ClassVar[tuple[str, ...]] = ("base", "small")

    def __check_init__(self):
        check_count("factor", self.factor)
        check_number("power", self.power, above=0.0, most=1.0)
        check_scale(self.scale)
        check_number("t_low", self.t_low)

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`; what maps inside remember is of the large image."""
        if x.ndim != 3:
            raise ValueError(f"`x` must be an image (H, W, C), got shape {x.shape}.")
        found = self.base.estimate(x, t, cond, key=key)

        def guided():
            state, tau = coarse_state(self.process, x, t, self.factor, self.power)
            coarse = self.small.estimate(state, tau, cond, key=key).x0
            gap = jnp.sqrt(self.power) * coarse - downsample(found.x0, self.factor)
            wide = jnp.repeat(jnp.repeat(gap, self.factor, 0), self.factor, 1)
            return (found.x0 + scale_at(self.scale, self.process, t) * wide).astype(x.dtype)

        # Skipped where the grid is shared.
        x0 = jax.lax.cond(t > self.t_low, guided, lambda: found.x0)
        return found.moved(self.process, t, x0)
