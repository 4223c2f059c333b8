import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from generators import counted, learned

from jaxdiff import distillation, metrics, oracles, processes
from jaxdiff._tree import jit
from jaxdiff.flow_map import FlowMap
from jaxdiff.processes import GaussianProcess
from jaxdiff.training import Player, init_train_state, make_train_step

KEY = jax.random.key(0)
MEAN, STD = 0.3, 0.5


class Flow(FlowMap):
    """The flow of N(mean, std^2) between any two times, as a student that learns both."""

    process: GaussianProcess
    mean: jax.Array
    std: jax.Array

    def __call__(self, x, t, s, cond=None, *, key=None):
        def width(t):
            return jnp.hypot(self.process.alpha(t) * self.std, self.process.sigma(t))

        moved = (x - self.process.alpha(t) * self.mean) * width(s) / width(t)
        return self.process.alpha(s) * self.mean + moved


def flow(process, mean=MEAN, std=STD):
    return Flow(process, jnp.asarray(mean), jnp.asarray(std))


@pytest.mark.parametrize("process", [processes.RectifiedFlow(), processes.EDM(0.02, 5.0)])
def test_the_gap_is_a_share_of_the_range_of_levels(x64, process):
    loss = distillation.InductiveMomentMatching(gap=5)
    t = jnp.linspace(0.05, 0.9, 7) * process.t_max
    level = lambda t: process.sigma(t) / process.alpha(t)
    r = jit(loss.earlier)(process, t, jnp.full(7, process.t_min))
    width = (level(process.t_max) - level(process.t_min)) / 2**5
    expected = np.maximum(level(t) - width, level(process.t_min))
    np.testing.assert_allclose(level(r), expected, rtol=1e-9)
    s = 0.99 * t
    np.testing.assert_array_equal(loss.earlier(process, t, s) >= s, True)


def test_the_bandwidth_is_the_students_own_step(x64):
    """(t - s) sigma_data of a velocity on straight lines."""
    loss, process = distillation.InductiveMomentMatching(), processes.RectifiedFlow()
    t, s = jnp.asarray([0.3, 0.9]), jnp.asarray([0.1, 0.2])
    np.testing.assert_allclose(loss.scale(process, t, s), 0.5 * (t - s), rtol=1e-9)


def test_where_r_is_s_the_target_is_the_noised_data(x64):
    process = processes.RectifiedFlow()
    loss = distillation.InductiveMomentMatching(gap=1e-9, particles=2)
    batch = {"x": jax.random.normal(KEY, (6, 1))}
    student = flow(process, 1.0, 0.7)

    @jit
    def both():
        groups = loss.groups(student, KEY, batch)
        y = jax.vmap(jax.vmap(student, (0, None, None)))(groups.x_t, groups.t, groups.s)
        scales = loss.scale(process, groups.t, groups.s)
        return groups, jax.vmap(loss.mmd2)(y, groups.x_r, scales).mean()

    groups, expected = both()
    np.testing.assert_array_equal(groups.r, groups.s)
    np.testing.assert_allclose(jit(loss)(student, KEY, batch, {})[1]["mmd2"], expected, rtol=1e-9)
    # The same data and noise at both times.
    t, s = groups.t[:, None, None], groups.s[:, None, None]
    x0 = batch["x"].reshape(3, 2, 1)
    eps = (groups.x_t - (1 - t) * x0) / t
    np.testing.assert_allclose(groups.x_r, (1 - s) * x0 + s * eps, atol=1e-12)
    assert len(set(groups.t.tolist())) == 3


def test_one_particle_with_the_energy_kernel_is_consistency(x64):
    process, batch = processes.RectifiedFlow(), {"x": jax.random.normal(KEY, (6, 2))}
    loss = distillation.InductiveMomentMatching(particles=1, kernel=metrics.Energy(), gap=3)
    student, passes = counted(flow(process, 1.0, 0.7))

    @jit
    def expected():
        groups = loss.groups(student, KEY, batch)
        y = jax.vmap(student)(groups.x_t[:, 0], groups.t, groups.s)
        goal = jax.vmap(student)(groups.x_r[:, 0], groups.r, groups.s)
        scales = loss.scale(process, groups.t, groups.s)
        weights = loss.weight(process, groups.t)
        distances = jnp.linalg.norm(y - goal, axis=-1) / scales
        return jnp.mean(2 * weights * distances)

    value = expected()
    passes.clear()
    np.testing.assert_allclose(jit(loss)(student, KEY, batch, {})[0], value, rtol=1e-9)
    assert len(passes) == 2


@pytest.mark.parametrize("kernel", [distillation.Laplace(), metrics.RBF(0.8), metrics.Energy()])
def test_the_statistic_is_a_squared_mmd(x64, kernel):
    loss = distillation.InductiveMomentMatching(kernel=kernel)
    y, goal = jax.random.normal(KEY, (2, 6, 3))
    found = jit(loss.mmd2)(y, goal, jnp.asarray(0.4))
    biased = metrics.mmd2_biased(y / 0.4, goal / 0.4, kernel)
    np.testing.assert_allclose(found, biased, rtol=1e-9)
    assert found > 0
    np.testing.assert_allclose(loss.mmd2(y, y, jnp.asarray(0.4)), 0, atol=1e-14)
    # Classes by themselves, each by the share of its pairs.
    cond = jnp.asarray([0, 1, 0, 1, 1, 1])
    parts = [loss.mmd2(y[cond == c], goal[cond == c], jnp.asarray(0.4)) for c in (0, 1)]
    shares = [(2 / 6) ** 2, (4 / 6) ** 2]
    np.testing.assert_allclose(
        loss.mmd2(y, goal, jnp.asarray(0.4), cond), np.dot(shares, parts), rtol=1e-9
    )


def test_laplace_has_a_derivative_everywhere(x64):
    y = jnp.asarray([[0.3, 4.0], [0.3, 4.0], [3.3, 0.0]])
    np.testing.assert_allclose(distillation.Laplace()(y, y)[0], np.exp([0, 0, -2.5]), rtol=1e-12)
    np.testing.assert_allclose(distillation.Laplace(5.0)(y, y)[0, 2], np.exp(-1), rtol=1e-12)
    slopes = jax.grad(lambda y: distillation.Laplace()(y, y).sum())(y)
    assert np.all(np.isfinite(slopes))


def test_the_weight_is_that_of_the_log_snr(x64):
    process, t = processes.RectifiedFlow(), jnp.asarray(0.4)
    loss = distillation.InductiveMomentMatching(bias=4.0, power=2.0)
    log_snr = 2 * np.log(0.6 / 0.4)
    slope = 2 / (0.6 * 0.4)  # |d/dt 2 log((1 - t) / t)|
    expected = 0.5 / (1 + np.exp(log_snr - 4)) * slope * 0.6**2 / (0.6**2 + 0.4**2)
    np.testing.assert_allclose(loss.weight(process, t), expected, rtol=1e-9)


def test_particles_of_one_condition_are_in_one_group():
    """Which conditions, and in what order they come, tells nothing of the times."""
    loss = distillation.InductiveMomentMatching(particles=4)
    student = flow(processes.RectifiedFlow(), 1.0, 0.7)
    labels = jnp.arange(16) % 4
    x = labels[:, None] + jnp.arange(16)[:, None] / 100
    words = jnp.stack([labels // 2, labels % 2], 1)
    for cond in (labels, {"tokens": words, "image": x}):
        batch = {"x": x, "cond": cond}
        groups = jax.jit(loss.groups)(student, KEY, batch)
        told = groups.cond if cond is labels else groups.cond["tokens"]
        assert jnp.all(told == told[:, :1])
        if cond is not labels:  # whatever comes with an example goes with it
            assert jnp.all(
                jnp.round(groups.cond["image"][..., 0]) == 2 * told[..., 0] + told[..., 1]
            )
    # The least of the four stratified times falls on each group about as often.
    least = [
        int(jnp.argmin(loss.groups(student, key, {"x": x, "cond": labels}).t))
        for key in jax.random.split(KEY, 40)
    ]
    assert set(least) == {0, 1, 2, 3}


def test_a_flow_learns_the_data(x64):
    """Which no teacher knows; the exact flow is where the student ends."""
    process = processes.RectifiedFlow(t_max=0.994)
    loss = distillation.InductiveMomentMatching(particles=8)
    players = {
        "student": Player(
            flow(process, 1.0, 1.0), loss, optax.adam(optax.cosine_decay_schedule(0.03, 500)),
            trainable=learned,
        )
    }  # fmt: skip
    state, step = init_train_state(players, KEY), make_train_step(players)
    for x in MEAN + STD * np.random.default_rng(0).standard_normal((500, 256, 1)):
        state, _ = step(state, {"x": x}, {})
    student = state.players["student"].model
    np.testing.assert_allclose([student.mean, student.std], [MEAN, STD], atol=0.04)
    exact = oracles.GaussianFlowMap(
        oracles.gaussian(process, jnp.full(1, MEAN), STD**2 * jnp.eye(1))
    )
    x, t, s = jnp.ones(1), jnp.asarray(0.9), jnp.asarray(0.1)
    np.testing.assert_allclose(student(x, t, s), exact(x, t, s), atol=0.04)


def test_wrong_arguments():
    process, batch = processes.RectifiedFlow(), {"x": jnp.zeros((6, 1))}
    with pytest.raises(ValueError, match="`particles` must divide the batch of 6, got 4"):
        distillation.InductiveMomentMatching()(flow(process), KEY, batch, {})
    with pytest.raises(TypeError, match="must be a map from one time to another"):
        teacher = oracles.gaussian(process, jnp.zeros(1), jnp.eye(1))
        distillation.InductiveMomentMatching()(teacher, KEY, batch, {})
    with pytest.raises(TypeError, match="`kernel` must be a Kernel"):
        distillation.InductiveMomentMatching(kernel=3.0)
    with pytest.raises(ValueError, match="`particles` must be at least 1"):
        distillation.InductiveMomentMatching(particles=0)
    with pytest.raises(ValueError, match="`bandwidth` must be above 0"):
        distillation.Laplace(0.0)
