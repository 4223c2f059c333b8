"""A small network that reads an image out of another network's activations."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jaxdiff.networks._conv import Conv
from jaxdiff.networks._layers import image_shape, timestep_embedding, zeros


class TapAligner(nnx.Module):
    """Activations resized to one size, a convolution over all of them, and residual blocks.

    Resizing is bilinear, and averages where it makes smaller. The blocks add to what the first
    convolution makes, h + conv(SiLU(conv(SiLU(h + emb)))), and start as nothing. Without
    normalisation, so that brightness and contrast can be read.

    Args:
        channels: of the activations, images `(H, W, C)` of any size, by the names of their taps.
        image_size: height and width of the answer, one number or two.
        out_channels: channels of the answer.
        hidden: width; even, and at least 4.
        num_blocks: number of residual blocks.
        param_dtype: dtype of the weights.
        rngs: initialisation keys.

    Raises:
        ValueError: for no activations, or a `hidden` that is odd or below 4.

    Reference: the condition aligner of Liu, Li, Zhang, Luo, Liu, "LaCon: Late-Constraint Diffusion
    for Steerable Guided Image Synthesis", 2023, arXiv 2305.11520, with residual blocks in place of
    a chain with batch normalisation.
    """

    def __init__(
        self,
        channels: Mapping[str, int],
        *,
        image_size: int | tuple[int, int],
        out_channels: int,
        hidden: int = 64,
        num_blocks: int = 2,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not channels:
            raise ValueError("`channels` must name one activation at least, got none.")
        if hidden < 4 or hidden % 2:
            raise ValueError(f"`hidden` must be even and at least 4, got {hidden}.")
        kinds = {"param_dtype": param_dtype, "rngs": rngs}
        self.shape = image_shape(image_size, out_channels)
        self.taps = tuple(sorted(channels))
        self.emb = nnx.Linear(hidden, hidden, **kinds)
        self.first = Conv(sum(channels.values()), hidden, (1, 1), **kinds)
        self.blocks = nnx.List(
            nnx.List(
                [
                    Conv(hidden, hidden, (3, 3), **kinds),
                    Conv(hidden, hidden, (3, 3), kernel_init=zeros, **kinds),
                ]
            )
            for _ in range(num_blocks)
        )
        self.last = Conv(hidden, out_channels, (1, 1), **kinds)
        self.hidden = hidden

    def __call__(self, taps: Mapping[str, Array], t: Array) -> Array:
        """The image `(h, w, out_channels)`.

        Args:
            taps: activations `(H, W, C)` by name; others are not looked at.
            t: scalar noise label.

        Raises:
            ValueError: for a missing activation, or one that is no image.
        """
        for name in self.taps:
            if name not in taps or jnp.ndim(taps[name]) != 3:
                got = f"shape {jnp.shape(taps[name])}" if name in taps else f"{sorted(taps)}"
                raise ValueError(f"`taps` must have {name!r}, an image (H, W, C), got {got}.")
        size = self.shape[:2]
        resized = [
            jax.image.resize(taps[name], (*size, taps[name].shape[-1]), "bilinear")
            for name in self.taps
        ]
        h = self.first(jnp.concatenate(resized, -1))
        emb = self.emb(timestep_embedding(t, self.hidden)).astype(h.dtype)
        for first, second in self.blocks:
            h = h + second(nnx.silu(first(nnx.silu(h + emb))))
        return self.last(h)
