import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from generators import Affine, Posterior, counted, law

from jaxdiff import distillation, losses, oracles, predictions, processes
from jaxdiff._tree import jit
from jaxdiff.flow_map import FlowMap
from jaxdiff.processes import GaussianProcess
from jaxdiff.training import Player, init_train_state, make_train_step

KEY = jax.random.key(0)


class Matrix(FlowMap):
    """x -> matrix x + offset."""

    process: GaussianProcess
    matrix: jax.Array
    offset: jax.Array

    def __call__(self, x, t, s, cond=None, *, key=None):
        return self.matrix @ x + self.offset


def plane(process, mean=0.0):
    """Data N(mean, diag(1, 0)) in two numbers, as an oracle."""
    return oracles.gaussian(process, jnp.asarray([mean, 0.0]), jnp.diag(jnp.asarray([1.0, 0.0])))


def test_a_projection_is_kept_whatever_its_law(x64):
    """Onto the data's line: both squares are 0, and the scores alone see that the law is wrong."""
    process = processes.EDM(0.05, 5.0)
    model = Matrix(process, jnp.diag(jnp.asarray([1.0, 0.0])), jnp.zeros(2))
    data = jax.random.normal(KEY, (8, 2)) * jnp.asarray([1.0, 0.0])
    # f(z) = (5 z_1, 0): as wide as the noise.
    wide = oracles.gaussian(process, jnp.zeros(2), jnp.diag(jnp.asarray([25.0, 0.0])))
    frozen = {"teacher": plane(process), "fake": wide}
    loss = distillation.ScoreIdempotent()
    _, metrics = jit(loss)(model, KEY, {"x": data}, frozen)
    np.testing.assert_array_equal([metrics["data"], metrics["idempotence"]], 0)
    assert metrics["gap"] > 0.1
    half = Matrix(process, 0.5 * model.matrix, jnp.zeros(2))
    _, metrics = jit(loss)(half, KEY, {"x": data}, frozen)
    np.testing.assert_allclose(metrics["data"], np.mean((0.5 * data) ** 2), rtol=1e-12)
    assert metrics["idempotence"] > 0.01


@pytest.mark.parametrize("learns", ["inner", "outer", "both"])
def test_which_of_two_maps_has_the_gradient(x64, learns):
    """Of w x: 2 w (w - 1)^2 y^2 inside, 2 w^2 (w - 1) y^2 outside, and their sum."""
    process, w = processes.EDM(0.05, 5.0), 1.7
    loss = distillation.ScoreIdempotent(learns=learns)
    batch = {"x": jax.random.normal(KEY, (16, 1))}

    @jit
    def found(w):
        def value(w):
            return loss.kept(Matrix(process, w[None, None], jnp.zeros(1)), KEY, batch)[1].mean()

        return jax.value_and_grad(value)(w)

    value, slope = found(jnp.asarray(w))
    square = value / (w**2 - w) ** 2  # mean y^2
    inner, outer = 2 * w * (w - 1) ** 2 * square, 2 * w**2 * (w - 1) * square
    expected = {"inner": inner, "outer": outer, "both": inner + outer}
    np.testing.assert_allclose(slope, expected[learns], rtol=1e-9)


def test_a_generator_learns_to_project(x64):
    """Data as wide as the noise along a line, and of none across it: f is the projection."""
    process = processes.EDM(0.05, 4.0)
    teacher = oracles.gaussian(process, jnp.zeros(2), jnp.diag(jnp.asarray([16.0, 0.0])))
    time_law = losses.LogNormal(0.0, 0.8)
    denoising = losses.DenoisingLoss(losses.Uniform(predictions.F(0.5)), time_law)
    matching = distillation.DiffInstruct(losses.Uniform(predictions.F(0.5)), time_law)
    loss = distillation.ScoreIdempotent(matching, time_law=time_law)
    rate = optax.adam(optax.cosine_decay_schedule(0.05, 400), b1=0.0)
    players = {
        "fake": Player(
            law(Wide, process, jnp.zeros(2), jnp.asarray([2.0, 1.0])),
            distillation.FakeScoreLoss(denoising), rate, trainable=lambda m: (m.mean, m.std),
        ),
        "generator": Player(
            Matrix(process, jnp.asarray([[0.6, 0.1], [-0.1, 0.4]]), jnp.full(2, 0.3)), loss,
            optax.adam(optax.cosine_decay_schedule(0.02, 400), b1=0.0),
            trainable=lambda m: (m.matrix, m.offset),
        ),
    }  # fmt: skip
    state, step = init_train_state(players, KEY), make_train_step(players)
    for x in np.random.default_rng(0).standard_normal((400, 64, 2)) * np.array([4.0, 0.0]):
        state, metrics = step(state, {"x": x}, {"teacher": teacher})
    model = state.players["generator"].model
    # Kept: data, and itself; and of the law, which would have no slant but sees it in second order.
    np.testing.assert_allclose(model.matrix[:, 0], [1, 0], atol=0.04)
    np.testing.assert_allclose(model.matrix @ model.matrix, model.matrix, atol=0.04)
    np.testing.assert_allclose(np.linalg.norm(model.matrix, axis=1), [1, 0], atol=0.05)
    np.testing.assert_allclose(model.offset, 0, atol=0.1)
    assert metrics["generator/data"] < 0.01 and metrics["generator/idempotence"] < 0.01


class Wide(Posterior):
    """The denoiser of independent numbers, each with its own mean and deviation."""

    def __call__(self, x, t, cond=None, *, key=None):
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return self.mean + gain * (x - alpha * self.mean)


def test_passes_and_gradients(x64):
    process = processes.EDM(0.05, 5.0)
    model, passes = counted(law(Affine, process, [-0.4, 0.3], [1.3, 0.5]))
    frozen = {
        "teacher": law(Posterior, process, [0.5, -1.0], [0.5, 0.9]),
        "fake": law(Posterior, process, [0.1, 0.2], [0.7, 0.8]),
    }
    batch = {"x": jax.random.normal(KEY, (4, 1)), "cond": jnp.asarray([0, 1, 1, 0])}
    loss = distillation.ScoreIdempotent(distillation.DMD(start=2.0), data=0.3, idempotence=0.2)

    @jit
    def grads(model, frozen):
        scalar = lambda model, frozen: loss(model, KEY, batch, frozen)[0]
        return jax.grad(scalar, argnums=(0, 1))(model, frozen)

    own, theirs = grads(model, frozen)
    assert np.all(np.asarray(own.mean) != 0) and len(passes) == 3
    for leaf in jax.tree.leaves(theirs):
        np.testing.assert_array_equal(leaf, 0)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="`learns` must be one of .*, got 'none'"):
        distillation.ScoreIdempotent(learns="none")
    with pytest.raises(TypeError, match="`matching` must be a DistributionMatching"):
        distillation.ScoreIdempotent(3.0)
    with pytest.raises(ValueError, match="`data` must be at least 0"):
        distillation.ScoreIdempotent(data=-1.0)
