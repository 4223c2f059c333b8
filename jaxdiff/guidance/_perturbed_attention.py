"""Perturbed-attention guidance."""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff._tree import number
from jaxdiff.denoiser import Denoiser
from jaxdiff.guidance._attention import AgainstEdited
from jaxdiff.guidance._scale import Scale


class _Identity(eqx.Module):
    """Every token attends to itself alone."""

    def __call__(self, weights: Array) -> Array:
        queries, keys = weights.shape[-2:]
        return jnp.broadcast_to(jnp.eye(queries, keys, dtype=weights.dtype), weights.shape)


class PerturbedAttention(AgainstEdited):
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

    part: ClassVar[str] = "weights"

    def edit(self, x: Array) -> _Identity:
        """See `AgainstEdited`."""
        return _Identity()
