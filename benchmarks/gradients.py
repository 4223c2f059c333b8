"""Gradients of weights through a sampler: memory and time against hand-written loops.

The loop is a `lax.scan` of `jax.checkpoint` over DDIM's steps, which keeps the state of every step
and computes each step once more. Memory is XLA's own count of temporary buffers; times alternate in
one process.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxdiff
from benchmarks.measure import Record, paired
from jaxdiff import finetuning, metrics, networks, predictions, processes
from jaxdiff.training import Player, init_train_state, make_train_step

PROCESS = processes.Cosine()
STEPS = (5, 10, 20)


def mlp():
    """1.65 million weights, at batch 256."""
    return networks.MLP(64, hidden=512, num_blocks=1, rngs=nnx.Rngs(0)), (256, 64)


def unet(**options):
    """Of 16 x 16 images, at batch 16."""
    network = networks.UNet(
        32,
        in_channels=3,
        image_size=16,
        channel_mults=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(8,),
        rngs=nnx.Rngs(0),
        **options,
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
    """Memory through few steps and many, and time."""
    for name, make, timed in (("MLP", mlp, STEPS), ("UNet", unet, STEPS)):
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


def features(x):
    """Of one sample."""
    return x.reshape(-1)


def mmd_updates() -> Iterator[Record]:
    """An update of MMD fine-tuning against the same written by hand, with Adam."""
    network, (count, *shape) = unet()
    x = jax.random.normal(jax.random.key(1), (count, *shape))
    optimizer, kernel = optax.adam(1e-4), metrics.Polynomial()
    denoiser = jaxdiff.NetworkDenoiser(network, PROCESS, predictions.V())
    loss = finetuning.MMDLoss(times=5, features=jax.tree_util.Partial(features), kernel=kernel)
    players = {"model": Player(denoiser, loss, optimizer)}
    state, step = [init_train_state(players, jax.random.key(0))], make_train_step(players)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(carry, key, x):
        network, opt_state = carry
        start = jax.random.normal(key, x.shape)

        def objective(network):
            fake = finetuning.straight_through_clip(by_hand(network, start, 5))
            flat = fake.reshape(count, -1), x.reshape(count, -1)
            return metrics.mmd2_unbiased(*flat, kernel, paired=True)

        value, slope = jax.value_and_grad(objective)(network)
        updates, opt_state = optimizer.update(slope, opt_state)
        return (optax.apply_updates(network, updates), opt_state), value

    copied = jax.tree.map(jnp.array, network)
    carry = [(copied, optimizer.init(copied))]

    def ours():
        state[0], logged = step(state[0], {"x": x})
        return logged["mmd2"]

    def hand():
        carry[0], value = update(carry[0], jax.random.key(2), x)
        return value

    label = f"UNet, MMD update through 5 steps of DDIM, batch {count}, time / by hand"
    yield paired(label, ours, hand, rounds=5, warm=1)
