"""Perturbed-attention guidance."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._tree import number
from jaxdiff.denoiser import Denoiser, DenoiserMap, Estimate, edit_taps, find_network
from jaxdiff.guidance._attention import check_attention, check_layers
from jaxdiff.guidance._scale import Scale, check_scale, scale_at


class _Identity(eqx.Module):
    """Every token attends to itself alone."""

    def __call__(self, weights: Array) -> Array:
        queries, keys = weights.shape[-2:]
        return jnp.broadcast_to(jnp.eye(queries, keys, dtype=weights.dtype), weights.shape)


class PerturbedAttention(DenoiserMap):
    """D + scale (D - D'), with D' of the network whose chosen attention maps are the identity.

    Kind 1, through taps. Needs no condition and no training; with classifier-free guidance, put
    this inside or outside of it. Of what `base` holds both evaluations cost the same.

    Args:
        base: a network's denoiser, or maps of one.
        scale: 0 is the model itself; the paper's is 3.
        layers: taps of self-attention layers, such as "mid.attn".

    Raises:
        TypeError: if there is no network inside.
        ValueError: when called, for layers that the network does not have.

    Reference: Ahn, Cho, Min, Jang, Kim, Kim, Park, Jin, Kim, "Self-Rectifying Diffusion Sampling
    with Perturbed-Attention Guidance", 2024, arXiv 2403.17377.
    """

    base: Denoiser
    scale: Scale = number(3.0)
    layers: tuple[str, ...] = eqx.field(static=True, default=("mid.attn",))

    def __check_init__(self):
        find_network(self.base)
        check_scale(self.scale)
        check_layers(self.layers)

    @property
    def evaluations(self) -> Array | int:
        """Twice the base denoiser's."""
        return 2 * self.base.evaluations

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        check_attention(self.base, self.layers, "weights", x, t, cond)
        found = self.base.estimate(x, t, cond, key=key)
        edits = {f"{layer}.weights": _Identity() for layer in self.layers}
        other = edit_taps(self.base, edits).estimate(x, t, cond, key=key)
        x0 = found.x0 + scale_at(self.scale, self.process, t) * (found.x0 - other.x0)
        return found.replace(x0=x0.astype(x.dtype))
