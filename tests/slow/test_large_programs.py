"""Programs of the sizes that papers train."""

import time

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from benchmarks import gradients
from jaxdiff import losses, networks, processes
from jaxdiff.denoiser import NetworkDenoiser
from jaxdiff.networks import DIT_SIZES
from jaxdiff.training import Frozen

X = jax.ShapeDtypeStruct((2, 32, 32, 4), jnp.float32)


def training_gradient(size, **options):
    """Of DiT-`size`/2 on latents of 32 x 32 x 4, and a batch of two, to be lowered from shapes."""

    def build():
        sizes = DIT_SIZES[size] | {"image_size": 32, "in_channels": 4, "patch_size": 2}
        return networks.DiT(**sizes | options, num_classes=1000, rngs=nnx.Rngs(0))

    def loss(network, x):
        denoiser = NetworkDenoiser(network, processes.VP())
        batch = {"x": x, "cond": jnp.zeros(len(x), int)}
        return losses.DenoisingLoss()(denoiser, jax.random.key(0), batch, Frozen())[0]

    return jax.jit(jax.grad(loss)), nnx.eval_shape(build)


def seconds(fn):
    begun = time.perf_counter()
    result = fn()
    return result, time.perf_counter() - begun


def test_stacked_blocks_lower_and_compile_as_one(measured):
    """The depth of XL/2, 28 blocks, costs what 2 blocks do."""
    sizes = {}
    for depth in (2, 28):
        step, network = training_gradient("XL", stacked=True, depth=depth)
        lowered, spent = seconds(lambda: step.lower(network, X))  # noqa: B023
        sizes[depth] = len(lowered.as_text())
        measured(f"DiT-XL/2 of {depth} blocks, stacked: lowered in {spent:.1f} s")
    assert sizes[28] < 1.02 * sizes[2]
    compiled = {}
    for stacked in (True, False):
        step, network = training_gradient("S", stacked=stacked)
        lowered = step.lower(network, X)
        compiled[stacked] = seconds(lowered.compile)[1]
    measured("DiT-S/2 compiled in {:.1f} s stacked, {:.1f} s not".format(*compiled.values()))
    assert compiled[True] < compiled[False]


@pytest.mark.parametrize("steps", [5, 10, 20])
def test_weight_gradients_of_seven_million_weights_at_batch_256(steps, measured):
    network = networks.MLP(64, hidden=1024, num_blocks=1, rngs=nnx.Rngs(0))
    x = jax.ShapeDtypeStruct((256, 64), jnp.float32)
    ours, hand = (
        gradients.megabytes(gradients.gradient(fn, network, x, steps))
        for fn in (gradients.by_sampler, gradients.by_hand)
    )
    millions = networks.num_params(network) / 1e6
    measured(f"{millions:.1f}M weights, S = {steps}: {ours:.1f} MB, by hand {hand:.1f} MB")
    assert ours < 1.1 * hand


@pytest.mark.parametrize("steps", [5, 10, 20])
def test_weight_gradients_of_a_unet(steps, measured):
    network, shape = gradients.unet()
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    ours, hand = (
        gradients.megabytes(gradients.gradient(fn, network, x, steps))
        for fn in (gradients.by_sampler, gradients.by_hand)
    )
    measured(f"UNet, S = {steps}: {ours:.1f} MB, by hand {hand:.1f} MB")
    assert ours < 1.1 * hand
