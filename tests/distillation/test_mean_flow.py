import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from students import GaussianJump

from jaxdiff import distillation, guidance, losses, oracles, predictions, processes
from jaxdiff._tree import jit
from jaxdiff.denoiser import NetworkDenoiser, TimeLabel
from jaxdiff.training import Player, init_train_state, make_train_step

KEY = jax.random.key(0)
MEAN, STD = 0.3, 0.5


def gaussian(process, mean=MEAN, std=STD):
    return oracles.gaussian(process, jnp.full(1, mean), std**2 * jnp.eye(1))


def exact(process, mean=MEAN, std=STD):
    return distillation.Jump(GaussianJump.of(process, mean, std), until="until")


KINDS = [processes.RectifiedFlow(), processes.Cosine(), processes.EDM(), processes.TrigFlow()]


@pytest.mark.parametrize("process", KINDS, ids=lambda p: type(p).__name__)
def test_the_exact_flow_map_satisfies_the_identity(x64, process):
    """At any two times, with the teacher's velocity; its mean velocity is that of the oracle."""
    law = losses.LogNormal(-0.5, 1.0)
    loss = distillation.MeanFlow(law, same=0.3, power=0.0, teacher="teacher")
    student, batch = exact(process), {"x": MEAN + STD * jax.random.normal(KEY, (64, 1))}

    @jit
    def found(student, teacher):
        value, metrics = loss(student, KEY, batch, {"teacher": teacher})
        t, s = law.quantile(process, jnp.asarray([0.8, 0.3]))
        x = jnp.asarray([0.7])
        moved = oracles.gaussian_flow_map(teacher, x, t, s)
        u = distillation.mean_velocity(student, x, t, s)
        (k_t, tau_t), (k_s, tau_s) = (distillation.straightened(process, v) for v in (t, s))
        return value, metrics, u, (x / k_t - moved / k_s) / (tau_t - tau_s), student(x, t, s), moved

    value, metrics, u, expected, jumped, moved = found(student, gaussian(process))
    np.testing.assert_allclose(u, expected, rtol=1e-9)
    np.testing.assert_allclose(jumped, moved, rtol=1e-9)
    assert value < 1e-20 and metrics["mse"] < 1e-20 and 0.1 < metrics["tangent"] < 10
    wrong = found(exact(process, std=0.6), gaussian(process))[0]
    assert wrong > 1e-5


def test_without_a_teacher_the_mean_residual_is_none(x64):
    """Given x_t, over data and noise by Gauss-Hermite; that of an example is not."""
    process = processes.RectifiedFlow()
    loss, student = distillation.MeanFlow(), exact(process)
    x, t, s = jnp.asarray([0.7]), jnp.asarray(0.8), jnp.asarray(0.3)
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    total = (0.2 * STD) ** 2 + 0.8**2
    gain = 0.2 * STD**2 / total
    x0 = MEAN + gain * (x - 0.2 * MEAN) + STD * 0.8 / np.sqrt(total) * nodes[:, None]
    v = (x - x0) / 0.8  # eps - x0

    @jit
    def residuals(student):
        def one(v):
            u, goal, _ = loss.target(student, x, t, s, v)
            return u - goal

        return jax.vmap(one)(v)[:, 0]

    found = residuals(student)
    assert abs(weights @ found / weights.sum()) < 1e-12 and np.abs(found).max() > 0.5


def test_at_one_time_it_is_flow_matching(x64):
    """Bit for bit, whatever the student; and a velocity network says u itself."""
    process = processes.RectifiedFlow()
    network = lambda x, t, cond, *, key=None: jnp.sin(3 * x + t) + cond["until"]
    student = distillation.Jump(
        NetworkDenoiser(network, process, predictions.Velocity(), TimeLabel(1.0)), until="until"
    )
    x, t, v = jnp.asarray([0.4, -1.0]), jnp.asarray(0.6), jnp.asarray([1.0, 2.0])
    u, goal, _ = distillation.MeanFlow().target(student, x, t, t, v)
    np.testing.assert_array_equal(goal, v)
    np.testing.assert_allclose(u, jnp.sin(3 * x + t) + t, rtol=1e-12)
    # The derivative of u along (v, 1), and none of s.
    s = jnp.asarray(0.1)
    u, goal, du = distillation.MeanFlow().target(student, x, t, s, v)
    np.testing.assert_allclose(du, jnp.cos(3 * x + t) * (3 * v + 1), rtol=1e-9)
    np.testing.assert_allclose(goal, v - 0.5 * du, rtol=1e-12)


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_the_weight_is_a_constant_of_the_residual(x64, power):
    process, floor = processes.RectifiedFlow(), 0.1
    batch = {"x": jnp.ones((1, 1))}

    @jit
    def found(student, power):
        loss = distillation.MeanFlow(same=1.0, power=power, floor=floor)
        (value, metrics), slopes = eqx.filter_value_and_grad(loss, has_aux=True)(
            student, KEY, batch, {}
        )
        return value, metrics["mse"], slopes.base.network["mean"]

    student = exact(process, mean=0.0)
    value, square, slope = found(student, power)
    plain = found(student, 0.0)[2]
    np.testing.assert_allclose(value, square / (square + floor) ** power, rtol=1e-12)
    np.testing.assert_allclose(slope, plain / (square + floor) ** power, rtol=1e-12)


@pytest.mark.parametrize("teacher", ["teacher", None])
def test_a_student_learns_the_flow_map(x64, teacher):
    """Of its teacher, exactly, or of data, up to the noise of the batches."""
    process = processes.RectifiedFlow()
    loss = distillation.MeanFlow(power=0.0, same=0.5, teacher=teacher)
    steps = 400
    rate = optax.cosine_decay_schedule(0.05, steps)
    players = {"student": Player(exact(process, 0.0, 1.0), loss, optax.adam(rate))}
    state, step = init_train_state(players, KEY), make_train_step(players)
    for n in range(steps):
        x = MEAN + STD * jax.random.normal(jax.random.fold_in(KEY, n), (128, 1))
        state, metrics = step(state, {"x": x}, {"teacher": gaussian(process)})
    learned = state.players["student"].model.network
    tolerance = 1e-6 if teacher else 0.03
    np.testing.assert_allclose(learned["mean"], MEAN, atol=tolerance)
    np.testing.assert_allclose(np.exp(learned["log_std"]), STD, atol=tolerance)
    assert metrics["loss"] < 1e-10 if teacher else metrics["loss"] > 0.5


class Guided(eqx.Module):
    """A network of `Velocity` that is a given velocity of a class, and one of none."""

    given: oracles.GaussianMixture
    scale: jax.Array

    def __call__(self, x, t, cond, *, key=None):
        velocity = lambda c: (x - self.given(x, t, c)) / t
        label, none = cond["label"], velocity(2)
        return none + jnp.where(label == 2, 0, self.scale) * (velocity(label) - none)


@pytest.mark.parametrize(("omega", "kappa"), [(2.5, None), (1.0, 0.6)])
def test_guidance_in_the_target_has_the_guided_velocity_for_its_fixed_point(x64, omega, kappa):
    """Scale omega / (1 - kappa): the mean target of a student that says so is what it says."""
    process, scale = processes.RectifiedFlow(), omega / (1 - (kappa or 0))
    classes = oracles.gaussian_mixture(
        process, jnp.asarray([[-1.0], [1.0]]), jnp.full((2, 1, 1), 0.25), labels=[0, 1]
    )
    loss = distillation.MeanFlow(
        same=1.0, power=0.0, null_cond=2, label_dropout=0.0, omega=omega, kappa=kappa
    )
    x, t = jnp.asarray([0.7]), jnp.asarray(0.6)

    @jit
    def found(classes, scale):
        network = Guided(classes, scale)
        student = distillation.Jump(
            NetworkDenoiser(network, process, predictions.Velocity(), TimeLabel(1.0)), "until"
        )
        # The example's velocity, in its mean, is the class's own.
        v = (x - classes(x, t, jnp.asarray(1))) / t
        goal = loss._guided(student, v, x, t, jnp.asarray(1), None)
        return goal, distillation.mean_velocity(student, x, t, t, jnp.asarray(1))

    goal, said = found(classes, jnp.asarray(scale))
    np.testing.assert_allclose(goal, said, rtol=1e-10)
    other = found(classes, jnp.asarray(scale + 0.1))
    assert abs(other[0] - other[1]) > 1e-3


def test_passes_and_gradients(x64):
    """One of the student, and those that guidance or a teacher need; none of these learns."""
    process, calls = processes.RectifiedFlow(), []

    class Counted(eqx.Module):
        weight: jax.Array
        name: str = eqx.field(static=True)

        def __call__(self, x, t, cond, *, key=None):
            calls.append(self.name)
            return self.weight * x

    def network(name):
        made = Counted(jnp.asarray(0.3), name)
        return NetworkDenoiser(made, process, predictions.Velocity())

    student = distillation.Jump(network("student"), until="until")
    batch = {"x": jnp.ones((4, 1)), "cond": jnp.asarray([0, 1, 0, 1])}
    teacher = guidance.ClassifierFree(network("teacher"), null_cond=2)
    cases = [
        ({}, ["student"]),
        ({"null_cond": 2}, ["student"] * 2),
        ({"teacher": "teacher", "scales": (1, 3)}, ["student", "teacher"]),
    ]
    for options, expected in cases:
        loss = distillation.MeanFlow(**options)

        def value(pair, loss=loss):
            return loss(pair[0], KEY, batch, {"teacher": pair[1]})[0]

        slopes = eqx.filter_jit(eqx.filter_grad(value))((student, teacher))
        # A map over conditions traces its function once for all of them.
        assert sorted(calls) == expected
        assert slopes[0].network.weight != 0
        assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(slopes[1]))
        calls.clear()


def test_wrong_arguments():
    process = processes.RectifiedFlow()
    batch, loss = {"x": jnp.ones((2, 1))}, distillation.MeanFlow()
    with pytest.raises(TypeError, match="must be a map from one time to another"):
        loss(gaussian(process), KEY, batch, {})
    with pytest.raises(TypeError, match="must have a method clean"):
        loss(oracles.GaussianFlowMap(gaussian(process)), KEY, batch, {})
    with pytest.raises(ValueError, match="must be told where it jumps to"):
        loss(distillation.Jump(gaussian(process)), KEY, batch, {})
    with pytest.raises(ValueError, match="`null_cond` is of guidance without a teacher"):
        distillation.MeanFlow(null_cond=2, teacher="teacher")
    with pytest.raises(ValueError, match="`scales` are of a guided teacher"):
        distillation.MeanFlow(scales=(1, 3))
    with pytest.raises(ValueError, match="`kappa` is of guidance"):
        distillation.MeanFlow(kappa=0.5)
    with pytest.raises(ValueError, match="`frozen` must have a denoiser 'teacher'"):
        distillation.MeanFlow(teacher="teacher")(exact(process), KEY, batch, {})
    with pytest.raises(ValueError, match="LogitNormal"):
        loss(exact(processes.EDM()), KEY, batch, {})
