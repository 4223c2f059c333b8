import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from students import DenoiserTable, Passes

import jaxdiff
from jaxdiff import distillation, guidance, losses, oracles, processes, solvers
from jaxdiff._tree import jit
from jaxdiff.denoiser import Denoiser
from jaxdiff.training import Player, init_train_state, make_train_step

KEY = jax.random.key(0)
STD = 0.5
COSINE = processes.Cosine(0.0, 0.0, 1.0)  # all of [0, 1]
CLASSES = oracles.gaussian_mixture(
    COSINE, jnp.asarray([[-1.0], [1.0]]), jnp.full((2, 1, 1), 0.25), labels=[0, 1]
)


def gaussian():
    return oracles.gaussian(COSINE, jnp.zeros(1), STD**2 * jnp.eye(1))


class At(losses.TimeLaw):
    """One time."""

    t: float = 0.6

    def quantile(self, process, u):
        return jnp.full_like(u, self.t)

    def density(self, process, t):
        return jnp.ones_like(t)


class Cubic(Denoiser):
    """A polynomial of the scale, for each class: at one x and one t."""

    weights: jax.Array

    @property
    def process(self):
        return COSINE

    def __call__(self, x, t, cond=None, *, key=None):
        powers = cond["scale"] ** jnp.arange(4)
        return x * 0 + self.weights[cond["label"]] @ powers


def test_the_student_is_linear_in_the_scale(x64):
    """A table of cubics, at one noisy example: what it learns is D_null + w (D_class - D_null)."""
    teacher = guidance.ClassifierFree(CLASSES, null_cond=2)
    x, t = 0.4, 0.6

    class Same(Passes):
        """As if every noisy example were the same."""

        def __call__(self, _, t, cond=None, *, key=None):
            return super().__call__(jnp.full(1, x), t, cond)

    loss = distillation.GuidedDistillation((0, 4), time_law=At(t))

    class SameGuided(Same):
        scale: float = 1.0

        def __call__(self, _, t, cond=None, *, key=None):
            self.count.number += 1
            return dataclasses.replace(self.base, scale=self.scale)(jnp.full(1, x), t, cond)

    student, guided = Cubic(jnp.zeros((2, 4))), SameGuided(teacher)
    batch = {"x": jnp.ones((64, 1)), "cond": jnp.arange(64) % 2}

    @eqx.filter_jit
    def newton(student, key):
        """Of a quadratic: one step is enough."""

        def value(w):
            return loss(Cubic(w.reshape(2, 4)), key, batch, {"teacher": guided})[0]

        w = student.weights.reshape(-1)
        step = jnp.linalg.solve(jax.hessian(value)(w), jax.grad(value)(w))
        return Cubic((w - step).reshape(2, 4)), value(w - step)

    student, left = newton(student, KEY)
    assert left < 1e-20
    given, none = (CLASSES(jnp.full(1, x), t, cond)[0] for cond in (0, None))
    np.testing.assert_allclose(student.weights[0], [none, given - none, 0, 0], atol=1e-8)


def test_passes_and_gradients(x64):
    teacher = guidance.ClassifierFree(CLASSES, null_cond=2)
    loss = distillation.GuidedDistillation((1, 4))
    batch = {"x": jnp.ones((8, 1)), "cond": jnp.arange(8) % 2}
    student, counted = Passes(Cubic(jnp.zeros((2, 4)))), Passes(CLASSES)

    @eqx.filter_jit
    @eqx.filter_grad
    def slopes(pair):
        guided = dataclasses.replace(teacher, base=pair[1])
        return loss(pair[0], KEY, batch, {"teacher": guided})[0]

    grads = slopes((student, counted))
    assert (student.count.number, counted.count.number) == (1, 1)  # both branches, one batch
    assert np.all(grads[0].base.weights != 0)
    np.testing.assert_array_equal(grads[1].base.means, 0)


def test_both_stages(x64):
    """A student of scales learns guidance; one of half the steps learns from that as from it."""
    teacher = guidance.ClassifierFree(CLASSES, null_cond=2)
    batch = {"x": jnp.ones((8, 1)), "cond": jnp.arange(8) % 2}

    class Told(Denoiser):
        @property
        def process(self):
            return COSINE

        def __call__(self, x, t, cond=None, *, key=None):
            return dataclasses.replace(teacher, scale=cond["scale"])(x, t, cond["label"])

    first, second = (
        jit(loss)(Told(), KEY, batch, {"teacher": of})
        for loss, of in (
            (distillation.GuidedDistillation((0, 4)), teacher),
            (distillation.ProgressiveDistillation(8, scales=(0, 4)), Told()),
        )
    )
    assert first[0] < 1e-28 < second[0]


def samples(model, base, steps, count=200_000):
    times = jnp.arange(steps, -1, -1) / steps
    out = jaxdiff.sample(
        KEY, model, (1,), count, solver=solvers.DoubleJump(base), times=times, dtype=jnp.float32
    )
    np.testing.assert_array_equal(out.nfe[:1], steps)
    return out.x


@pytest.mark.parametrize(("steps", "variance"), [(4, 0.0755), (8, 0.1117), (16, 0.1592)])
def test_double_jumps_keep_the_variance_of_an_exact_map_alone(steps, variance):
    """Of the sheet; and of the teacher that was not distilled, whose jumps are too long."""
    exact = oracles.GaussianFlowMap(gaussian())
    # The standard error of a variance is v sqrt(2 / n), 0.0008 of 0.25.
    found = np.var(samples(exact, solvers.FlowMapSteps(), steps))
    np.testing.assert_allclose(found, 0.25, atol=3e-3)
    found = np.var(samples(gaussian(), solvers.DDIM(), steps))
    np.testing.assert_allclose(found, variance, atol=1.5e-3)


def test_a_student_of_both_grids_makes_double_jumps(x64):
    """Trained with `shifts=2`: its jumps from every time are two steps of the teacher."""
    steps, teacher = 4, gaussian()
    times = jnp.arange(1, steps + 1) / steps
    loss = distillation.ProgressiveDistillation(steps // 2, shifts=2)
    learned = lambda table: (table.slopes, table.offsets)
    players = {
        "student": Player(
            DenoiserTable.start(COSINE, times), loss, optax.sgd(0.3), trainable=learned
        )
    }
    state, step = init_train_state(players, KEY), make_train_step(players)
    batch = {"x": STD * jax.random.normal(KEY, (64, 1))}
    for _ in range(250):
        state, _ = step(state, batch, {"teacher": teacher})
    student = state.players["student"].model

    def gain(t, s):
        """Of one step of DDIM on this law."""
        a, k = (np.cos(np.pi / 2 * np.array([t, s])), np.sin(np.pi / 2 * np.array([t, s])))
        slope = a[0] * STD**2 / (a[0] ** 2 * STD**2 + k[0] ** 2)
        return a[1] * slope + k[1] * (1 - a[0] * slope) / k[0]

    variance = 1.0
    for i in range(steps, 0, -1):
        t, s = i / steps, max(i - 2, 0) / steps
        middle, up = (t + s) / 2, (i - 1) / steps
        jump = gain(t, middle) * gain(middle, s)
        x = distillation.Jump(student)(jnp.ones(1), jnp.asarray(t), jnp.asarray(s))
        np.testing.assert_allclose(x[0], jump, rtol=1e-6)
        ratio = np.cos(np.pi / 2 * up) / np.cos(np.pi / 2 * s)
        added = np.sin(np.pi / 2 * up) ** 2 - (ratio * np.sin(np.pi / 2 * s)) ** 2
        variance = (ratio * jump) ** 2 * variance + added
    np.testing.assert_allclose(np.var(samples(student, solvers.DDIM(), steps)), variance, atol=3e-3)
    as_map = samples(distillation.Jump(student), solvers.FlowMapSteps(), steps, 4)
    np.testing.assert_allclose(as_map, samples(student, solvers.DDIM(), steps, 4), rtol=1e-4)


def test_wrong_arguments():
    batch = {"x": jnp.ones((2, 1)), "cond": jnp.arange(2)}
    loss = distillation.GuidedDistillation((1, 4))
    with pytest.raises(ValueError, match="need a teacher with a `scale`, got GaussianMixture"):
        loss(CLASSES, KEY, batch, {"teacher": CLASSES})
    with pytest.raises(TypeError, match="`model` must be a denoiser"):
        loss(distillation.Jump(CLASSES), KEY, batch, {"teacher": CLASSES})
    with pytest.raises(ValueError, match="`scales` must be .least, most., got None"):
        distillation.GuidedDistillation()
    with pytest.raises(ValueError, match="`base` of DoubleJump must be deterministic"):
        solvers.DoubleJump(solvers.DDIM(1.0))
    with pytest.raises(ValueError, match="`base` of DoubleJump must be a solver of single steps"):
        solvers.DoubleJump(solvers.UniPC())
    with pytest.raises(TypeError, match="`base` of DoubleJump must be a solver of this library"):
        solvers.DoubleJump(None)
