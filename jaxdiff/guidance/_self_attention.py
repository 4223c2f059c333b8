"""Self-attention guidance."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, number
from jaxdiff.denoiser import Denoiser, DenoiserMap, Estimate, find_network, reading
from jaxdiff.guidance._attention import check_attention, check_layers, grid_of
from jaxdiff.guidance._blur import blur
from jaxdiff.guidance._scale import Scale, check_scale, scale_at
from jaxdiff.predictions import Eps


class SelfAttention(DenoiserMap):
    """eps' + (1 + scale)(eps - eps'), eps' of the example blurred where the network attends.

    Kind 1, through taps. The mask is where tokens receive more attention than one token gives,
    mean over heads, in the size of the image by nearest neighbours; x0 is blurred there, and
    noised again with the same eps, x' = alpha x0' + sigma eps. eps' is evaluated at x', another
    point than x: what comes out is no denoiser of a guided law.

    Args:
        base: a network's denoiser, or maps of one, of images.
        scale: 0 is the model itself; the paper's is 0.5 to 0.8 without conditions.
        width: standard deviation of the blur in pixels; the paper's 9 is for 256 of them.
        threshold: of the attention that a token receives.
        layer: tap of a self-attention layer.

    Raises:
        TypeError: if there is no network inside.
        ValueError: when called, for a layer that the network does not have, or tokens that are no
            grid.

    Reference: Hong, Lee, Jang, Kim, "Improving Sample Quality of Diffusion Models Using
    Self-Attention Guidance", 2023, arXiv 2210.00939, algorithm 1.
    """

    base: Denoiser
    scale: Scale = number(0.5)
    width: Number = number(1.0)
    threshold: Number = number(1.0)
    layer: str = eqx.field(static=True, default="mid.attn")

    def __check_init__(self):
        find_network(self.base)
        check_scale(self.scale)
        check_number("width", self.width, least=0.0, finite=False)
        check_number("threshold", self.threshold)
        check_layers((self.layer,))

    @property
    def evaluations(self) -> Array | int:
        """Twice the base denoiser's."""
        return 2 * self.base.evaluations

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        check_attention(self.base, (self.layer,), "weights", x, t, cond)
        name = f"{self.layer}.weights"
        found = reading(self.base, (name,)).estimate(x, t, cond, key=key)
        received = jnp.sum(jnp.mean(found.taps[name], 0), 0)
        mask = (received > self.threshold).reshape(grid_of(len(received), x.shape))
        mask = jax.image.resize(mask.astype(x.dtype), x.shape[:2], "nearest")[..., None]
        process = self.process
        alpha, sigma = process.alpha(t), process.sigma(t)
        eps = Eps().from_x0(process, x, t, found.x0)
        blurred = mask * blur(found.x0, jnp.asarray(self.width)) + (1 - mask) * found.x0
        moved = (alpha * blurred + sigma * eps).astype(x.dtype)
        other = self.base.estimate(moved, t, cond, key=key)
        eps_other = Eps().from_x0(process, moved, t, other.x0)
        guided = eps_other + (1 + scale_at(self.scale, process, t)) * (eps - eps_other)
        x0 = Eps().to_x0(process, x, t, guided)
        taps = {k: v for k, v in found.taps.items() if k != name}
        return found.moved(process, t, x0).replace(taps=taps)
