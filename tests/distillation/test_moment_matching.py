import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from generators import Posterior, counted, law, learned

from jaxdiff import distillation, processes
from jaxdiff._tree import jit
from jaxdiff.denoiser import Denoiser
from jaxdiff.distillation._moment_matching import Bridged, bridge
from jaxdiff.flow_map import FlowMap
from jaxdiff.processes import GaussianProcess
from jaxdiff.training import Player, init_train_state, make_train_step

KEY = jax.random.key(0)
MEAN, STD = 0.3, 0.5
T, S = 0.6, 0.35


class Line(FlowMap):
    """x -> slope x + offset."""

    process: GaussianProcess
    slope: jax.Array
    offset: jax.Array

    def __call__(self, x, t, s, cond=None, *, key=None):
        return self.slope * x + self.offset


class LineDenoiser(Denoiser):
    """Likewise."""

    process: GaussianProcess
    slope: jax.Array
    offset: jax.Array

    def __call__(self, x, t, cond=None, *, key=None):
        return self.slope * x + self.offset


# Means and covariances of three normal numbers, exactly, by eight examples.
NODES = np.array(list(itertools.product([-1.0, 1.0], repeat=3)))[:, :, None]


def at_one_pair_of_times(kind):
    """A loss at t = 0.6 and s = 0.35, over eight examples with the moments of the law."""

    class Fixed(kind):
        def bridged(self, model, key, batch):
            data, eps, fresh = jnp.asarray(NODES.transpose(1, 0, 2))
            z = jax.vmap(model.process.marginal, (0, 0, None))(MEAN + STD * data, eps, T)
            times = jnp.asarray(T), jnp.asarray(S)
            x0, z = jax.vmap(lambda z, fresh: bridge(model, z, fresh, *times))(z, fresh)
            return Bridged(x0, z, jnp.full(8, S), None)

    return Fixed()


def regression(made):
    """E[x0 | z] as slope and offset."""
    x, z = made.x0[:, 0], made.z[:, 0]
    slope = jnp.mean((x - x.mean()) * (z - z.mean())) / jnp.var(z)
    return slope, x.mean() - slope * z.mean()


@pytest.mark.parametrize("process", [processes.Cosine(), processes.EDM(0.02, 5.0)])
def test_the_bridge_of_the_exact_posterior_keeps_the_law(x64, process):
    """x0 drawn from p(x0 | z_t) makes z_s as the process does."""
    t, s = jnp.asarray(T), jnp.asarray(S)
    teacher = law(Posterior, process, MEAN, STD)
    alpha, sigma = process.alpha(t), process.sigma(t)
    left = STD * sigma / jnp.hypot(alpha * STD, sigma)  # deviation of x0 given z_t
    total = jnp.hypot(alpha * STD, sigma)

    def z_s(u, v, w):
        z = alpha * MEAN + total * u

        class Drawn(Line):
            def __call__(self, x, t, s, cond=None, *, key=None):
                return teacher(x, t) + left * v

        return bridge(Drawn(process, t, t), z, w, t, s)[1]

    zero = jnp.zeros(1)
    origin = z_s(zero, zero, zero)[0]
    parts = [z_s(*row[:, None])[0] - origin for row in jnp.eye(3)]
    np.testing.assert_allclose(origin, process.alpha(s) * MEAN, rtol=1e-9)
    variance = np.sum(np.square(parts))
    expected = (process.alpha(s) * STD) ** 2 + process.sigma(s) ** 2
    np.testing.assert_allclose(variance, expected, rtol=1e-9)
    close = jnp.asarray(T * (1 - 1e-16))
    assert np.isfinite(bridge(Line(process, t, t), zero, zero + 1, t, close)[1])


def test_the_auxiliary_is_half_of_both_and_the_gradient_is_halved(x64):
    process, student_loss = (
        processes.Cosine(),
        at_one_pair_of_times(distillation.MultistepMomentMatching),
    )
    loss = at_one_pair_of_times(distillation.MomentMatchingAuxiliary)
    teacher = law(Posterior, process, MEAN, STD)
    student = Line(process, jnp.asarray(0.7), jnp.asarray(-0.2))
    origin = teacher(jnp.zeros(1), jnp.asarray(S))[0]
    line = jnp.stack([teacher(jnp.ones(1), jnp.asarray(S))[0] - origin, origin])

    @jit
    def found():
        frozen = {"teacher": teacher, "generator": student}
        made = loss.bridged(student, KEY, {})
        mean = jnp.stack(regression(made))

        def slope(parameters):
            value = lambda p: loss(LineDenoiser(process, *p), KEY, {}, frozen)[0]
            return jax.grad(value)(parameters)

        # The loss is quadratic: one step of Newton's method is its minimum.
        start = jnp.zeros(2)
        best = start - jnp.linalg.solve(jax.jacobian(slope)(start), slope(start))

        def pull(parameters):
            frozen = {"teacher": teacher, "fake": LineDenoiser(process, *parameters)}
            value = lambda p: student_loss(Line(process, *p), KEY, {}, frozen)[0]
            return jax.grad(value)(jnp.stack([student.slope, student.offset]))

        return mean, best, pull(best), pull(mean)

    mean, best, half, whole = found()
    np.testing.assert_allclose(best, (mean + line) / 2, rtol=1e-9)
    np.testing.assert_allclose(half, whole / 2, rtol=1e-9)
    assert np.all(np.abs(whole) > 1e-3)


def test_alternating_steps_end_at_the_teachers_conditional_mean(x64):
    process = processes.Cosine()
    student_loss = at_one_pair_of_times(distillation.MultistepMomentMatching)
    teacher = law(Posterior, process, MEAN, STD)
    origin = teacher(jnp.zeros(1), jnp.asarray(S))[0]
    line = jnp.stack([teacher(jnp.ones(1), jnp.asarray(S))[0] - origin, origin])

    @jit
    def ended(parameters):
        def move(parameters, _):
            made = student_loss.bridged(Line(process, *parameters), KEY, {})
            auxiliary = LineDenoiser(process, *(jnp.stack(regression(made)) + line) / 2)
            frozen = {"teacher": teacher, "fake": auxiliary}
            value = lambda p: student_loss(Line(process, *p), KEY, {}, frozen)[0]
            return parameters - jax.grad(value)(parameters), None

        parameters = jax.lax.scan(move, parameters, None, length=500)[0]
        return jnp.stack(regression(student_loss.bridged(Line(process, *parameters), KEY, {})))

    np.testing.assert_allclose(ended(jnp.asarray([1.2, -0.5])), line, atol=1e-9)


def test_players_of_a_step(x64):
    """Nobody but the player's own model has a gradient; one pass of each."""
    process = processes.Cosine()
    student, passes = counted(Line(process, jnp.asarray([0.4, 0.6]), jnp.asarray([0.1, -0.1])))
    teacher, teacher_passes = counted(law(Posterior, process, [MEAN, 1.0], [STD, 0.3]))
    fake, fake_passes = counted(law(Posterior, process, [0.2, 0.4], [1.0, 0.8]))
    batch = {"x": jax.random.normal(KEY, (6, 2)), "cond": jnp.asarray([0, 1, 0, 1, 0, 1])}
    losses = (
        (distillation.MultistepMomentMatching(4), student, {"teacher": teacher, "fake": fake}),
        (distillation.MomentMatchingAuxiliary(4), fake, {"teacher": teacher, "generator": student}),
    )
    for loss, model, frozen in losses:
        for calls in (passes, teacher_passes, fake_passes):
            calls.clear()

        @jit
        def grads(model, frozen, loss=loss):
            scalar = lambda model, frozen: loss(model, KEY, batch, frozen)[0]
            return jax.grad(scalar, argnums=(0, 1))(model, frozen)

        own, theirs = grads(model, frozen)
        assert any(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(own))
        for leaf in jax.tree.leaves(theirs):
            np.testing.assert_array_equal(leaf, 0)
        assert [len(passes), len(teacher_passes), len(fake_passes)] == [1, 1, 1]
    players = {
        "fake": Player(fake, losses[1][0], optax.adam(1e-3), trainable=learned),
        "generator": Player(
            student, losses[0][0], optax.adam(1e-3), trainable=lambda m: (m.slope, m.offset)
        ),
    }
    state, metrics = make_train_step(players)(
        init_train_state(players, KEY), batch, {"teacher": teacher}
    )
    assert np.isfinite(metrics["generator/gap"]) and metrics["fake/x0_mse"] > 0


def test_wrong_arguments():
    process = processes.EDM()
    teacher, batch = law(Posterior, process, 0.0, 1.0), {"x": jnp.zeros((2, 1))}
    student = Line(process, jnp.zeros(()), jnp.zeros(()))
    with pytest.raises(ValueError, match="`frozen` must have a denoiser 'fake'"):
        distillation.MultistepMomentMatching()(student, KEY, batch, {"teacher": teacher})
    with pytest.raises(TypeError, match="must be a map from one time to another"):
        distillation.MultistepMomentMatching()(teacher, KEY, batch, {"teacher": teacher})
    with pytest.raises(ValueError, match="`frozen` must have a generator"):
        distillation.MomentMatchingAuxiliary()(teacher, KEY, batch, {"teacher": teacher})
    with pytest.raises(ValueError, match="`steps` must be at least 1"):
        distillation.MultistepMomentMatching(0)
