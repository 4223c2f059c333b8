"""The diffusion transformer."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from jaxdiff.networks._layers import NoiseEmbedding, attend, dropout, fold, zeros
from jaxdiff.taps import Tap

DIT_SIZES = {
    "S": {"hidden": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden": 1152, "depth": 28, "num_heads": 16},
}
"""The paper's sizes (table 1), as keyword arguments: `DiT(**DIT_SIZES["S"], patch_size=2, ...)`."""


def position_embedding(height: int, width: int, size: int, dtype: Any = jnp.float32) -> Array:
    """Fixed sine-cosine embedding of a grid: half of the features for rows, half for columns.

    Returns:
        `(height * width, size)`; `size` divisible by 4.
    """
    rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    frequencies = 10_000.0 ** (-jnp.arange(size // 4) / (size // 4))

    def encode(positions):
        angles = positions.reshape(-1, 1) * frequencies
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)

    return jnp.concatenate([encode(rows), encode(columns)], axis=-1).astype(dtype)


class DiTBlock(nnx.Module):
    """Attention and MLP, each normalised, shifted, scaled and gated by the embedding."""

    def __init__(self, hidden: int, num_heads: int, mlp_ratio: int, rate: float, **kinds: Any):
        self.num_heads, self.rate = num_heads, rate
        bare = {"use_scale": False, "use_bias": False, "epsilon": 1e-6}
        self.norm1 = nnx.LayerNorm(hidden, **bare, **kinds)
        self.norm2 = nnx.LayerNorm(hidden, **bare, **kinds)
        self.qkv = nnx.Linear(hidden, 3 * hidden, **kinds)
        self.out = nnx.Linear(hidden, hidden, **kinds)
        self.first = nnx.Linear(hidden, mlp_ratio * hidden, **kinds)
        self.second = nnx.Linear(mlp_ratio * hidden, hidden, **kinds)
        # Zero weights: all gates are closed at the start, and the block is the identity.
        self.modulation = nnx.Linear(hidden, 6 * hidden, kernel_init=zeros, **kinds)

    def __call__(
        self, tap: Tap, name: str, h: Array, emb: Array, key: PRNGKeyArray | None
    ) -> Array:
        """One block; h `(tokens, hidden)`, emb `(hidden,)`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(self.modulation(nnx.silu(emb)), 6)
        inner = self.qkv(self.norm1(h) * (1 + scale1) + shift1)
        inner = attend(*jnp.split(inner, 3, axis=-1), self.num_heads, f"{name}.attn", tap)
        h = h + gate1 * tap(f"{name}.attn", self.out(inner))
        inner = self.first(self.norm2(h) * (1 + scale2) + shift2)
        inner = self.second(dropout(nnx.gelu(inner), self.rate, key))
        return tap(name, h + gate2 * inner)


class DiT(nnx.Module):
    """The diffusion transformer with adaLN-Zero.

    Taps: "patches"; "block.i" and "block.i.attn" with ".q", ".k", ".v", ".weights".

    Args:
        image_size: height and width of the example.
        patch_size: divides `image_size`.
        in_channels: channels of the example.
        out_channels: channels of the output; None for `in_channels`.
        hidden: width, divisible by 4 and by `num_heads`.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width of the MLP in units of `hidden`.
        num_classes: number of classes, or None.
        dropout: dropout rate in the MLPs.
        remat: recompute each block in the backward pass.
        dtype: compute dtype; None follows the input and the weights.
        param_dtype: dtype of the weights.
        rngs: initialisation keys.

    Raises:
        ValueError: if `image_size`, `patch_size`, `hidden` and `num_heads` do not fit.

    Reference: Peebles, Xie, "Scalable Diffusion Models with Transformers", 2022,
    arXiv 2212.09748, section 3. The time embedding has `hidden` sinusoidal features (there 256).
    """

    def __init__(
        self,
        *,
        image_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 3,
        out_channels: int | None = None,
        hidden: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: int = 4,
        num_classes: int | None = None,
        dropout: float = 0.0,
        remat: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if image_size % patch_size or hidden % num_heads or hidden % 4:
            raise ValueError(
                "`patch_size` must divide `image_size`, and `num_heads` and 4 must divide "
                f"`hidden`; got {image_size=}, {patch_size=}, {hidden=}, {num_heads=}."
            )
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.image_size, self.patch_size, self.remat = image_size, patch_size, remat
        self.in_channels, self.out_channels = in_channels, out_channels or in_channels
        self.hidden = hidden
        self.embedding = NoiseEmbedding(hidden, hidden, num_classes, **kinds)
        self.patches = nnx.Linear(patch_size**2 * in_channels, hidden, **kinds)
        self.blocks = nnx.List(
            DiTBlock(hidden, num_heads, mlp_ratio, dropout, **kinds) for _ in range(depth)
        )
        bare = {"use_scale": False, "use_bias": False, "epsilon": 1e-6}
        self.norm = nnx.LayerNorm(hidden, **bare, **kinds)
        self.modulation = nnx.Linear(hidden, 2 * hidden, kernel_init=zeros, **kinds)
        patch = patch_size**2 * self.out_channels
        self.last = nnx.Linear(hidden, patch, kernel_init=zeros, **kinds)

    def __call__(
        self,
        x: Array,
        t: Array,
        cond: Array | None = None,
        *,
        key: PRNGKeyArray | None = None,
        tap: Tap | None = None,
    ) -> Array:
        """Output `(H, W, out_channels)` for one example `(H, W, in_channels)`.

        Raises:
            ValueError: if x has another shape, or `cond` does not fit `num_classes`.
        """
        expected = (self.image_size, self.image_size, self.in_channels)
        if x.shape != expected:
            raise ValueError(
                f"`x` must be one example of shape {expected}, got {x.shape}. "
                "Use jax.vmap for a batch."
            )
        tap = Tap() if tap is None else tap
        p, grid = self.patch_size, self.image_size // self.patch_size
        patches = x.reshape(grid, p, grid, p, -1).transpose(0, 2, 1, 3, 4).reshape(grid**2, -1)
        h = self.patches(patches)
        # A noise label of wider dtype than x must not widen the whole network.
        emb = self.embedding(t, cond).astype(h.dtype)
        h = tap("patches", h + position_embedding(grid, grid, self.hidden, h.dtype))
        for i, block in enumerate(self.blocks):

            def run(tap, block, h, emb, key, i=i):
                return block(tap, f"block.{i}", h, emb, key)

            args = (block, h, emb, fold(key, i))
            h = tap.checkpoint(run, *args) if self.remat else run(tap, *args)
        shift, scale = jnp.split(self.modulation(nnx.silu(emb)), 2)
        out = self.last(self.norm(h) * (1 + scale) + shift)
        out = out.reshape(grid, grid, p, p, self.out_channels).transpose(0, 2, 1, 3, 4)
        return out.reshape(self.image_size, self.image_size, self.out_channels).astype(x.dtype)
