"""The networks under options of XLA's compiler for CPUs."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.measure import Record, paired
from jaxdiff import networks

# Which operations of a program YNNPACK computes: by default convolutions, products and sums.
WITHOUT_YNN = {"xla_cpu_experimental_ynn_fusion_type": ""}


def unet(width: int, **options):
    """A UNet for 32x32 images in colour: of 128 channels the 35.7M weights of DDPM's."""
    mults = (1, 2, 2, 2) if width == 128 else (1, 2, 2)
    return networks.UNet(width, channel_mults=mults, rngs=nnx.Rngs(0), **options)


def dit(**options):
    """DiT-S/2 for latents of 32x32x4, and a thousand classes."""
    sizes = networks.DIT_SIZES["S"] | {"image_size": 32, "in_channels": 4, "patch_size": 2}
    return networks.DiT(**sizes, num_classes=1000, rngs=nnx.Rngs(0), **options)


def forward(network, x, t, cond):
    """A batch through the network."""
    return jax.vmap(lambda x, t, cond: network(x, t, cond))(x, t, cond)


def compiler_options() -> Iterator[Record]:
    """Without YNNPACK over XLA's default, forward and with the weights' gradient."""
    if jax.default_backend() != "cpu":
        return

    def gradient(network, *args):
        return jax.grad(lambda network: jnp.mean(forward(network, *args) ** 2))(network)

    for label, network in (("UNet of 64 channels", unet(64)), ("DiT-S/2", dit())):
        count, shape = 8, network.shape
        classes = None if network.embedding.classes is None else jnp.arange(count)
        args = (
            jax.random.normal(jax.random.key(0), (count, *shape)),
            jnp.linspace(1, 999, count),
            classes,
        )
        for task in (forward, gradient):
            without, default = (
                jax.jit(task, compiler_options=options) for options in (WITHOUT_YNN, None)
            )
            yield paired(
                f"without YNNPACK / with, {label}, {task.__name__}, batch {count}",
                lambda: without(network, *args),  # noqa: B023
                lambda: default(network, *args),  # noqa: B023
                rounds=7,
                warm=1,
            )
