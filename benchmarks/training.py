"""What `make_train_step` costs over a step written by hand."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxdiff
from benchmarks.measure import Record, paired
from jaxdiff import losses, networks, processes
from jaxdiff.training import Player, init_train_state, make_train_step


def small_unet() -> networks.UNet:
    """A network for 8x8 images that computes about as long as the digits preset's."""
    return networks.UNet(
        32,
        in_channels=1,
        image_size=8,
        channel_mults=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        num_classes=10,
        rngs=nnx.Rngs(0),
    )


def train_step() -> Iterator[Record]:
    """`make_train_step` against a minimal optax step with the same loss, optimiser and network."""
    process, loss = processes.VP(), losses.DenoisingLoss(null_cond=10)
    batch = {
        "x": jax.random.normal(jax.random.key(0), (64, 8, 8, 1)),
        "cond": jnp.arange(64, dtype=jnp.int32) % 10,
    }
    optimizer = optax.adam(1e-3)
    players = {"model": Player(jaxdiff.NetworkDenoiser(small_unet(), process), loss, optimizer)}
    ours_state = [init_train_state(players, jax.random.key(1))]
    ours_step = make_train_step(players)

    @jax.jit
    def minimal(network, opt_state, key, batch):
        def objective(network):
            keys = jax.random.split(key, 4)
            x, cond = batch["x"], batch["cond"]
            order = jax.random.permutation(keys[0], 64)
            t = (order + jax.random.uniform(keys[1], (64,))) / 64 * (1 - 1e-5) + 1e-5
            eps = jax.random.normal(keys[2], x.shape)
            cond = jnp.where(jax.random.bernoulli(keys[3], 0.1, (64,)), 10, cond)
            alpha, sigma = (v[:, None, None, None] for v in (process.alpha(t), process.sigma(t)))
            out = jax.vmap(network)(alpha * x + sigma * eps, 1000 * t, cond)
            return jnp.mean((out - eps) ** 2)

        value, grads = jax.value_and_grad(objective)(network)
        updates, opt_state = optimizer.update(grads, opt_state, network)
        return optax.apply_updates(network, updates), opt_state, value

    network = small_unet()
    theirs_state = [network, optimizer.init(network)]

    def ours():
        for _ in range(5):
            ours_state[0], metrics = ours_step(ours_state[0], batch)
        return metrics["loss"]

    def theirs():
        for i in range(5):
            key = jax.random.fold_in(jax.random.key(1), i)
            *theirs_state[:], value = minimal(*theirs_state, key, batch)
        return value

    yield paired("make_train_step / minimal optax step, 8x8x1 UNet, batch 64", ours, theirs)
