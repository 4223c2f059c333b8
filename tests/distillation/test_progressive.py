import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from students import DenoiserTable, Passes, learned

import jaxdiff
from jaxdiff import distillation, guidance, losses, oracles, processes, solvers
from jaxdiff._tree import jit
from jaxdiff.denoiser import Denoiser
from jaxdiff.training import Player, init_train_state, make_train_step, next_phase
from jaxdiff.training import _step as training

KEY = jax.random.key(0)
STD = 0.5
COSINE = processes.Cosine(0.0, 0.0, 1.0)  # all of [0, 1]


def gaussian(process=COSINE, mean=0.0):
    return oracles.gaussian(process, jnp.full(1, mean), STD**2 * jnp.eye(1))


def ddim(denoiser, x, times):
    return jaxdiff.denoise(KEY, denoiser, x, solver=solvers.DDIM(), times=times).x


def test_a_target_whose_one_step_is_two(x64):
    """Of the sheet: cosine, four steps, t = 3/4; and where the last time is 0."""
    teacher, x = gaussian(), jnp.ones(1)
    times = tuple(map(jnp.asarray, (0.75, 0.625, 0.5)))
    target = distillation.two_step_answer(teacher, x, times)
    np.testing.assert_allclose(target, 0.14105, atol=5e-6)
    np.testing.assert_allclose(teacher(x, times[0]), 0.10748, atol=5e-6)
    one = distillation.ddim_jump(COSINE, x, target, times[0], times[2])
    two = ddim(teacher, x[None], jnp.stack(times))[0]
    np.testing.assert_allclose(one, two, rtol=1e-14)
    np.testing.assert_allclose(one, 0.823794, atol=1e-6)
    last = tuple(map(jnp.asarray, (0.25, 0.125, 0.0)))
    target = distillation.two_step_answer(teacher, x, last)
    np.testing.assert_allclose(target, ddim(teacher, x[None], jnp.stack(last))[0], rtol=1e-14)


@pytest.mark.parametrize(
    ("process", "grid"),
    [(processes.EDM(0.01, 5.0), losses.Karras()), (processes.RectifiedFlow(), losses.LogNormal())],
)
def test_the_target_of_any_process(x64, process, grid):
    """Solved for, as the paper has it, on a mixture; at every step of the grid."""
    teacher = oracles.gaussian_mixture(
        process, jnp.asarray([[-1.0, 0.0], [1.0, 0.5]]), 0.04 * jnp.ones((2, 1, 1)) * jnp.eye(2)
    )
    loss = distillation.ProgressiveDistillation(4, grid)
    times, fine = loss.times(process), loss.times(process, 8)
    np.testing.assert_array_equal(times, fine[::2])
    assert times[-1] == 0
    x = jnp.asarray([0.3, -0.2])
    for n in range(4):
        t, middle, s = fine[2 * n : 2 * n + 3]
        end = ddim(teacher, x[None], fine[2 * n : 2 * n + 3])[0]
        ratio = process.sigma(s) / process.sigma(t)
        expected = (end - ratio * x) / (process.alpha(s) - ratio * process.alpha(t))
        found = distillation.two_step_answer(teacher, x, (t, middle, s))
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_of_many_steps_the_teacher_itself(x64):
    def off(steps):
        times = tuple(jnp.asarray(0.5 - n / 2 / steps) for n in range(3))
        x = jnp.ones(1)
        return abs(distillation.two_step_answer(gaussian(), x, times) - gaussian()(x, times[0]))[0]

    found = np.array([off(n) for n in (100, 200, 400)])
    np.testing.assert_allclose(np.log2(found[:-1] / found[1:]), 1, atol=0.05)


def test_three_rounds_end_in_the_map_of_the_first_grid(x64, count_programs):
    """Rounds share one program; the last student is one step, and makes eight of the teacher."""
    teacher = first = gaussian(mean=0.3)
    student = DenoiserTable.start(COSINE, jnp.arange(1, 5) / 4)
    optimizer = optax.sgd(0.2)
    batch = {"x": 0.3 + STD * jax.random.normal(KEY, (64, 1))}
    state = None
    for steps in distillation.rounds(4):
        loss = distillation.ProgressiveDistillation(steps)
        players = {"student": Player(student, loss, optimizer, trainable=learned)}
        if state is None:
            state = init_train_state(players, KEY)
        else:
            state = next_phase(state, players, fresh=("student",))
        step = make_train_step(players)
        for _ in range(300):
            state, metrics = step(state, batch, {"teacher": teacher})
        assert metrics["loss"] < 1e-16
        teacher = student = state.players["student"].model
    assert count_programs("_run") == 2  # of two kinds of teacher
    start = jnp.asarray([[-1.0], [0.0], [2.0]])
    made = ddim(student, start, loss.times(COSINE))
    expected = ddim(first, start, loss.times(COSINE, 8))
    np.testing.assert_allclose(made, expected, rtol=1e-7)
    exact = oracles.GaussianFlowMap(first)
    assert np.max(np.abs(made - jax.vmap(exact, (0, None, None))(start, 1.0, 0.0))) > 0.05


def test_all_rounds_are_one_run(x64):
    """The teacher is a player that takes the student's weights at the end of each round."""
    first, times = gaussian(mean=0.3), jnp.arange(1, 9) / 8
    ends = [jax.vmap(first, (None, 0))(jnp.full(1, x), times)[:, 0] for x in (0.0, 1.0)]
    table = DenoiserTable.start(COSINE, times)
    table = eqx.tree_at(learned, table, (ends[1] - ends[0], ends[0]))
    loss = distillation.ProgressiveDistillation(distillation.HalvingSteps(4, 1, 300))
    follow = training.Follow("student", part=lambda table: table)
    players = {
        "teacher": Player(
            table, follow, every=lambda step: (step > 0) & (step % 300 == 0),
            trainable=lambda table: table,
        ),
        "student": Player(table, loss, optax.sgd(0.2), trainable=learned),
    }  # fmt: skip
    state, step = init_train_state(players, KEY), make_train_step(players)
    batch = {"x": 0.3 + STD * jax.random.normal(KEY, (64, 1))}
    for _ in range(900):
        state, _ = step(state, batch)
    start = jnp.asarray([[-1.0], [0.0], [2.0]])
    made = ddim(state.players["student"].model, start, loss.times(COSINE, 1))
    np.testing.assert_allclose(made, ddim(first, start, loss.times(COSINE, 8)), rtol=1e-7)


@pytest.mark.parametrize(
    ("steps", "slope"), [(4, 0.3334), (16, 0.4539), (64, 0.4881), (256, 0.4970)]
)
def test_rounds_keep_the_error_of_the_first_grid(x64, steps, slope):
    times = distillation.ProgressiveDistillation(steps).times(COSINE)
    np.testing.assert_allclose(ddim(gaussian(), jnp.ones((1, 1)), times), slope, atol=5e-5)


@pytest.mark.parametrize("shifts", [1, 2, None])
def test_where_steps_start_and_end(x64, shifts):
    loss = distillation.ProgressiveDistillation(2, shifts=shifts)
    u = (jnp.arange(64) + 0.5) / 64
    starts, middles, ends = loss.cell(COSINE, u)
    expected = {1: [0.5, 1.0], 2: [0.25, 0.5, 0.75, 1.0]}
    halves = {1: [0.25, 0.75], 2: [0.125, 0.25, 0.5, 0.75]}
    if shifts is None:
        np.testing.assert_allclose(starts, 1 - u)
        np.testing.assert_allclose(ends, np.maximum(0.5 - u, 0))
    else:
        assert np.unique(starts).tolist() == expected[shifts]
        assert np.unique(middles).tolist() == halves[shifts]
        np.testing.assert_allclose(starts.mean(), np.mean(expected[shifts]))
    np.testing.assert_allclose(ends, np.maximum(starts - 0.5, 0))
    np.testing.assert_allclose(middles, (starts + ends) / 2)


def test_passes_and_gradients(x64):
    """One of the student, two of the teacher, to which no gradient goes."""
    loss = distillation.ProgressiveDistillation(2)
    student = Passes(DenoiserTable.start(COSINE, jnp.arange(1, 3) / 2))
    teacher = Passes(DenoiserTable.start(COSINE, jnp.arange(1, 5) / 4))
    batch = {"x": jnp.ones((8, 1))}

    @eqx.filter_jit
    @eqx.filter_grad
    def slopes(pair):
        return loss(pair[0], KEY, batch, {"teacher": pair[1]})[0]

    grads = slopes((student, teacher))
    assert (student.count.number, teacher.count.number) == (1, 2)
    np.testing.assert_array_equal(grads[1].base.slopes, 0)
    teacher = dataclasses.replace(teacher, base=gaussian())
    assert np.all(slopes((student, teacher))[0].base.slopes != 0)


def test_a_told_student_learns_a_guided_or_a_told_teacher(x64):
    """With `scales`: both teachers are the same law, and so is the target."""
    classes = oracles.gaussian_mixture(
        COSINE, jnp.asarray([[-1.0], [1.0]]), jnp.full((2, 1, 1), 0.25), labels=[0, 1]
    )
    guided = guidance.ClassifierFree(classes, null_cond=2)

    class Told(Denoiser):
        offset: float = 0.0

        @property
        def process(self):
            return COSINE

        def __call__(self, x, t, cond=None, *, key=None):
            given, none = classes(x, t, cond["label"]), classes(x, t, None)
            return none + cond["scale"] * (given - none) + self.offset

    loss = distillation.ProgressiveDistillation(4, losses.UniformTime(), scales=(1, 4))
    batch = {"x": jnp.ones((8, 1)), "cond": jnp.arange(8) % 2}
    values = [
        jit(loss)(Told(1.0), KEY, batch, {"teacher": teacher})[0] for teacher in (guided, Told())
    ]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-12)
    assert values[0] > 0.5


def test_rounds():
    assert distillation.rounds(8) == (8, 4, 2, 1)
    assert distillation.rounds(12, 3) == (12, 6, 3)
    for first, last in ((6, 1), (2, 4), (12, 5)):
        with pytest.raises(ValueError, match="`first` must be `last` = . times a power of 2"):
            distillation.rounds(first, last)


def test_wrong_arguments():
    teacher, batch = gaussian(), {"x": jnp.ones((2, 1))}
    loss = distillation.ProgressiveDistillation()
    with pytest.raises(TypeError, match="`model` must be a denoiser.*Jump"):
        loss(distillation.Jump(teacher), KEY, batch, {"teacher": teacher})
    with pytest.raises(ValueError, match="`frozen` must have a denoiser 'teacher'"):
        loss(teacher, KEY, batch, {})
    with pytest.raises(ValueError, match="`steps` must be at least 1"):
        distillation.ProgressiveDistillation(0.5)
    with pytest.raises(ValueError, match="`shifts` must be at least 1"):
        distillation.ProgressiveDistillation(shifts=0)
