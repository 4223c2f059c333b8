"""The diffusion transformer."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from jaxdiff.networks._layers import (
    Attention,
    Block,
    ConditionEmbedding,
    Network,
    arguments_of,
    check_rate,
    dropout,
    fold,
    image_shape,
    remat_policy,
    zeros,
)
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


class DiTBlock(Block):
    """Attention and MLP, each normalised, shifted, scaled and gated by the embedding.

    With a context, attention to its tokens comes in between, without modulation.
    """

    def __init__(
        self,
        hidden: int,
        num_heads: int,
        mlp_ratio: int,
        rate: float,
        *,
        token_size: int | None = None,
        attention: str = "plain",
        **kinds: Any,
    ):
        self.rate = rate
        bare: dict[str, Any] = {"use_scale": False, "use_bias": False, "epsilon": 1e-6}
        self.norm1 = nnx.LayerNorm(hidden, **bare, **kinds)
        self.norm2 = nnx.LayerNorm(hidden, **bare, **kinds)
        self.attention = Attention(hidden, num_heads, implementation=attention, **kinds)
        crosses = token_size is not None
        options = {"implementation": attention, "out_init": zeros, **kinds}
        self.cross_norm: Any = nnx.LayerNorm(hidden, **bare, **kinds) if crosses else None
        self.cross: Any = (
            Attention(hidden, num_heads, context_size=token_size, **options) if crosses else None
        )
        self.first = nnx.Linear(hidden, mlp_ratio * hidden, **kinds)
        self.second = nnx.Linear(mlp_ratio * hidden, hidden, **kinds)
        # Zero weights: all gates are closed at the start, and the block is the identity.
        self.modulation = nnx.Linear(hidden, 6 * hidden, kernel_init=zeros, **kinds)

    def __call__(
        self,
        tap: Tap,
        name: str,
        h: Array,
        emb: Array,
        key: PRNGKeyArray | None,
        tokens: Array | None = None,
        mask: Array | None = None,
    ) -> Array:
        """One block; h `(tokens, hidden)`, emb `(hidden,)`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(self.modulation(nnx.silu(emb)), 6)
        inner = self.norm1(h) * (1 + scale1) + shift1
        h = h + gate1 * self.attention(tap, f"{name}.attn", inner)
        if tokens is not None:
            context = tokens.astype(h.dtype)
            h = h + self.cross(tap, f"{name}.cross", self.cross_norm(h), context, mask)
        inner = self.first(self.norm2(h) * (1 + scale2) + shift2)
        inner = self.second(dropout(nnx.gelu(inner), self.rate, key))
        return tap(name, h + gate2 * inner)


class DiT(Network):
    """The diffusion transformer with adaLN-Zero.

    Taps: "emb"; "patches"; "block.i" and "block.i.attn" with ".q", ".k", ".v", ".weights", and
    with tokens "block.i.cross" with the same.

    Args:
        image_size: height and width of the example, one number or two.
        patch_size: divides both.
        in_channels: channels of the example.
        out_channels: channels of the output; None for `in_channels`.
        hidden: width, divisible by 4 and by `num_heads`; the size of the embedding, too.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width of the MLP in units of `hidden`.
        num_classes: number of classes, or None; see `Network` for this and the next three.
        label_size: size of a vector label, or None.
        scalars: names of scalar conditions.
        token_size: size of the tokens that blocks attend to as well, or None.
        num_words: number of words whose tokens are learned, or None; see `Network`.
        dropout: dropout rate in the MLPs, in [0, 1).
        stacked: whether the blocks' weights are stacked, `(depth, ...)` each, and the blocks run
            as one `lax.scan`: programs and compile times that do not grow with the depth. Not the
            same checkpoints.
        attention: how attention is computed, see `attend`.
        remat: recompute each block in the backward pass; or what to keep of it, by the name of a
            policy of `jax.checkpoint_policies`.
        dtype: compute dtype; None follows the input and the weights.
        param_dtype: dtype of the weights.
        rngs: initialisation keys.

    Raises:
        ValueError: if `image_size`, `patch_size`, `hidden` and `num_heads` do not fit, or for an
            unknown name.

    Reference: Peebles, Xie, "Scalable Diffusion Models with Transformers", 2022,
    arXiv 2212.09748, section 3. The time embedding has `hidden` sinusoidal features (there 256).
    Attention to tokens is placed as by Chen et al., "PixArt-alpha: Fast Training of Diffusion
    Transformer for Photorealistic Text-to-Image Synthesis", 2023, arXiv 2310.00426, section 2.3.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 3,
        out_channels: int | None = None,
        hidden: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: int = 4,
        num_classes: int | None = None,
        label_size: int | None = None,
        scalars: Sequence[str] = (),
        token_size: int | None = None,
        num_words: int | None = None,
        dropout: float = 0.0,
        stacked: bool = False,
        attention: Literal["plain", "xla", "cudnn"] = "plain",
        remat: bool | str = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.arguments = arguments_of(locals())
        self.shape = image_shape(image_size, in_channels)
        height, width, _ = self.shape
        if height % patch_size or width % patch_size or hidden % num_heads or hidden % 4:
            raise ValueError(
                "`patch_size` must divide `image_size`, and `num_heads` and 4 must divide "
                f"`hidden`; got {image_size=}, {patch_size=}, {hidden=}, {num_heads=}."
            )
        check_rate(dropout)
        remat_policy(remat)
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.patch_size, self.remat, self.stacked = patch_size, remat, stacked
        self.grid = (height // patch_size, width // patch_size)
        self.hidden, self.depth = hidden, depth
        self.embedding = ConditionEmbedding(
            hidden, hidden, num_classes=num_classes, label_size=label_size, scalars=scalars,
            token_size=token_size, num_words=num_words, **kinds,
        )  # fmt: skip
        self.patches = nnx.Linear(patch_size**2 * in_channels, hidden, **kinds)

        def block(kinds):
            return DiTBlock(
                hidden, num_heads, mlp_ratio, dropout, token_size=token_size, attention=attention,
                **kinds,
            )  # fmt: skip

        if stacked:
            # One program makes all of them.
            keys = jax.random.split(rngs.params(), depth)
            self.blocks = jax.vmap(lambda key: block(kinds | {"rngs": nnx.Rngs(key)}))(keys)
        else:
            self.blocks = nnx.List(block(kinds) for _ in range(depth))
        bare: dict[str, Any] = {"use_scale": False, "use_bias": False, "epsilon": 1e-6}
        self.norm = nnx.LayerNorm(hidden, **bare, **kinds)
        self.modulation = nnx.Linear(hidden, 2 * hidden, kernel_init=zeros, **kinds)
        patch = patch_size**2 * (out_channels or in_channels)
        self.last = nnx.Linear(hidden, patch, kernel_init=zeros, **kinds)

    def forward(
        self,
        tap: Tap,
        x: Array,
        emb: Array,
        key: PRNGKeyArray | None,
        tokens: Array | None,
        token_mask: Array | None,
    ) -> Array:
        """See `Network`: `(H, W, out_channels)`."""
        p, (rows, columns) = self.patch_size, self.grid
        patches = x.reshape(rows, p, columns, p, -1).transpose(0, 2, 1, 3, 4)
        h = self.patches(patches.reshape(rows * columns, -1))
        # A noise label of wider dtype than x must not widen the whole network.
        emb = emb.astype(h.dtype)
        h = tap("patches", h + position_embedding(rows, columns, self.hidden, h.dtype))
        if self.stacked:

            def layer(tap, block, h, i):
                block = self.at_use(block, "blocks", self.depth)
                return block(tap, "", h, emb, fold(key, i), tokens, token_mask)

            h = tap.scan(layer, self.blocks, h, prefix="block", remat=self.remat)
        else:
            for i, block in enumerate(self.blocks):

                def run(tap, block, h, emb, key, i=i):
                    block = self.at_use(block, "blocks")
                    return block(tap, f"block.{i}", h, emb, key, tokens, token_mask)

                h = tap.run(run, block, h, emb, fold(key, i), remat=self.remat)
        shift, scale = jnp.split(self.modulation(nnx.silu(emb)), 2)
        out = self.last(self.norm(h) * (1 + scale) + shift)
        out = out.reshape(rows, columns, p, p, -1).transpose(0, 2, 1, 3, 4)
        return out.reshape(*self.shape[:2], -1)
