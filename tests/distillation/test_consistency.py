import dataclasses

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import with_random_weights
from flax import nnx
from students import AffineTable, learned

from jaxdiff import (
    distillation,
    guidance,
    losses,
    networks,
    oracles,
    predictions,
    processes,
    solvers,
)
from jaxdiff._tree import jit
from jaxdiff.denoiser import NetworkDenoiser
from jaxdiff.training import Frozen, Player, init_train_state, make_train_step

KEY = jax.random.key(0)
MEAN, STD = 0.3, 0.5


def gaussian(process):
    return oracles.gaussian(process, jnp.full(1, MEAN), STD**2 * jnp.eye(1))


class Difference(eqx.Module):
    """The mean difference, of either sign, or its square."""

    power: int = eqx.field(static=True)

    def __call__(self, a, b):
        return jnp.mean((a - b) ** self.power)


class At(losses.TimeLaw):
    """The cell above one time."""

    t: jax.Array

    def quantile(self, process, u):
        return jnp.full_like(u, self.t)

    def density(self, process, t):
        return jnp.ones_like(t)

    def level(self, process, t):
        return jnp.where(t < self.t, 0.0, 1.0)


@pytest.mark.parametrize(
    ("solver", "order"), [(solvers.DDIM(), 2), (solvers.EDMHeun(), 3), (None, 2)]
)
def test_the_exact_flow_map_misses_by_a_local_error(x64, solver, order):
    """At t near 1.5 of Gaussian data; of training, its mean over data and noise given x_t."""
    process = processes.EDM(0.002, 3.002)  # 1.502 is on every grid
    exact, grid = oracles.GaussianFlowMap(gaussian(process)), losses.Karras(1.0)
    frozen = {"teacher": gaussian(process)}

    @jit
    def off(steps):
        settings = {
            "distance": Difference(1), "grid": grid, "steps": distillation.FixedSteps(steps),
            "time_law": At(jnp.asarray(1.5019)), "inverse_step": False,
        }  # fmt: skip
        if solver is not None:
            loss = distillation.ConsistencyDistillation(solver=solver, **settings)
            return loss(exact, KEY, {"x": jnp.ones((1, 1))}, frozen)[0]
        # Gauss-Hermite over x0 given x_t = 1, of which the loss is a function.
        loss = distillation.ConsistencyTraining(**settings)
        t, s = distillation.cell(grid, settings["time_law"], process, jnp.zeros(()), steps)
        gain = STD**2 / (STD**2 + t**2)
        mean, std = MEAN + gain * (1.0 - MEAN), STD * jnp.sqrt(1 - gain)
        nodes, weights = np.polynomial.hermite_e.hermegauss(20)
        x0 = mean + std * nodes[:, None]
        pairs = loss.pairs(exact, KEY, {"x": x0}, 0)
        eps = (1.0 - x0) / t
        pairs = dataclasses.replace(pairs, eps=eps)
        x_s = loss.earlier(exact, KEY, pairs, frozen)
        to_data = jax.vmap(lambda x, t: exact(x, t, process.t_min), in_axes=(0, None))
        differences = to_data(jnp.ones((1, 1)), t) - to_data(x_s, s)
        return weights @ differences[:, 0] / weights.sum()

    steps = np.array([400.0, 800.0, 1600.0])
    found = np.abs([off(n) for n in steps])
    slopes = np.log2(found[:-1] / found[1:])
    np.testing.assert_allclose(slopes, order, atol=0.05)


def test_training_at_the_exact_flow_map_leaves_the_noise_of_an_example(x64):
    """Its mean square falls as that of a step, and not faster."""
    process = processes.EDM(0.002, 3.002)
    exact = oracles.GaussianFlowMap(gaussian(process))
    x0 = MEAN + STD * jax.random.normal(KEY, (4000, 1))

    @jit
    def size(steps):
        loss = distillation.ConsistencyTraining(
            Difference(2), losses.Karras(1.0), distillation.FixedSteps(steps),
            At(jnp.asarray(1.5019)), inverse_step=False,
        )  # fmt: skip
        return loss(exact, KEY, {"x": x0}, {})[0] ** 0.5

    found = [size(n) for n in (400.0, 800.0, 1600.0)]
    np.testing.assert_allclose(np.log2([found[0] / found[1], found[1] / found[2]]), 1, atol=0.05)


@pytest.mark.parametrize("solver", [solvers.DDIM(), solvers.EDMHeun()])
def test_a_table_learns_the_composed_steps_of_the_teacher(x64, solver):
    """And not the exact flow map; the loss is then 0."""
    process, grid, steps = processes.EDM(0.02, 5.0), losses.Karras(), 6
    teacher = gaussian(process)
    loss = distillation.ConsistencyDistillation(
        grid=grid, steps=distillation.FixedSteps(steps), solver=solver
    )
    players = {
        "student": Player(
            AffineTable.start(process, grid, steps), loss,
            optax.adam(optax.cosine_decay_schedule(0.05, 1200)), trainable=learned,
        )
    }  # fmt: skip
    state, step = init_train_state(players, KEY), make_train_step(players)
    for n in range(1200):
        x = MEAN + STD * jax.random.normal(jax.random.fold_in(KEY, n), (64, 1))
        state, metrics = step(state, {"x": x}, {"teacher": teacher})
    student = state.players["student"].model
    composed, start = [], jnp.stack([jnp.zeros(1), jnp.ones(1)])
    for n in range(1, steps + 1):
        x = start
        for t, s in zip(student.times[n:0:-1], student.times[n - 1 :: -1], strict=False):
            pairs = distillation.Pairs(
                x, x, x, jnp.full(2, t), jnp.full(2, s), None, None, jax.random.split(KEY, 2)
            )
            x = distillation.teacher_step(teacher, KEY, pairs, solver)
        composed.append([x[1, 0] - x[0, 0], x[0, 0]])
    composed = np.array(composed)
    # Over what the noised data at each time reach.
    reach = np.hypot(STD, student.times[1:])
    np.testing.assert_allclose(student.slopes * reach, composed[:, 0] * reach, atol=2e-3)
    np.testing.assert_allclose(student.offsets, composed[:, 1], atol=2e-3)
    assert metrics["loss"] < 1e-6
    exact = np.sqrt((STD**2 + process.t_min**2) / (STD**2 + student.times[-1] ** 2))
    assert abs(composed[-1, 0] / exact - 1) > 0.05


def test_latent_consistency_learns_a_map_for_every_scale(x64):
    """Gaussian classes: the guided field is affine, and a step of it is what the pair has."""
    process = processes.EDM()
    classes = oracles.gaussian_mixture(
        process, jnp.asarray([[-1.0], [1.0]]), jnp.asarray([[[0.25]], [[0.25]]]), labels=[0, 1]
    )
    teacher = guidance.ClassifierFree(classes, null_cond=2)
    loss = distillation.ConsistencyDistillation(scales=(1, 8), steps=distillation.FixedSteps(50))
    cond = jnp.asarray([0, 1, 1, 0])
    pairs = loss.pairs(distillation.Jump(classes), KEY, {"x": jnp.ones((4, 1)), "cond": cond}, 0)
    x_s = distillation.teacher_step(teacher, KEY, pairs, solvers.DDIM())
    assert np.all((pairs.scale > 1) & (pairs.scale < 8)) and len(set(pairs.scale.tolist())) == 4
    for i in range(4):
        x, t, s = pairs.x[i], pairs.t[i], pairs.s[i]
        given, none = classes(x, t, cond[i]), classes(x, t, None)
        x0 = none + pairs.scale[i] * (given - none)
        np.testing.assert_allclose(x_s[i], x + (s - t) * (x - x0) / t, rtol=1e-9)
    told = pairs.told
    np.testing.assert_array_equal(told["scale"], pairs.scale)
    np.testing.assert_array_equal(told["label"], cond)


def test_fine_tuning_forgets_the_scale(x64):
    """The pair has no guidance: at the same weights every scale has the same target."""
    process = processes.Cosine()
    network = networks.MLP(
        1, hidden=8, num_blocks=1, num_classes=2, scalars=("scale",), rngs=nnx.Rngs(0)
    )
    student = distillation.Jump(NetworkDenoiser(network, process, predictions.V()))
    loss = distillation.ConsistencyTraining(
        distillation.Squared(), steps=distillation.FixedSteps(50), scales=(1, 8), inverse_step=False
    )
    batch = {"x": jnp.ones((4, 1)), "cond": jnp.asarray([0, 1, 1, 0])}
    value, metrics = loss(student, KEY, batch, {})
    assert np.isfinite(value) and metrics["steps"] == 50
    # A student that does not hear the scale, as at the start, has the same loss without it.
    deaf = eqx.tree_at(
        lambda m: m.base.network,
        student,
        lambda x, t, cond, key: network(x, t, {**cond, "scale": 1.0}, key=key),
    )
    np.testing.assert_allclose(loss(deaf, KEY, batch, {})[0], value, rtol=1e-12)


def test_neighbours_of_a_grid_share_noise_and_dropout():
    process = processes.EDM()
    options = {"hidden": 8, "num_blocks": 1, "dropout": 0.5}
    network = with_random_weights(lambda: networks.MLP(2, **options, rngs=nnx.Rngs(0)))
    student = distillation.Jump(NetworkDenoiser(network, process, predictions.F()))
    loss = distillation.ConsistencyTraining(
        distillation.Squared(), steps=distillation.FixedSteps(1e6), inverse_step=False,
        time_law=losses.LogNormal(0.0, 0.5),
    )  # fmt: skip
    # A millionth of the range apart: the same but for other noise, or other masks of dropout.
    assert loss(student, KEY, {"x": jnp.ones((8, 2))}, {})[0] < 1e-6
    pairs = loss.pairs(student, KEY, {"x": jnp.ones((8, 2))}, 0)
    one = lambda x, t, key: student(x, t, process.t_min, key=key)
    masked, others = (
        jax.vmap(one)(pairs.x, pairs.t, keys)
        for keys in (pairs.keys, jax.random.split(jax.random.key(9), 8))
    )
    assert np.mean((masked - others) ** 2) > 1e-3


@pytest.mark.parametrize("steps", [1, 7, 18])
def test_cells_are_the_grids_own_and_as_likely_as_the_law_says(x64, steps):
    process, grid = processes.EDM(), losses.Karras()
    times = np.asarray(grid.quantile(process, jnp.linspace(0, 1, steps + 1)))
    u = (jnp.arange(20000) + 0.5) / 20000
    law = losses.LogNormal(-1.1, 2.0)
    for given in (None, law):
        t, s = distillation.cell(grid, given, process, u, jnp.asarray(float(steps)))
        n = np.array([np.argmin(np.abs(np.log(times[1:] / v))) for v in np.asarray(t)[::97]])
        np.testing.assert_allclose(t[::97], times[1:][n], rtol=1e-9)
        np.testing.assert_allclose(s[::97], times[n], rtol=1e-9)
        share = np.array([np.mean(np.isclose(t, level)) for level in times[1:]])
        level = np.asarray(law.level(process, jnp.asarray(times)))
        expected = np.diff(level) / (level[-1] - level[0]) if given else np.full(steps, 1 / steps)
        np.testing.assert_allclose(share, expected, atol=2e-4)


def test_curricula():
    """Of the sheets: N(k) of the first paper, and doubling from 10 to 1280 in eight parts."""
    root = distillation.RootSteps(1000, 2, 150)
    k = np.array([0, 500, 1000])
    expected = np.ceil(np.sqrt(k / 1000 * (151**2 - 4) + 4) - 1)
    np.testing.assert_array_equal([root(n) for n in k], expected)
    doubling = distillation.DoublingSteps(800, 10, 1280)
    found = [float(doubling(n)) for n in (0, 99, 100, 350, 700, 799, 5000)]
    assert found == [10, 10, 20, 80, 1280, 1280, 1280]
    halving = distillation.HalvingSteps(8, 1, 100)
    found = [float(halving(n)) for n in (0, 99, 100, 250, 399, 5000)]
    assert found == [8, 8, 4, 2, 1, 1]
    ema = distillation.CurriculumEMA(root, 0.9, 2)
    for n in (1, 501):
        steps = float(root(n - 1))
        np.testing.assert_allclose(1 - ema.rates(n)[0], np.exp(2 * np.log(0.9) / steps), rtol=1e-6)


def test_pseudo_huber_is_square_near_and_linear_far(x64):
    a, b = jnp.asarray([3.0, 4.0]), jnp.zeros(2)
    rms = np.sqrt(12.5)
    np.testing.assert_allclose(distillation.PseudoHuber(1e4)(a, b), 12.5 / 2e4, rtol=1e-6)
    np.testing.assert_allclose(distillation.PseudoHuber(0)(a, b), rms, rtol=1e-12)
    np.testing.assert_allclose(
        np.sqrt(2) * distillation.PseudoHuber(0.1)(a, b),
        np.sqrt(25 + 2 * 0.01) - 0.1 * np.sqrt(2), rtol=1e-12,
    )  # fmt: skip
    chex.assert_tree_all_finite(jax.grad(distillation.PseudoHuber(0))(a, a))


def test_wrong_students_and_teachers():
    process = processes.EDM()
    teacher, batch = gaussian(process), {"x": jnp.ones((2, 1))}
    loss, student = distillation.ConsistencyDistillation(), distillation.Jump(teacher)
    with pytest.raises(TypeError, match="must be a map from one time to another.*Jump"):
        loss(teacher, KEY, batch, {"teacher": teacher})
    with pytest.raises(ValueError, match="`frozen` must have a denoiser 'teacher'"):
        loss(student, KEY, batch, {})
    with pytest.raises(ValueError, match="`teacher` must be of the process .* EDM.*got VP"):
        loss(student, KEY, batch, {"teacher": gaussian(processes.VP())})
    with pytest.raises(ValueError, match="need a teacher with a `scale`, got GaussianMixture"):
        guided = distillation.ConsistencyDistillation(scales=(1, 3))
        guided(student, KEY, batch, {"teacher": teacher})
    with pytest.raises(ValueError, match="`target` must be None, another player, or the own"):
        distillation.ConsistencyDistillation(target="me")(
            student, KEY, batch, Frozen({"teacher": teacher})
        )
    for scales in (3.0, (3.0, 1.0), (1.0, 2.0, 3.0)):
        with pytest.raises(ValueError, match="`scales` must be"):
            distillation.ConsistencyDistillation(scales=scales)
