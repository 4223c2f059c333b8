"""Smoothed-energy guidance."""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff._checks import check_number
from jaxdiff._tree import Number, number
from jaxdiff.denoiser import Denoiser
from jaxdiff.guidance._attention import AgainstEdited, grid_of
from jaxdiff.guidance._blur import blur
from jaxdiff.guidance._scale import Scale


class _Blurred(eqx.Module):
    """Queries, blurred over the grid of tokens."""

    width: Number
    shape: tuple[int, ...] = eqx.field(static=True)

    def __call__(self, q: Array) -> Array:
        grid = grid_of(len(q), self.shape)
        return blur(q.reshape(*grid, -1), self.width).reshape(q.shape)


class SmoothedEnergy(AgainstEdited):
    """D + scale (D - D'), with D' of the network whose queries are blurred over the tokens' grid.

    Kind 1, through taps. A blur of the queries is one of the attention's logits, whose energy it
    smooths; of infinite width all tokens ask the same.

    Args:
        base: a network's denoiser, or maps of one.
        scale: 0 is the model itself; the paper's is 3.
        width: standard deviation of the blur in tokens; 0 changes nothing, infinity is the mean.
        layers: taps of self-attention layers, such as "mid.attn".

    Raises:
        TypeError: if there is no network inside.
        ValueError: when called, for layers that the network does not have, or tokens that are no
            grid.

    Reference: Hong, "Smoothed Energy Guidance: Guiding Diffusion Models with Reduced Energy
    Curvature of Attention", 2024, arXiv 2408.00760.
    """

    base: Denoiser
    scale: Scale = number(3.0)
    width: Number = number(float("inf"))
    layers: tuple[str, ...] = eqx.field(static=True, default=("mid.attn",))

    part: ClassVar[str] = "q"

    def __check_init__(self):
        check_number("width", self.width, least=0.0, finite=False)

    def edit(self, x: Array) -> _Blurred:
        """See `AgainstEdited`."""
        return _Blurred(jnp.asarray(self.width), x.shape)
