import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.scipy.stats import norm
from students import DenoiserTable, Passes

import jaxdiff
from jaxdiff import distillation, oracles, predictions, processes, solvers
from jaxdiff._tree import jit
from jaxdiff.denoiser import Denoiser
from jaxdiff.training import Player, init_train_state, make_train_step

KEY = jax.random.key(0)
STD = 0.5
FLOW = processes.RectifiedFlow()


def gaussian(process=FLOW):
    return oracles.gaussian(process, jnp.zeros(1), STD**2 * jnp.eye(1))


def mixture(process):
    return oracles.gaussian_mixture(
        process, jnp.asarray([[-1.0], [0.8]]), jnp.asarray([[[0.09]], [[0.16]]]),
        weights=jnp.asarray([0.4, 0.6]),
    )  # fmt: skip


class Lines(Denoiser):
    """The end of the line through x_t, of pairs on the line that do not cross."""

    process: processes.GaussianProcess
    x: jax.Array
    noise: jax.Array

    def __call__(self, x, t, cond=None, *, key=None):
        at = self.process.alpha(t) * self.x + self.process.sigma(t) * self.noise
        return jnp.interp(x, at, self.x)


@pytest.mark.parametrize("process", [FLOW, processes.EDM(), processes.Cosine()])
def test_in_one_dimension_one_round_makes_straight(x64, process):
    """Lines do not cross, so that their ends are the optimum, and one step is the whole flow."""
    teacher, steps = mixture(process), 100
    times = process.times(steps)
    pairs = distillation.reflow_pairs(
        KEY, teacher, (1,), 200, solver=solvers.EDMHeun(), times=times
    )
    order = jnp.argsort(pairs["noise"][:, 0])
    x, noise = pairs["x"][order, 0], pairs["noise"][order, 0]
    start = process.marginal(x, noise, times[0])
    assert np.all(np.diff(x) > 0) and np.all(np.diff(start) > 0)
    # The only monotone map of the prior to the data, to the accuracy of the solver.
    prior = norm.cdf(start, scale=process.sigma(times[0]))
    weights = jnp.asarray([0.4, 0.6])
    data = norm.cdf(x[:, None], jnp.asarray([-1.0, 0.8]), jnp.asarray([0.3, 0.4])) @ weights
    np.testing.assert_allclose(data, prior, atol=2e-2 if process.t_max > 1 else 4e-3)
    lines = Lines(process, x, noise)
    value, metrics = jit(distillation.ReflowLoss())(lines, KEY, pairs, {})
    assert value < 1e-12 and metrics["x0_mse"] < 1e-20
    assert jit(distillation.ReflowLoss())(teacher, KEY, pairs, {})[1]["x0_mse"] > 1e-3
    for n in (1, 3):
        grid = times[:: steps // n][: n + 1].at[-1].set(0)
        made = jaxdiff.denoise(KEY, lines, start[:, None], times=grid).x[:, 0]
        np.testing.assert_allclose(made, x, atol=1e-9)
    jump = distillation.Jump(lines)
    assert jit(distillation.PairRegression(start=float(times[0])))(jump, KEY, pairs, {})[0] < 1e-20


def test_pairs_are_those_of_the_sampler(x64):
    """Whatever the pieces; and the convex cost is below that of no coupling."""
    teacher = mixture(FLOW)
    make = lambda count, **options: distillation.reflow_pairs(
        KEY, teacher, (1,), count, times=20, **options
    )
    whole, rest = make(100), make(40, first_index=60)
    np.testing.assert_allclose(whole["noise"][60:], rest["noise"], rtol=1e-12)
    np.testing.assert_allclose(whole["x"][60:], rest["x"], rtol=1e-12)
    np.testing.assert_allclose(whole["x"], jaxdiff.sample(KEY, teacher, (1,), 100, times=20).x)
    assert set(whole) == {"x", "noise"}
    x, noise = whole["x"], whole["noise"]
    assert np.mean((x - noise) ** 2) < 0.5 * np.mean((x - np.roll(noise, 1)) ** 2)


class OneSlope(Denoiser):
    """The end of the line through x_t of x = slope noise."""

    slope: jax.Array

    @property
    def process(self):
        return FLOW

    def __call__(self, x, t, cond=None, *, key=None):
        return self.slope * x / (FLOW.alpha(t) * self.slope + FLOW.sigma(t))


def test_a_second_flow_of_a_gaussian_is_one_step(x64):
    """It learns the composed steps of the teacher, and its velocity does not change on the way."""
    steps, teacher = 5, gaussian()
    players = {
        "student": Player(
            OneSlope(jnp.asarray(1.0)), distillation.ReflowLoss(), optax.sgd(0.1),
            trainable=lambda model: model.slope,
        )
    }  # fmt: skip
    pairs = distillation.reflow_pairs(KEY, teacher, (1,), 64, times=steps)
    state, step = init_train_state(players, KEY), make_train_step(players)
    for _ in range(150):
        state, metrics = step(state, pairs)
    student = state.players["student"].model
    assert metrics["loss"] < 1e-20
    start = FLOW.marginal(pairs["x"], pairs["noise"], FLOW.t_max)
    one, many = (
        jaxdiff.denoise(KEY, model, start, times=count).x
        for model, count in ((student, 1), (teacher, steps))
    )
    np.testing.assert_allclose(one, many, rtol=1e-9)
    x, noise = pairs["x"][0], pairs["noise"][0]
    for t in map(jnp.asarray, (0.1, 0.5, 0.9)):
        velocity = student.predict(predictions.Velocity(), FLOW.marginal(x, noise, t), t)
        np.testing.assert_allclose(velocity, noise - x, rtol=1e-8)


def test_one_step_learns_the_pairs(x64):
    steps, teacher = 5, gaussian()
    model = distillation.Jump(DenoiserTable.start(FLOW, jnp.asarray([FLOW.t_max])))
    learned = lambda model: (model.base.slopes, model.base.offsets)
    loss = distillation.PairRegression()
    players = {"student": Player(model, loss, optax.sgd(0.3), trainable=learned)}
    pairs = distillation.reflow_pairs(KEY, teacher, (1,), 64, times=steps)
    state, step = init_train_state(players, KEY), make_train_step(players)
    for _ in range(150):
        state, metrics = step(state, pairs)
    assert metrics["loss"] < 1e-20
    start = jnp.asarray([[-1.0], [2.0]])
    student = state.players["student"].model
    one = jaxdiff.denoise(KEY, student, start, solver=solvers.FlowMapSteps(), times=1).x
    np.testing.assert_allclose(one, jaxdiff.denoise(KEY, teacher, start, times=steps).x, rtol=1e-9)


def test_pairs_of_data(x64):
    """Whose lines end where the inversion does, and whose noise is standard."""
    teacher = gaussian(processes.EDM())
    x = STD * jax.random.normal(KEY, (500, 1))
    cond = jnp.zeros(500, int)
    pairs = distillation.inverted_pairs(teacher, x, cond=cond, times=200, solver=solvers.EDMHeun())
    end = teacher.process.marginal(pairs["x"], pairs["noise"], teacher.process.t_max)
    exact = oracles.GaussianFlowMap(teacher)
    expected = jax.vmap(exact, (0, None, None))(x, teacher.process.t_min, teacher.process.t_max)
    np.testing.assert_allclose(end, expected, rtol=1e-3)
    np.testing.assert_allclose(np.std(pairs["noise"]), np.std(x) / STD, rtol=0.02)
    np.testing.assert_array_equal(pairs["cond"], cond)
    np.testing.assert_array_equal(pairs["x"], x)


def test_passes_and_conditions(x64):
    classes = oracles.gaussian_mixture(
        FLOW, jnp.asarray([[-1.0], [1.0]]), jnp.full((2, 1, 1), 0.25), labels=[0, 1]
    )
    cond = jnp.arange(8) % 2
    pairs = distillation.reflow_pairs(KEY, classes, (1,), 8, cond=cond, times=3)
    np.testing.assert_array_equal(pairs["cond"], cond)
    student = Passes(classes)
    eqx.filter_jit(distillation.ReflowLoss())(student, KEY, pairs, {})
    assert student.count.number == 1
    eqx.filter_jit(distillation.PairRegression())(distillation.Jump(student), KEY, pairs, {})
    assert student.count.number == 2


def test_wrong_arguments():
    teacher, batch = gaussian(), {"x": jnp.ones((2, 1))}
    for loss, model in (
        (distillation.ReflowLoss(), teacher),
        (distillation.PairRegression(), distillation.Jump(teacher)),
    ):
        with pytest.raises(ValueError, match="`batch` must have the noise .* got none.*reflow"):
            loss(model, KEY, batch, {})
        with pytest.raises(ValueError, match="`batch` must have the noise .* got .2, 2."):
            loss(model, KEY, {**batch, "noise": jnp.ones((2, 2))}, {})
    with pytest.raises(TypeError, match="`model` must be a denoiser"):
        distillation.ReflowLoss()(distillation.Jump(teacher), KEY, batch, {})
    with pytest.raises(TypeError, match="`model` must be a map from one time"):
        distillation.PairRegression()(teacher, KEY, batch, {})
    with pytest.raises(ValueError, match="`solver` must be deterministic to couple"):
        distillation.reflow_pairs(KEY, teacher, (1,), 2, solver=solvers.Ancestral())
