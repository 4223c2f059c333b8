"""Adaptive projected guidance."""

import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, number
from jaxdiff.denoiser import Denoiser, Estimate
from jaxdiff.guidance._scale import Scale, WithNull, check_scale, inner, norm
from jaxdiff.guidance._scale import scale_at as at
from jaxdiff.stepwise import Stepwise


class AdaptiveProjected(Stepwise, WithNull):
    """D_cond + (scale - 1)(z_perp + parallel z_par): the guidance that does not saturate.

    Kind 2: remembers its direction from step to step. z = (D_cond - D_null) + momentum z_before,
    shortened to a norm of `radius`, and split into its part along D_cond, which raises contrast,
    and the rest. Norms are of one example, over all its numbers.

    In the limit of many steps a momentum b is the scale 1 + (scale - 1) / (1 - b) and nothing
    else: what it does beyond that depends on the number of steps.

    Args:
        base: a denoiser trained with label dropout.
        null_cond: as of `ClassifierFree`.
        scale: as of `ClassifierFree`.
        momentum: the paper's is negative, -0.75 to -0.5; 0 remembers nothing.
        radius: longest z, as a root mean square over the numbers of an example, so that it does
            not depend on their count; infinity does not shorten.
        parallel: weight of the part along D_cond; 1 keeps it.

    Reference: Sadat, Hilliges, Weber, "Eliminating Oversaturation and Artifacts of High Guidance
    Scales in Diffusion Models", 2024, arXiv 2410.02416. The radius there is a norm.
    """

    base: Denoiser
    null_cond: PyTree
    scale: Scale = number(1.0)
    momentum: Number = number(-0.5)
    radius: Number = number(float("inf"))
    parallel: Number = number(0.0)

    def __check_init__(self):
        check_scale(self.scale)
        check_number("momentum", self.momentum, below=1.0)
        check_number("radius", self.radius, least=0.0, finite=False)
        check_number("parallel", self.parallel)

    def init_memory(self, x: Array) -> Array:
        """The direction so far: none."""
        return jnp.zeros_like(x)

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        given, none = self.both(x, t, cond, key)
        z = given.x0 - none.x0 + self.momentum * self.step.memory
        length = norm(z) / x.size**0.5
        there = length > self.radius
        short = z * jnp.where(there, self.radius / jnp.where(there, length, 1), 1)
        size = inner(given.x0, given.x0)
        share = inner(short, given.x0) / jnp.where(size > 0, size, 1)
        along = share * given.x0
        push = (at(self.scale, self.process, t) - 1) * (short - along + self.parallel * along)
        found = given.moved(self.process, t, given.x0 + push)
        return self.remember(found, z.astype(x.dtype))
