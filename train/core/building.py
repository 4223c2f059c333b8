"""What recipes build from their configurations."""

from typing import Any

import jax.numpy as jnp
import optax
from flax import nnx

from jaxdiff import networks
from jaxdiff.training import EMA, ConstantEMA, PowerEMA
from train.core.config import NetworkConfig, RunConfig
from train.core.data import DataInfo


def build_network(config: NetworkConfig, info: DataInfo, seed: int) -> nnx.Module:
    """The network for a data set.

    Raises:
        ValueError: if a unet or dit is to take anything but images, or an mlp anything but
            vectors; or for a condition that networks do not take.
    """
    shape, rngs = info.event_shape, nnx.Rngs(seed)
    common = {
        **condition_arguments(info),
        "dropout": config.dropout,
        "dtype": jnp.bfloat16 if config.bfloat16 else None,
        "remat": {"none": False, "blocks": True}.get(config.remat, config.remat),
        "rngs": rngs,
    }
    if config.kind == "mlp":
        if len(shape) != 1:
            raise ValueError(f"`network.kind` mlp takes vectors, got data of shape {shape}.")
        if "token_size" in common:
            raise ValueError("`network.kind` mlp takes no tokens. Use a unet or a dit.")
        return networks.MLP(shape[0], hidden=config.channels, num_blocks=config.depth, **common)
    if len(shape) != 3:
        raise ValueError(f"`network.kind` {config.kind} takes images, got data of shape {shape}.")
    common |= {"image_size": shape[:2], "in_channels": shape[2], "num_heads": config.num_heads}
    common |= {"attention": config.attention}
    if config.kind == "dit":
        return networks.DiT(
            patch_size=config.patch_size, hidden=config.channels, depth=config.depth,
            stacked=config.stacked, **common,
        )  # fmt: skip
    return networks.UNet(
        config.channels,
        channel_mults=config.channel_mults,
        num_res_blocks=config.num_res_blocks,
        attention_resolutions=config.attention_resolutions,
        scale_shift=config.scale_shift,
        **common,
    )


def condition_arguments(info: DataInfo) -> dict[str, Any]:
    """The arguments of a network that takes the conditions of the data.

    Raises:
        ValueError: for vectors that are not the label, and other shapes.
    """
    found: dict[str, Any] = {"num_classes": info.num_classes}
    scalars = []
    for name, shape in info.cond.items():
        if name == "label" and len(shape) == 1:
            found["label_size"] = shape[0]
        elif name == "tokens" and info.words is not None:
            found |= {"token_size": 32, "num_words": len(info.words)}
        elif name == "tokens" and len(shape) == 2:
            found["token_size"] = shape[1]
        elif len(shape) == 0:
            scalars.append(name)
        elif name != "token_mask":
            raise ValueError(
                f"The condition {name!r} has shape {shape}, which no network here takes. "
                "One vector is the 'label', scalars have any name, sequences of vectors are "
                "'tokens' with a 'token_mask'."
            )
    return {**found, "scalars": scalars}


def build_optimizer(config: RunConfig) -> optax.GradientTransformation:
    """Adam with a clipped gradient, under a schedule that rises linearly and falls as a cosine."""
    updates = max(config.steps // config.accumulate, config.warmup_steps + 1)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, updates
    )
    optimizer = optax.chain(optax.clip_by_global_norm(config.grad_clip), optax.adam(schedule))
    if config.accumulate > 1:
        optimizer = optax.MultiSteps(optimizer, config.accumulate).gradient_transformation()
    return optimizer


def build_average(config: RunConfig) -> EMA:
    """How weights are averaged."""
    if config.ema == "constant":
        return ConstantEMA(config.ema_decay)
    return PowerEMA(config.ema_widths)
