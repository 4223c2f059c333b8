"""Gradients with respect to weights through a sampler: memory and time against a hand-written loop.

The loop is a `lax.scan` of `jax.checkpoint` over DDIM's steps, which keeps the state of every step
and computes each step once more. Memory is XLA's own count of temporary buffers; times alternate in
one process.
"""

from collections.abc import Iterator

import jax
from flax import nnx

import jaxdiff
from benchmarks.measure import Record, paired
from jaxdiff import networks, predictions, processes

PROCESS = processes.Cosine()
STEPS = (5, 10, 20)


def mlp():
    """1.65 million weights, at batch 256."""
    return networks.MLP(64, hidden=512, num_blocks=1, rngs=nnx.Rngs(0)), (256, 64)


def unet():
    """Of 16 x 16 images, at batch 16."""
    network = networks.UNet(
        32,
        in_channels=3,
        image_size=16,
        channel_mults=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(8,),
        rngs=nnx.Rngs(0),
    )
    return network, (16, 16, 16, 3)


def by_hand(network, x, steps: int):
    """A scan of checkpointed steps of DDIM."""
    denoiser = jaxdiff.NetworkDenoiser(network, PROCESS, predictions.V())
    times = PROCESS.times(steps)

    def move(x, row):
        t, s = row

        def one(x):
            x0 = denoiser(x, t)
            eps = (x - PROCESS.alpha(t) * x0) / PROCESS.sigma(t)
            return PROCESS.alpha(s) * x0 + PROCESS.sigma(s) * eps

        return jax.vmap(one)(x), None

    return jax.lax.scan(jax.checkpoint(move), x, (times[:-1], times[1:]))[0]


def by_sampler(network, x, steps: int, **options):
    """The same by `denoise`."""
    denoiser = jaxdiff.NetworkDenoiser(network, PROCESS, predictions.V())
    return jaxdiff.denoise(jax.random.key(0), denoiser, x, times=steps, **options).x


def gradient(fn, network, x, steps: int, **options):
    """The compiled gradient of a loss of the samples, by the weights and the start."""

    def loss(network, x):
        return fn(network, x, steps, **options).std()

    return jax.jit(jax.grad(loss, (0, 1))).lower(network, x).compile()


def megabytes(compiled) -> float:
    """Temporary buffers of a program."""
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


def weight_gradients() -> Iterator[Record]:
    """Memory through few steps and many, and time; the UNet's, minutes on a CPU, through few."""
    for name, make, timed in (("MLP", mlp, STEPS), ("UNet", unet, STEPS[:1])):
        network, shape = make()
        x = jax.random.normal(jax.random.key(1), shape)
        for steps in STEPS:
            ours, hand = (gradient(fn, network, x, steps) for fn in (by_sampler, by_hand))
            label = f"{name}, {steps} steps of DDIM, batch {shape[0]}"
            held = megabytes(ours)
            yield Record.of(f"{label}, memory", [held], "MB", "bytes")
            yield Record.of(f"{label}, memory / by hand", [held / megabytes(hand)], "", "ratio")
            if steps in timed:
                yield paired(
                    f"{label}, time / by hand",
                    lambda: ours(network, x),  # noqa: B023
                    lambda: hand(network, x),  # noqa: B023
                    rounds=15 if name == "MLP" else 3,
                    warm=0,
                )
