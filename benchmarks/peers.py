"""Networks of diffusers beside those of jaxdiff: of the same widths, with the same weights.

What is left different is the noise embedding of the DiT, other sinusoids of which each of
diffusers' blocks makes its own; its last layer is zero on both sides.
"""

from itertools import zip_longest
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from flax import nnx

from benchmarks.networks import dit, forward, unet
from jaxdiff.networks import DiT, UNet, num_params
from jaxdiff.networks._dit import position_embedding

CLASSES = 1000


class Pair(NamedTuple):
    """One network twice.

    Attributes:
        name: in words.
        ours: jaxdiff's.
        theirs: a `torch.nn.Module` `(x, t, labels) -> output` of images `(N, C, H, W)`.
        classes: whether it takes labels.
    """

    name: str
    ours: nnx.Module
    theirs: torch.nn.Module
    classes: bool


class Called(torch.nn.Module):
    """A model of diffusers, called with arrays for an array."""

    def __init__(self, model: torch.nn.Module, classes: bool):
        super().__init__()
        self.model, self.classes = model, classes

    def forward(self, x, t, labels):
        """A batch through the model."""
        cond = {"class_labels": labels} if self.classes else {}
        return self.model(x, timestep=t, return_dict=False, **cond)[0]


def unets(width: int, dtype=None) -> Pair:
    """DDPM's 35.7M UNet for 32x32 images for 128 channels, or a smaller one."""
    levels = 4 if width == 128 else 3
    ours = unet(width, dtype=dtype)
    attends = [size == 1 for size in range(levels)]
    theirs = UNet2DModel(
        sample_size=32,
        layers_per_block=2,
        block_out_channels=[width, *[2 * width] * (levels - 1)],
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        attention_head_dim=None,
        norm_eps=1e-6,
        norm_num_groups=width // 4,
        flip_sin_to_cos=False,
        freq_shift=1,
        downsample_padding=0,
    )
    for norm in theirs.modules():
        if isinstance(norm, torch.nn.GroupNorm):
            norm.num_groups = min(32, norm.num_channels // 4)
    _copy_unet(ours, theirs)
    name = f"UNet of {width} channels ({num_params(ours) / 1e6:.1f}M)"
    return Pair(name, ours, Called(theirs, False), False)


def dits(dtype=None) -> Pair:
    """DiT-S/2 for latents of 32x32x4."""
    ours = dit(dtype=dtype)
    theirs = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        num_layers=12,
        in_channels=4,
        out_channels=4,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
        norm_eps=1e-6,
    )
    _copy_dit(ours, theirs)
    return Pair(f"DiT-S/2 ({num_params(ours) / 1e6:.1f}M)", ours, Called(theirs, True), True)


def check(pair: Pair) -> float:
    """The largest difference of their outputs, relative to the largest output.

    Raises:
        AssertionError: if they do not agree.
    """
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *pair.ours.shape), np.float32)
    t, labels = np.asarray([7.0, 500.0], np.float32), np.asarray([1, 2])
    with torch.inference_mode():
        expected = pair.theirs.eval()(*map(torch.tensor, (x.transpose(0, 3, 1, 2), t, labels)))
    expected = expected.numpy().transpose(0, 2, 3, 1)
    # On the host, where no product is rounded to fewer digits.
    with jax.default_device(jax.devices("cpu")[0]):
        found = jax.jit(forward)(pair.ours, x, t, labels if pair.classes else None)
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    assert difference < 1e-5, (pair.name, difference)
    return difference


def _put(param, value) -> None:
    value = value.detach().numpy()
    assert param.shape == value.shape, (param.shape, value.shape)
    param[...] = jnp.asarray(value)


def _conv(ours, theirs) -> None:
    _put(ours.kernel, theirs.weight.permute(2, 3, 1, 0))
    _put(ours.bias, theirs.bias)


def _linear(ours, theirs) -> None:
    _put(ours.kernel, theirs.weight.T)
    _put(ours.bias, theirs.bias)


def _norm(ours, theirs) -> None:
    _put(ours.scale, theirs.weight)
    _put(ours.bias, theirs.bias)


def _attention(ours, theirs) -> None:
    for name in ("q", "k", "v"):
        _linear(getattr(ours, name), getattr(theirs, f"to_{name}"))
    _linear(ours.out, theirs.to_out[0])


def _residual(ours, theirs) -> None:
    _norm(ours.norm1, theirs.norm1)
    _conv(ours.conv1, theirs.conv1)
    _linear(ours.modulation, theirs.time_emb_proj)
    _norm(ours.norm2, theirs.norm2)
    _conv(ours.conv2, theirs.conv2)
    if theirs.conv_shortcut is not None:
        _conv(ours.skip, theirs.conv_shortcut)


def _stages(ours, block, sampler) -> None:
    attentions = getattr(block, "attentions", ())  # the middle has one, and two residual blocks
    plain = ours[: len(block.resnets)]
    for stage, residual, attention in zip_longest(plain, block.resnets, attentions):
        _residual(stage.block, residual)
        if attention is not None:
            _norm(stage.attention.norm, attention.group_norm)
            _attention(stage.attention.attention, attention)
    if sampler is not None:
        _conv(ours[-1].block, sampler[0].conv)


def _copy_unet(ours: UNet, theirs: UNet2DModel) -> None:
    """Their weights into ours."""
    _conv(ours.conv_in, theirs.conv_in)
    _conv(ours.conv_out, theirs.conv_out)
    _norm(ours.norm_out, theirs.conv_norm_out)
    _linear(ours.embedding.first, theirs.time_embedding.linear_1)
    _linear(ours.embedding.second, theirs.time_embedding.linear_2)
    for stages, block in zip(ours.down, theirs.down_blocks, strict=True):
        _stages(stages, block, block.downsamplers)
    for stages, block in zip(ours.up, theirs.up_blocks, strict=True):
        _stages(stages, block, block.upsamplers)
    _stages(ours.mid, theirs.mid_block, None)


def _copy_dit(ours: DiT, theirs: DiTTransformer2DModel) -> None:
    """Their weights into ours, but for the noise embedding; ours of positions into theirs."""
    first = theirs.transformer_blocks[0].norm1.emb
    for block in theirs.transformer_blocks:
        block.norm1.emb = first  # as many weights to train as we have; each still computes it
    with torch.no_grad():
        for param in first.timestep_embedder.linear_2.parameters():
            param.zero_()
        positions = np.asarray(position_embedding(*ours.grid, ours.hidden))
        theirs.pos_embed.pos_embed.copy_(torch.tensor(positions))
    _linear(ours.embedding.second, first.timestep_embedder.linear_2)
    _put(ours.embedding.classes.embedding, first.class_embedder.embedding_table.weight)
    patches = theirs.pos_embed.proj
    _put(ours.patches.kernel, patches.weight.permute(2, 3, 1, 0).reshape(-1, ours.hidden))
    _put(ours.patches.bias, patches.bias)
    for mine, block in zip(ours.blocks, theirs.transformer_blocks, strict=True):
        _linear(mine.modulation, block.norm1.linear)
        _attention(mine.attention, block.attn1)
        _linear(mine.first, block.ff.net[0].proj)
        _linear(mine.second, block.ff.net[2])
    _linear(ours.modulation, theirs.proj_out_1)
    _linear(ours.last, theirs.proj_out_2)
