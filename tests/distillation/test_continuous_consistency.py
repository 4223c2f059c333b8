import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from students import GaussianJump

from jaxdiff import distillation, guidance, networks, oracles, predictions, processes
from jaxdiff._tree import jit
from jaxdiff.denoiser import NetworkDenoiser, TimeLabel
from jaxdiff.training import Player, init_train_state, make_train_step

KEY = jax.random.key(0)
MEAN, STD = 0.3, 0.7


def gaussian(process, mean=MEAN, std=STD):
    return oracles.gaussian(process, jnp.full(1, mean), std**2 * jnp.eye(1))


def exact(process, mean=MEAN, std=STD):
    return distillation.Jump(GaussianJump.of(process, mean, std), until="until")


def network_student(process, seed=0):
    network = networks.MLP(2, hidden=16, num_blocks=1, dropout=0.2, rngs=nnx.Rngs(seed))
    for layer in (network.last, network.blocks[0].second):  # which start at zero
        kernel = layer.kernel[...]
        layer.kernel[...] = 0.3 * jax.random.normal(KEY, kernel.shape, kernel.dtype)
    return distillation.Jump(
        NetworkDenoiser(network, process, predictions.Velocity(), TimeLabel(1.0))
    )


def test_data_as_wide_as_the_noise_stand_still(x64):
    """The flow map is the identity, F = -tan(t / 2) x / sigma_data, and g vanishes at r = 1."""
    process = processes.TrigFlow(sigma_data=0.4)
    loss = distillation.ContinuousConsistency(warmup=0, floor=None, teacher="teacher")

    @jit
    def found(student, teacher, t, ratio):
        x, t = jnp.asarray([0.7]), jnp.asarray(t)
        velocity = teacher.predict(predictions.Velocity(), x, t)
        F, g, dF = loss.tangent(student, x, t, velocity, ratio=ratio)
        value, metrics = loss(student, KEY, {"x": 0.4 * jnp.ones((32, 1))}, {"teacher": teacher})
        return velocity, F, g, dF, value, metrics

    student, teacher = exact(process, 0.0, 0.4), gaussian(process, 0.0, 0.4)
    for t in (0.2, 0.8, 1.4):
        velocity, F, g, dF, value, metrics = found(student, teacher, t, 1.0)
        np.testing.assert_allclose(velocity, 0, atol=1e-12)
        np.testing.assert_allclose(F, -np.tan(t / 2) * 0.7 / 0.4, rtol=1e-9)
        np.testing.assert_allclose(dF, -0.5 / np.cos(t / 2) ** 2 * 0.7 / 0.4, rtol=1e-8)
        np.testing.assert_allclose(g, 0, atol=1e-12)
        assert value < 1e-20 and metrics["ratio"] == 1 and metrics["rms_g"] < 1e-10
        # At r = 0 the diffusion model's own direction: towards F = 0.
        g = found(student, teacher, t, 0.0)[2]
        np.testing.assert_allclose(g, np.cos(t) ** 2 * np.tan(t / 2) * 0.7, rtol=1e-9)


def test_the_exact_flow_map_of_other_data_has_no_tangent(x64):
    """g = 0 along the teacher's velocity; of data, in the mean over x0 given x_t."""
    process = processes.TrigFlow()
    loss = distillation.ContinuousConsistency()
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)

    @jit
    def found(student, teacher):
        x, t = jnp.asarray([0.7]), jnp.asarray(0.9)
        velocity = teacher.predict(predictions.Velocity(), x, t)
        marginal = loss.tangent(student, x, t, velocity)[1]
        alpha, sigma = process.alpha(t), process.sigma(t)
        spread = STD * sigma / jnp.hypot(alpha * STD, sigma)
        x0 = teacher(x, t) + spread * nodes[:, None]
        velocities = jnp.cos(t) * (x - alpha * x0) / jnp.sin(t) - jnp.sin(t) * x0
        own = jax.vmap(lambda v: loss.tangent(student, x, t, v)[1])(velocities)[:, 0]
        return marginal, own

    marginal, own = found(exact(process), gaussian(process))
    np.testing.assert_allclose(marginal, 0, atol=1e-12)
    assert abs(weights @ own / weights.sum()) < 1e-12 and np.abs(own).max() > 0.3
    # In the mean, g of another map is that of the marginal velocity.
    marginal, own = found(exact(process, std=0.5), gaussian(process))
    np.testing.assert_allclose(weights @ own / weights.sum(), marginal[0], rtol=1e-9)
    assert abs(marginal[0]) > 1e-3


def test_the_tangent_is_that_of_central_differences(x64):
    """Of a network, in the form of the paper's algorithm, with r between 0 and 1."""
    process, ratio = processes.TrigFlow(sigma_data=0.4), 0.6
    loss = distillation.ContinuousConsistency()

    @jit
    def found(student):
        x, t, v, h = jnp.asarray([0.7, -0.2]), jnp.asarray(0.9), jnp.asarray([0.5, -1.0]), 1e-5
        key = jax.random.key(4)

        def said(x, t):
            u = student.base.predict(predictions.Velocity(), x, t, key=key)
            return u / process.sigma_data

        F, g, dF = loss.tangent(student, x, t, v, ratio=ratio, key=key)
        apart = (said(x + h * v, t + h) - said(x - h * v, t - h)) / (2 * h)
        sd, c, s = process.sigma_data, jnp.cos(t), jnp.sin(t)
        paper = -(c**2) * (sd * F - v) - ratio * c * s * (x + sd * apart)
        return (F, dF, g), (said(x, t), apart, paper)

    for got, expected in zip(*found(network_student(process)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("teacher", ["teacher", None])
def test_a_student_learns_the_flow_map(x64, teacher):
    process, steps = processes.TrigFlow(), 400
    loss = distillation.ContinuousConsistency(warmup=100, floor=0.1, teacher=teacher)
    rate = optax.cosine_decay_schedule(0.05, steps)
    players = {"student": Player(exact(process, 0.0, 1.5), loss, optax.adam(rate))}
    state, step = init_train_state(players, KEY), make_train_step(players)
    for n in range(steps):
        x = MEAN + STD * jax.random.normal(jax.random.fold_in(KEY, n), (128, 1))
        state, metrics = step(state, {"x": x}, {"teacher": gaussian(process)})
        assert np.isclose(metrics["ratio"], min(n / 100, 1), atol=1e-6)
    learned = state.players["student"].model.network
    tolerance = 1e-4 if teacher else 0.05
    np.testing.assert_allclose(learned["mean"], MEAN, atol=tolerance)
    np.testing.assert_allclose(np.exp(learned["log_std"]), STD, atol=tolerance)


def test_the_loss_has_the_gradient_of_its_tangent(x64):
    """-2 g dF: g divided by its root mean square and the floor, and a constant."""
    process = processes.TrigFlow()
    loss = distillation.ContinuousConsistency(warmup=0, floor=0.1)
    batch = {"x": jnp.asarray([[0.5]])}

    @jit
    def found(student, floor):
        changed = dataclasses.replace(loss, floor=floor)
        (value, metrics), slope = eqx.filter_value_and_grad(changed, has_aux=True)(
            student, KEY, batch, {}
        )
        return value, metrics["rms_g"], slope.base.network["mean"]

    student = exact(process)
    plain, rms, slope = found(student, None)
    value, same, divided = found(student, 0.1)
    np.testing.assert_allclose([plain, value], [rms**2, (rms / (rms + 0.1)) ** 2], rtol=1e-9)
    np.testing.assert_allclose([divided, same], [slope / (rms + 0.1), rms], rtol=1e-9)


def test_passes_and_gradients(x64):
    process, calls = processes.TrigFlow(), []

    class Counted(eqx.Module):
        weight: jax.Array
        name: str = eqx.field(static=True)

        def __call__(self, x, t, cond, *, key=None):
            calls.append(self.name)
            return self.weight * x

    def network(name):
        made = Counted(jnp.asarray(0.3), name)
        return NetworkDenoiser(made, process, predictions.Velocity())

    batch = {"x": jnp.ones((4, 1)), "cond": jnp.asarray([0, 1, 0, 1])}
    pair = distillation.Jump(network("student")), guidance.ClassifierFree(network("teacher"), 2)
    loss = distillation.ContinuousConsistency(teacher="teacher", scales=(1, 3))

    def value(pair):
        return loss(pair[0], KEY, batch, {"teacher": pair[1]})[0]

    slopes = eqx.filter_jit(eqx.filter_grad(value))(pair)
    assert sorted(calls) == ["student", "teacher"]
    assert slopes[0].network.weight != 0
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(slopes[1]))


def test_wrong_arguments():
    process, batch = processes.TrigFlow(), {"x": jnp.ones((2, 1))}
    loss = distillation.ContinuousConsistency()
    with pytest.raises(ValueError, match="must be of the process TrigFlow, got EDM"):
        loss(exact(processes.EDM()), KEY, batch, {})
    with pytest.raises(TypeError, match="must be a map from one time to another"):
        loss(gaussian(process), KEY, batch, {})
    with pytest.raises(TypeError, match="must have a method clean"):
        loss(oracles.GaussianFlowMap(gaussian(process)), KEY, batch, {})
    with pytest.raises(ValueError, match="`scales` are of a guided teacher"):
        distillation.ContinuousConsistency(scales=(1, 3))
    with pytest.raises(ValueError, match="`frozen` must have a denoiser 'teacher'"):
        distillation.ContinuousConsistency(teacher="teacher")(exact(process), KEY, batch, {})
