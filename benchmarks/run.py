"""`make bench`: ratios to hand-written code on the same network, alternating in one process."""

import resource
import time

import diffrax
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxdiff
from benchmarks import solvers
from benchmarks.measure import paired_ratio, report
from jaxdiff import losses, networks, predictions, processes
from jaxdiff.solvers import DDIM
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


def train_step() -> None:
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

    report(
        "train step / minimal optax step, 8x8x1 UNet, batch 64",
        "<= 1.03",
        paired_ratio(ours, theirs),
    )


class Tiny(nnx.Module):
    """One convolution: what remains is the sampler's own cost."""

    def __init__(self):
        self.conv = nnx.Conv(1, 1, (3, 3), rngs=nnx.Rngs(0))

    def __call__(self, x, t, cond=None, *, key=None):
        """The convolved image, a little shrunk."""
        return 0.5 * self.conv(x) * jnp.cos(t)


def first_sample() -> None:
    """Seconds from a call to its first result, compilation included."""
    denoiser = jaxdiff.NetworkDenoiser(solvers.unet(8, 1, 32), processes.VP(), predictions.V())
    for name, solver in (("DDIM", DDIM()), ("diffrax.Heun", diffrax.Heun())):
        begun = time.perf_counter()
        out = jaxdiff.sample(jax.random.key(0), denoiser, (8, 8, 1), 64, solver=solver, times=20)
        jax.block_until_ready(out)
        print(f"time to first sample, {name:37s} {time.perf_counter() - begun:6.2f} s", flush=True)


def main() -> None:
    """Run all of it."""
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}; median [quartiles]")
    first_sample()
    train_step()
    times = processes.VP().times(20)
    for name in ("DDIM", "Ancestral"):
        solvers.compare(name, Tiny(), (8, 8, 1), 64, times, 15, "one convolution, ")
    solvers.main()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{'peak memory of this process':58s} {peak:6.0f} MiB")


if __name__ == "__main__":
    main()
