"""The UNet of DDPM and ADM."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from jaxdiff.networks._conv import Conv
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


class GroupNorm(nnx.GroupNorm):
    """Group normalisation of one `(H, W, C)` example: at most 32 groups of at least 4 channels."""

    def __init__(self, channels: int, **kinds: Any):
        fits = [g for g in range(1, 33) if channels % g == 0 and channels >= 4 * g]
        super().__init__(channels, num_groups=max(fits, default=1), **kinds)

    def __call__(self, x: Array) -> Array:
        """The normalised example, in float32 or wider: one multiply-add for each of its entries."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        count = x.shape[0] * x.shape[1] * self.group_size

        def mean(channels: Array) -> Array:
            groups = channels.reshape(self.num_groups, -1).sum(-1) / count
            return jnp.repeat(groups, self.group_size)

        mu, square = mean(wide.sum((0, 1))), mean((wide * wide).sum((0, 1)))
        scale: Any = self.scale
        bias: Any = self.bias
        gain = jax.lax.rsqrt(jnp.maximum(square - mu**2, 0.0) + self.epsilon) * scale[...]
        return (wide * gain + (bias[...] - mu * gain)).astype(x.dtype)


def upsample(x: Array) -> Array:
    """Nearest-neighbour upsampling by two."""
    return x.repeat(2, axis=0).repeat(2, axis=1)


def downsample(x: Array) -> Array:
    """Average pooling by two."""
    height, width, channels = x.shape
    return x.reshape(height // 2, 2, width // 2, 2, channels).mean((1, 3))


def _same(x: Array) -> Array:
    return x


RESAMPLE = {"up": upsample, "down": downsample, "same": _same}


class ResBlock(nnx.Module):
    """norm, SiLU, [resample], conv, embedding, norm, SiLU, dropout, conv, plus the skip."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        emb_size: int,
        *,
        rate: float,
        scale_shift: bool,
        skip_scale: float,
        resample: Literal["up", "down", "same"] = "same",
        **kinds: Any,
    ):
        self.rate, self.scale_shift = rate, scale_shift
        self.skip_scale, self.resample = skip_scale, resample
        self.norm1 = GroupNorm(in_channels, **kinds)
        self.conv1 = Conv(in_channels, channels, (3, 3), **kinds)
        self.modulation = nnx.Linear(emb_size, channels * (2 if scale_shift else 1), **kinds)
        self.norm2 = GroupNorm(channels, **kinds)
        self.conv2 = Conv(channels, channels, (3, 3), kernel_init=zeros, **kinds)
        narrow = in_channels == channels
        self.skip = None if narrow else Conv(in_channels, channels, (1, 1), **kinds)

    def __call__(self, x: Array, emb: Array, key: PRNGKeyArray | None) -> Array:
        """One block; x `(H, W, in_channels)`, emb `(emb_size,)`."""
        resample = RESAMPLE[self.resample]
        h = self.conv1(resample(nnx.silu(self.norm1(x))))
        modulation = self.modulation(nnx.silu(emb))
        if self.scale_shift:
            scale, shift = jnp.split(modulation, 2)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + modulation)
        h = self.conv2(dropout(nnx.silu(h), self.rate, key))
        x = resample(x)
        x = x if self.skip is None else self.skip(x)
        return (x + h) * self.skip_scale


class AttentionBlock(nnx.Module):
    """norm, attention over pixels, plus the skip; then, with a context, the same to its tokens."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        skip_scale: float,
        token_size: int | None = None,
        attention: str = "plain",
        **kinds: Any,
    ):
        if num_heads < 1 or channels % num_heads:
            raise ValueError(
                f"`num_heads` must divide the {channels} channels of an attention block, got "
                f"{num_heads}. Choose another `num_heads` (or `head_channels`)."
            )
        self.skip_scale = skip_scale
        options = {"implementation": attention, "out_init": zeros, **kinds}
        self.norm = GroupNorm(channels, **kinds)
        self.attention = Attention(channels, num_heads, **options)
        crosses = token_size is not None
        self.cross_norm: Any = GroupNorm(channels, **kinds) if crosses else None
        self.cross: Any = (
            Attention(channels, num_heads, context_size=token_size, **options) if crosses else None
        )

    def __call__(
        self, tap: Tap, name: str, x: Array, tokens: Array | None, mask: Array | None
    ) -> Array:
        """One block; x `(H, W, C)`. Taps: those of `Attention`, under name and name.cross."""
        pixels = self.norm(x).reshape(-1, x.shape[-1])
        x = (x + self.attention(tap, name, pixels).reshape(x.shape)) * self.skip_scale
        if tokens is not None:
            pixels = self.cross_norm(x).reshape(-1, x.shape[-1])
            moved = self.cross(tap, f"{name}.cross", pixels, tokens.astype(x.dtype), mask)
            x = (x + moved.reshape(x.shape)) * self.skip_scale
        return x


class Stage(Block):
    """A residual block, perhaps followed by attention; or a plain resampling convolution."""

    def __init__(self, block: ResBlock | Conv, attention: AttentionBlock | None = None):
        self.block: Any = block
        self.attention = attention

    def __call__(
        self,
        tap: Tap,
        name: str,
        h: Array,
        emb: Array,
        key: PRNGKeyArray | None,
        tokens: Array | None,
        mask: Array | None,
    ) -> Array:
        """The stage's output. Taps: name, and name.attn with its parts ("mid.attn" for mid.0)."""
        plain = isinstance(self.block, Conv)
        h = self.block(h) if plain else self.block(h, emb, key)
        if self.attention is not None:
            # The middle has one attention, and the field calls it so.
            prefix = "mid" if name == "mid.0" else name
            h = self.attention(tap, f"{prefix}.attn", h, tokens, mask)
        return tap(name, h)


class UNet(Network):
    """The convolutional UNet of DDPM, with the options of ADM.

    Taps, in the order they are met: "emb"; "in"; "down.i.j" (level i, block j) and
    "down.i.resample"; "mid.0", "mid" (the h-space); "up.i.j" and "up.i.resample". The attention
    of a stage is
    "<stage>.attn" (in the middle, "mid.attn") with ".q", ".k", ".v", ".weights"
    (`(heads, n, n)`), and with tokens "<stage>.attn.cross" with the same.

    Args:
        channels: base width, even.
        in_channels: channels of the example.
        out_channels: channels of the output; None for `in_channels`, `2 * in_channels` for
            learned variances.
        channel_mults: width of each resolution level, in units of `channels`.
        num_res_blocks: residual blocks per level on the way down (one more on the way up).
        attention_resolutions: heights of levels at which blocks attend; the middle does anyway.
        image_size: height and width of the example, one number or two, each divisible by
            2^(levels - 1).
        num_classes: number of classes, or None; see `Network` for this and the next three.
        label_size: size of a vector label, or None.
        scalars: names of scalar conditions.
        token_size: size of the tokens that blocks with attention attend to as well, or None.
        num_words: number of words whose tokens are learned, or None; see `Network`.
        dropout: dropout rate in the residual blocks, in [0, 1).
        num_heads: attention heads.
        head_channels: channels of a head; if given, replaces `num_heads`.
        scale_shift: modulate the second norm by the embedding (ADM) instead of adding it (DDPM).
        resample: "conv" (DDPM: strided convolution; nearest neighbour and convolution) or
            "block" (ADM: inside residual blocks).
        skip_rescale: multiply residual sums by 1/sqrt(2).
        attention: how attention is computed, see `attend`.
        remat: recompute each stage in the backward pass; or what to keep of it, by the name of a
            policy of `jax.checkpoint_policies`.
        dtype: compute dtype, e.g. bfloat16; None follows the input and the weights.
        param_dtype: dtype of the weights.
        rngs: initialisation keys.

    Raises:
        ValueError: if sizes do not divide as required, for attention at a height that no level
            has, or an unknown name.

    Reference: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020,
    arXiv 2006.11239, appendix B; Dhariwal, Nichol, "Diffusion Models Beat GANs on Image
    Synthesis", 2021, arXiv 2105.05233, section 3; rescaled skips from Song et al.,
    arXiv 2011.13456, appendix H. Group norms use fewer than 32 groups below 128 channels.
    """

    def __init__(
        self,
        channels: int = 128,
        *,
        in_channels: int = 3,
        out_channels: int | None = None,
        channel_mults: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        image_size: int | tuple[int, int] = 32,
        num_classes: int | None = None,
        label_size: int | None = None,
        scalars: Sequence[str] = (),
        token_size: int | None = None,
        num_words: int | None = None,
        dropout: float = 0.0,
        num_heads: int = 1,
        head_channels: int | None = None,
        scale_shift: bool = False,
        resample: Literal["conv", "block"] = "conv",
        skip_rescale: bool = False,
        attention: Literal["plain", "xla", "cudnn"] = "plain",
        remat: bool | str = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.arguments = arguments_of(locals())
        levels = len(channel_mults)
        self.shape = image_shape(image_size, in_channels)
        height, width, _ = self.shape
        if height % 2 ** (levels - 1) or width % 2 ** (levels - 1):
            raise ValueError(
                f"`image_size` must be divisible by {2 ** (levels - 1)} for {levels} resolution "
                f"levels, got {image_size}. Pad the images or give fewer `channel_mults`."
            )
        heights = [height // 2**i for i in range(levels)]
        if unmet := set(attention_resolutions) - set(heights):
            raise ValueError(
                f"`attention_resolutions` must be heights of the levels, {heights}, got "
                f"{sorted(unmet)}. An empty tuple leaves attention to the middle."
            )
        check_rate(dropout)
        remat_policy(remat)
        if channels < 4 or channels % 2:
            raise ValueError(f"`channels` must be even and at least 4, got {channels}.")
        if resample not in ("conv", "block"):
            raise ValueError(f'`resample` must be "conv" or "block", got {resample!r}.')
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        skip_scale = 0.5**0.5 if skip_rescale else 1.0
        emb_size = 4 * channels

        def res(cin, cout, kind="same"):
            options = {"rate": dropout, "scale_shift": scale_shift, "skip_scale": skip_scale}
            return ResBlock(cin, cout, emb_size, resample=kind, **options, **kinds)

        def attending(c):
            if head_channels and c % head_channels:
                raise ValueError(
                    f"`head_channels` must divide the {c} channels of an attention block, got "
                    f"{head_channels}."
                )
            heads = c // head_channels if head_channels else num_heads
            options = {"token_size": token_size, "attention": attention}
            return AttentionBlock(c, heads, skip_scale=skip_scale, **options, **kinds)

        def stage(cin, cout, size):
            attends = size in attention_resolutions
            return Stage(res(cin, cout), attending(cout) if attends else None)

        def resampling(c, kind):
            if resample == "block":
                return Stage(res(c, c, kind))
            strides = 2 if kind == "down" else 1
            return Stage(Conv(c, c, (3, 3), strides=strides, **kinds))

        self.plain_resampling, self.remat = resample == "conv", remat
        self.embedding = ConditionEmbedding(
            channels, emb_size, num_classes=num_classes, label_size=label_size, scalars=scalars,
            token_size=token_size, num_words=num_words, **kinds,
        )  # fmt: skip
        self.conv_in = Conv(in_channels, channels, (3, 3), **kinds)

        widths, c, size = [channels], channels, height
        self.down: Any = nnx.List()
        for i, mult in enumerate(channel_mults):
            level: Any = nnx.List()
            for _ in range(num_res_blocks):
                level.append(stage(c, mult * channels, size))
                c = mult * channels
                widths.append(c)
            if i < levels - 1:
                level.append(resampling(c, "down"))
                widths.append(c)
                size //= 2
            self.down.append(level)

        self.mid = nnx.List([Stage(res(c, c), attending(c)), Stage(res(c, c))])

        self.up: Any = nnx.List()
        for i, mult in reversed(list(enumerate(channel_mults))):
            level = nnx.List()
            for _ in range(num_res_blocks + 1):
                level.append(stage(c + widths.pop(), mult * channels, size))
                c = mult * channels
            if i > 0:
                level.append(resampling(c, "up"))
                size *= 2
            self.up.append(level)

        self.num_res_blocks = num_res_blocks
        self.norm_out = GroupNorm(c, **kinds)
        self.conv_out = Conv(c, out_channels or in_channels, (3, 3), kernel_init=zeros, **kinds)

    def resized(self, image_size: int | tuple[int, int]) -> "UNet":
        """The same weights for images of another size: convolutions and attention know none.

        Levels attend as they did. What such a network makes of images that it was not trained on is
        another question.

        Args:
            image_size: height and width, one number or two, each divisible by 2^(levels - 1).

        Raises:
            ValueError: for sizes that do not divide.
        """
        given, height = dict(self.arguments), self.shape[0]
        new = image_shape(image_size, 1)[0]
        given["image_size"] = image_size
        given["attention_resolutions"] = tuple(
            size * new // height for size in given["attention_resolutions"]
        )
        outline, _ = nnx.split(nnx.eval_shape(lambda: UNet(**given, rngs=nnx.Rngs(0))))
        return nnx.merge(outline, nnx.state(self))

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
        h = self.conv_in(x)
        # A noise label of wider dtype than x must not widen the whole network.
        emb = emb.astype(h.dtype)
        count = 0

        def run(stage, name, h):
            nonlocal count
            count += 1

            def call(tap, stage, h, emb, key):
                return self.at_use(stage)(tap, name, h, emb, key, tokens, token_mask)

            return tap.run(call, stage, h, emb, fold(key, count), remat=self.remat)

        h = tap("in", h)
        skips = [h]
        for i, level in enumerate(self.down):
            for j, stage in enumerate(level):
                name = f"down.{i}.{j}" if j < self.num_res_blocks else f"down.{i}.resample"
                h = run(stage, name, h)
                skips.append(h)
        h = run(self.mid[0], "mid.0", h)
        h = run(self.mid[1], "mid", h)
        for i, level in reversed(list(enumerate(self.up[::-1]))):
            for j, stage in enumerate(level):
                if j <= self.num_res_blocks:
                    h = run(stage, f"up.{i}.{j}", jnp.concatenate([h, skips.pop()], axis=-1))
                else:
                    h = upsample(h) if self.plain_resampling else h
                    h = run(stage, f"up.{i}.resample", h)
        return self.conv_out(nnx.silu(self.norm_out(h)))


def num_params(network: nnx.Module) -> int:
    """Number of weights; `network` may hold shapes only (`nnx.eval_shape`)."""
    return sum(leaf.size for leaf in jax.tree.leaves(network))
