import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from generators import Affine, Posterior, counted, law, learned

from jaxdiff import distillation, losses, oracles, predictions, processes
from jaxdiff._tree import jit
from jaxdiff.denoiser import NetworkDenoiser
from jaxdiff.flow_map import FlowMap
from jaxdiff.training import Player, init_train_state, make_train_step

KEY = jax.random.key(0)
MEAN, STD = 0.3, 0.5


class Quadratic(eqx.Module):
    """A logit of second order in x."""

    weights: jax.Array

    def __call__(self, x, t, cond=None):
        return self.weights @ jnp.stack([jnp.ones(()), x[0], x[0] ** 2])


class Even(losses.TimeLaw):
    """One time."""

    def quantile(self, process, u):
        return jnp.full_like(u, 0.5)

    def density(self, process, t):
        return jnp.ones_like(t)


class Linear(nnx.Module):
    """A network of one tap, twice its input."""

    def __init__(self, weight):
        self.weight = nnx.Param(jnp.asarray(weight))

    def __call__(self, x, t, cond=None, *, key=None, tap=lambda name, h: h):
        return tap("mid", self.weight[...] * x)


class Head(nnx.Module):
    """gain (sum of the tap) + bias."""

    def __init__(self, gain, bias):
        self.gain, self.bias = nnx.Param(jnp.asarray(gain)), nnx.Param(jnp.asarray(bias))

    def __call__(self, taps):
        return self.gain[...] * jnp.sum(taps["mid"]) + self.bias[...]


def test_the_critic_pulls_through_the_features_of_the_fake_score(x64):
    """The fake score is evaluated once; neither it nor the critic has a gradient."""
    process = processes.EDM(0.02, 5.0)
    generator = law(Affine, process, -0.4, 1.3)
    network, counts = Linear(2.0), []

    class Counting(NetworkDenoiser):
        def estimate(self, *args, **kwargs):
            counts.append(1)
            return super().estimate(*args, **kwargs)

    fake = Counting(network, process, predictions.X0())
    frozen = {
        "teacher": law(Posterior, process, MEAN, STD), "fake": fake,
        "critic": distillation.FeatureCritic(Head(3.0, 0.5), ("mid",)),
    }  # fmt: skip
    batch = {"x": jnp.zeros((6, 1))}

    def grads(loss):
        run = lambda model, frozen: loss(model, KEY, batch, frozen)[0]
        return jit(jax.grad(run, argnums=(0, 1), allow_int=True))(generator, frozen)

    hinge = {"adversarial": distillation.Hinge(), "time_law": Even()}
    (alone, _), (both, theirs) = (grads(distillation.DMD2(gan=g, **hinge)) for g in (0.0, 0.1))
    # -logit = -3 (2 (x_g + sigma eps)) - 0.5, so that each example is pulled by -6.
    np.testing.assert_allclose(both.mean - alone.mean, -0.6, rtol=1e-9)
    for leaf in jax.tree.leaves(theirs):
        np.testing.assert_array_equal(leaf, 0)
    counts.clear()
    loss = distillation.DMD2(gan=0.1, **hinge)
    value = jit(loss)(generator, KEY, batch, frozen)[0]
    assert len(counts) == 1
    # A critic of its own that knows as much says the same.
    own = jax.tree_util.Partial(lambda x, t, cond: 6.0 * jnp.sum(x) + 0.5)
    other = jit(loss)(generator, KEY, batch, {**frozen, "critic": own})[0]
    np.testing.assert_allclose(other, value, rtol=1e-12)


def test_a_critic_learns_to_tell_noised_laws_at_one_time(x64):
    """Of equal variances the best logit of softplus is linear, (log p / q)(x)."""
    process = processes.EDM(0.02, 5.0)
    generator, passes = counted(law(Affine, process, -0.5, STD))
    critic = distillation.FeatureCritic(Head(0.0, 0.0), ("mid",))
    loss = distillation.CriticLoss(time_law=Even())
    players = {"critic": Player(critic, loss, optax.adam(optax.cosine_decay_schedule(0.05, 600)))}
    fake = NetworkDenoiser(Linear(2.0), process, predictions.X0())
    state, step = init_train_state(players, KEY), make_train_step(players)
    for n in range(1000):
        x = MEAN + STD * jax.random.normal(jax.random.fold_in(KEY, n), (512, 1))
        state, metrics = step(state, {"x": x}, {"generator": generator, "fake": fake})
    variance = STD**2 + 0.5**2
    head = state.players["critic"].model.head
    expected = [(MEAN + 0.5) / variance, (0.5**2 - MEAN**2) / (2 * variance)]
    np.testing.assert_allclose([2 * head.gain[...], head.bias[...]], expected, atol=0.06)
    assert len(passes) == 1
    # And the noise levels of both halves are the same: seen as one logit, they do not differ.
    seen = lambda x, t, cond: t
    both = distillation.CriticLoss(distillation.Hinge())(
        seen, KEY, {"x": jnp.ones((8, 1))}, {"generator": generator}
    )[1]
    assert both["real"] == both["fake"]


@pytest.mark.parametrize("kind", [distillation.Hinge, distillation.NonSaturating])
def test_a_penalty_is_on_the_slope_at_real_examples(x64, kind):
    """Of x^2 at the time t, where the slope is 2 x: gamma / 2 E (2 x_t)^2, x_t of the data."""
    process = processes.EDM(0.02, 5.0)
    generator = law(Affine, process, -0.5, STD)
    critic = lambda x, t, cond: jnp.sum(x**2)
    x = MEAN + STD * jax.random.normal(KEY, (64, 1))

    @jax.jit
    def loss(penalty):
        value = distillation.CriticLoss(kind(penalty), time_law=Even())
        return value(critic, KEY, {"x": x}, {"generator": generator})

    plain, means = distillation.CriticLoss(kind(), time_law=Even())(
        critic, KEY, {"x": x}, {"generator": generator}
    )
    value, same = loss(0.3)
    np.testing.assert_allclose(same["real"], means["real"], rtol=1e-12)
    np.testing.assert_allclose(value - plain, 0.15 * 4 * means["real"], rtol=1e-12)


def test_two_time_scales_learn_the_teacher(x64):
    """A generator of two steps, which rests at four steps of five."""
    process, times = processes.EDM(0.05, 5.0), (5.0, 1.0)
    teacher = oracles.gaussian(process, jnp.full(1, MEAN), STD**2 * jnp.eye(1))
    time_law = losses.LogNormal(-0.5, 0.7)
    denoising = losses.DenoisingLoss(losses.Uniform(predictions.F(0.5)), time_law)
    rate = lambda most, n: optax.adam(optax.cosine_decay_schedule(most, n), b1=0.0)
    generator = Flow(process, jnp.asarray(0.8), jnp.asarray(0.8))
    players = {
        "fake": Player(
            law(Posterior, process, 1.0, 1.0),
            distillation.FakeScoreLoss(denoising, start=times), rate(0.05, 800), trainable=learned,
        ),
        "critic": Player(
            Quadratic(jnp.zeros(3)), distillation.CriticLoss(time_law=time_law, start=times),
            rate(0.05, 800), trainable=lambda critic: critic.weights,
        ),
        "generator": Player(
            generator, distillation.DMD2(time_law=time_law, start=times), rate(0.03, 160), every=5,
            trainable=learned,
        ),
    }  # fmt: skip
    state, step = init_train_state(players, KEY), make_train_step(players)
    for x in MEAN + STD * np.random.default_rng(0).standard_normal((800, 128, 1)):
        state, _ = step(state, {"x": x}, {"teacher": teacher})
    assert int(state.players["generator"].updates) == 160
    found = state.players["generator"].model
    np.testing.assert_allclose([found.mean, found.std], [MEAN, STD], atol=0.05)


class Flow(FlowMap):
    """To data along the flow of N(mean, std^2), from any time."""

    process: processes.EDM
    mean: jax.Array
    std: jax.Array

    def __call__(self, x, t, s, cond=None, *, key=None):
        return self.mean + self.std / jnp.hypot(self.std, t) * (x - self.mean)


def test_wrong_arguments():
    process = processes.EDM()
    generator, fake = law(Affine, process, 0.0, 1.0), law(Posterior, process, 0.0, 1.0)
    frozen, batch = {"teacher": fake, "fake": fake}, {"x": jnp.zeros((2, 1))}
    with pytest.raises(ValueError, match="`frozen` must have a critic 'critic'"):
        distillation.DMD2()(generator, KEY, batch, frozen)
    critic = distillation.FeatureCritic(lambda taps: taps["mid"], ("mid",))
    network = NetworkDenoiser(Linear(2.0), process, predictions.X0())
    with pytest.raises(ValueError, match="a scalar logit"):
        distillation.CriticLoss()(critic, KEY, batch, {"generator": generator, "fake": network})
    with pytest.raises(ValueError, match="`frozen` must have a denoiser 'fake'"):
        distillation.CriticLoss()(critic, KEY, batch, {"generator": generator})
