"""Training steps of distillation against the same written by hand: one program, as many passes."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxdiff
from benchmarks.measure import Record, paired
from jaxdiff import distillation, networks, predictions, processes
from jaxdiff.training import Player, init_train_state, make_train_step

PROCESS, COUNT, SHAPE = processes.Cosine(), 32, (8, 8, 1)
OPTIMIZER = optax.adam(1e-4)
CLASSES = jnp.arange(COUNT, dtype=jnp.int32) % 10


def unet(seed: int, **options) -> networks.UNet:
    """The network of 8x8 digits."""
    return networks.UNet(
        16,
        in_channels=1,
        image_size=8,
        channel_mults=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        num_classes=10,
        rngs=nnx.Rngs(seed),
        **options,
    )


def denoiser(seed: int, **options) -> jaxdiff.NetworkDenoiser:
    """Its denoiser."""
    return jaxdiff.NetworkDenoiser(unet(seed, **options), PROCESS, predictions.V())


# By hand: batches and formulas, of networks alone.


def levels(t):
    """Alpha and sigma of a batch of times, for images."""
    return (a.reshape(-1, 1, 1, 1) for a in (jnp.cos(jnp.pi / 2 * t), jnp.sin(jnp.pi / 2 * t)))


def clean(network, x, t):
    """What a network says the image is."""
    alpha, sigma = levels(t)
    return alpha * x - sigma * jax.vmap(network)(x, 1000 * t, CLASSES)


def jump(x, x0, t, s):
    """A step of DDIM."""
    (alpha, sigma), (alpha_s, sigma_s) = levels(t), levels(s)
    return alpha_s * x0 + sigma_s / sigma * (x - alpha * x0)


def noised(key, x0, t):
    """Images at their times, and the noise in them."""
    alpha, sigma = levels(t)
    eps = jax.random.normal(key, x0.shape)
    return alpha * x0 + sigma * eps, eps


def draw(key, least=1e-3):
    """Times of a batch, stratified."""
    order_key, jitter_key = jax.random.split(key)
    u = jax.random.permutation(order_key, COUNT) + jax.random.uniform(jitter_key, (COUNT,))
    return least + (0.999 - least) * u / COUNT


def consistency(student, key, x0, teacher):
    """Consistency distillation: two passes of the student, one of the teacher."""
    t = draw(key)
    s = jnp.maximum(t - 1 / 18, 1e-3)
    x, _ = noised(key, x0, t)
    x_s = jump(x, clean(teacher, x, t), t, s)
    end = jnp.full_like(t, 1e-3)
    goal = jax.lax.stop_gradient(jump(x_s, clean(student, x_s, s), s, end))
    return jnp.mean((jump(x, clean(student, x, t), t, end) - goal) ** 2)


def progressive(student, key, x0, teacher):
    """Progressive distillation: one pass of the student, two of the teacher."""
    t = (jnp.floor(4 * draw(key)) + 1) / 4 * 0.999
    middle, s = jnp.maximum(t - 1 / 8, 0), jnp.maximum(t - 1 / 4, 0)
    x, _ = noised(key, x0, t)
    first = clean(teacher, x, t)
    second = clean(teacher, jump(x, first, t, middle), middle)
    (alpha_t, sigma_t), (alpha_m, sigma_m), (alpha_s, sigma_s) = map(levels, (t, middle, s))
    ratio = sigma_s / alpha_s
    share = (1 - ratio * alpha_m / sigma_m) / (1 - ratio * alpha_t / sigma_t)
    goal = jax.lax.stop_gradient(first + share * (second - first))
    weight = jnp.maximum((alpha_t / sigma_t) ** 2, 1)
    return jnp.mean(weight * (clean(student, x, t) - goal) ** 2)


def made(generator, key):
    """What a generator makes of noise."""
    start = jnp.full(COUNT, 0.99)
    z = jax.random.normal(key, (COUNT, *SHAPE))
    return clean(generator, z, start)


def matching(generator, key, x0, teacher, fake):
    """Distribution matching: one pass of the generator and of each score."""
    x0 = made(generator, key)
    t = draw(key)
    x, _ = noised(key, jax.lax.stop_gradient(x0), t)
    target = clean(teacher, x, t)
    size = jnp.mean(jnp.abs(x0 - target), axis=(1, 2, 3), keepdims=True)
    slope = jax.lax.stop_gradient((clean(fake, x, t) - target) / size)
    return jnp.sum(slope * x0) / x0.size


def identity(generator, key, x0, teacher, fake):
    """Score identity: the same, with gradients through both scores."""
    x0 = made(generator, key)
    t = draw(key)
    x, _ = noised(key, x0, t)
    target, own = clean(teacher, x, t), clean(fake, x, t)
    size = jnp.mean(jnp.abs(target - x0), axis=(1, 2, 3), keepdims=True)
    parts = (target - own) * (target - x0 - 1.2 * (target - own)) / jax.lax.stop_gradient(size)
    return jnp.sum(parts) / COUNT


def fake_score(fake, key, x0, generator):
    """The fake score's own loss: a pass of the generator, one of the score."""
    x0 = jax.lax.stop_gradient(made(generator, key))
    t = draw(key)
    x, _ = noised(key, x0, t)
    return jnp.mean((clean(fake, x, t) - x0) ** 2)


def mean_flow(student, key, x0):
    """Mean flow of the straightened process: a pass of the student with its derivative."""
    keys = jax.random.split(key, 2)
    first, second = draw(keys[0]), draw(keys[1])
    t, s = jnp.maximum(first, second), jnp.minimum(first, second)
    eps = jax.random.normal(key, x0.shape)
    alpha, sigma = levels(t)
    k, tau = alpha + sigma, sigma / (alpha + sigma)
    x, v = alpha * x0 + sigma * eps, eps - x0
    rate, slope = jnp.pi / 2, jnp.pi / 2 / k**2
    dx = k * v + rate * (alpha - sigma) / (slope * k) * x

    def velocity(x, t):
        cond = {"label": CLASSES, "until": s}
        alpha, sigma = levels(t)
        x0 = alpha * x - sigma * jax.vmap(student)(x, 1000 * t, cond)
        return (x / (alpha + sigma) - x0) * (alpha + sigma) / sigma

    u, du = jax.jvp(velocity, (x, t), (dx, 1 / slope.reshape(-1)))
    alpha_s, sigma_s = levels(s)
    goal = jax.lax.stop_gradient(v - (tau - sigma_s / (alpha_s + sigma_s)) * du)
    square = jnp.mean((u - goal) ** 2, axis=(1, 2, 3))
    return jnp.mean(square / jax.lax.stop_gradient(square + 1e-6))


def by_hand(batch, teacher, **players: tuple[Any, Callable[..., Any]]) -> Callable[[], Any]:
    """A compiled step of every player in turn; an objective takes what it names."""

    @functools.partial(jax.jit, donate_argnums=0)
    def update(carry, key, x0, teacher):
        values = {}
        for name, (_, objective) in players.items():
            networks = {n: network for n, (network, _) in carry.items()} | {"teacher": teacher}
            asked = objective.__code__.co_varnames[3 : objective.__code__.co_argcount]
            others = [networks[n] for n in asked]
            network, opt_state = carry[name]
            values[name], slope = jax.value_and_grad(objective)(network, key, x0, *others)
            updates, opt_state = OPTIMIZER.update(slope, opt_state)
            carry = {**carry, name: (optax.apply_updates(network, updates), opt_state)}
        return carry, values

    copies = {name: jax.tree.map(jnp.array, network) for name, (network, _) in players.items()}
    carry = [{name: (network, OPTIMIZER.init(network)) for name, network in copies.items()}]

    def run():
        for i in range(3):
            carry[0], values = update(carry[0], jax.random.key(i), batch["x"], teacher.network)
        return values

    return run


def by_library(batch, teacher, **players: tuple[Any, Any]) -> Callable[[], Any]:
    """The same by `make_train_step`."""
    made = {name: Player(model, loss, OPTIMIZER) for name, (model, loss) in players.items()}
    state, step = [init_train_state(made, jax.random.key(0))], make_train_step(made)

    def run():
        for _ in range(3):
            state[0], metrics = step(state[0], batch, {"teacher": teacher})
        return metrics

    return run


def distilling() -> Iterator[Record]:
    """Time of a training step of five methods, over that by hand."""
    batch = {"x": jax.random.normal(jax.random.key(0), (COUNT, *SHAPE)), "cond": CLASSES}
    teacher, student, fake = (denoiser(seed) for seed in range(3))
    told = denoiser(1, scalars=("until",))
    jumping, score = distillation.Jump(student), distillation.FakeScoreLoss(start=0.99)
    fakes = (fake, score), (fake.network, fake_score)
    network = student.network
    methods = {
        "consistency distillation": (
            {"student": (jumping, distillation.ConsistencyDistillation())},
            {"student": (network, consistency)},
        ),
        "progressive distillation": (
            {"student": (student, distillation.ProgressiveDistillation())},
            {"student": (network, progressive)},
        ),
        "DMD and its fake score": (
            {"fake": fakes[0], "generator": (jumping, distillation.DMD(start=0.99))},
            {"fake": fakes[1], "generator": (network, matching)},
        ),
        "SiD and its fake score": (
            {"fake": fakes[0], "generator": (jumping, distillation.SiD(start=0.99))},
            {"fake": fakes[1], "generator": (network, identity)},
        ),
        "MeanFlow": (
            {"student": (distillation.Jump(told, "until"), distillation.MeanFlow())},
            {"student": (told.network, mean_flow)},
        ),
    }
    for name, (ours, theirs) in methods.items():
        yield paired(
            f"{name}, UNet of 8x8 digits, batch {COUNT}, step / by hand",
            by_library(batch, teacher, **ours),
            by_hand(batch, teacher, **theirs),
            rounds=9,
            warm=1,
        )
