import diffrax
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
COSINE = processes.Cosine(0.0, 0.02, 1.0)  # alpha is 0 at its end


def gaussian(process=COSINE, mean=0.0):
    return oracles.gaussian(process, jnp.full(1, mean), STD**2 * jnp.eye(1))


class Between(losses.TimeLaw):
    """Uniform between two times."""

    t: jax.Array
    s: jax.Array

    def quantile(self, process, u):
        return self.s + u * (self.t - self.s)

    def density(self, process, t):
        return 1 / (self.t - self.s) * jnp.ones_like(t)


class Linear(Denoiser):
    """factor g* of Gaussian data of mean 0, the exact signal."""

    factor: float = 1.0

    @property
    def process(self):
        return COSINE

    def __call__(self, x, t, cond=None, *, key=None):
        alpha, sigma = COSINE.alpha(t), COSINE.sigma(t)
        reach = jnp.sqrt(alpha**2 * STD**2 + sigma**2)
        exact = jnp.where(alpha > 1e-12, (reach - sigma) / jnp.where(alpha > 1e-12, alpha, 1), 0)
        return self.factor * exact * x


def test_the_exact_signal_misses_by_a_local_error(x64):
    """Of the sheet, at t = 0.6 and steps in log(sigma / alpha)."""

    @jit
    def off(length):
        t = jnp.asarray(0.6)
        s = COSINE.time(COSINE.log_snr(t) + 2 * length)
        loss = distillation.BOOT(Between(t, s), distillation.FixedSteps(1))
        batch, frozen = {"x": jnp.ones((64, 1))}, {"teacher": gaussian()}

        def bootstrap(factor):
            model = distillation.SignalMap(Linear(factor))
            return loss(model, KEY, batch, frozen)[1]["bootstrap"]

        # Without a signal the residual over 1 - k is what the teacher says, in mean square.
        alpha, sigma = COSINE.alpha(t), COSINE.sigma(t)
        said = alpha * STD**2 * sigma / (alpha**2 * STD**2 + sigma**2)
        noise = bootstrap(0.0) / said**2
        return jnp.sqrt(bootstrap(1.0) / noise) * (1 - jnp.exp(-length))

    found = np.array([off(n) for n in (0.4, 0.2, 0.1, 0.05)])
    np.testing.assert_allclose(found, [1.15e-2, 2.9e-3, 7.5e-4, 1.9e-4], rtol=0.02)
    fine = np.array([off(n) for n in (0.02, 0.01, 0.005)])
    np.testing.assert_allclose(np.log2(fine[:-1] / fine[1:]), 2, atol=0.05)


def test_a_table_learns_the_composed_steps_of_ddim(x64):
    """In one call, from noise alone; the loss is then 0."""
    steps, teacher = 4, gaussian(mean=0.3)
    times = jnp.linspace(COSINE.t_min, 1, steps + 1)
    loss = distillation.BOOT(steps=distillation.FixedSteps(steps))
    model = distillation.SignalMap(DenoiserTable.start(COSINE, times))
    learned = lambda model: (model.base.slopes, model.base.offsets)
    players = {"student": Player(model, loss, optax.sgd(0.15), trainable=learned)}
    state, step = init_train_state(players, KEY), make_train_step(players)
    batch = {"x": jnp.full((64, 1), jnp.nan)}  # of which the shape alone is used
    for _ in range(450):
        state, metrics = step(state, batch, {"teacher": teacher})
    assert metrics["loss"] < 1e-16
    student = state.players["student"].model
    start = jnp.asarray([[-1.0], [0.0], [2.0]])

    def run(model, solver, times):
        return jaxdiff.denoise(KEY, model, start, solver=solver, times=times)

    made = run(student, solvers.FlowMapSteps(), jnp.asarray([1.0, COSINE.t_min]))
    np.testing.assert_array_equal(made.nfe, 1)
    saveat = diffrax.SaveAt(steps=True)
    expected = jaxdiff.denoise(KEY, teacher, start, times=times[::-1], saveat=saveat).trajectory.x
    to_all = jax.vmap(student, (None, None, 0))
    found = jax.vmap(to_all, (0, None, None))(start, 1.0, times[-2::-1])
    np.testing.assert_allclose(found, expected, atol=1e-7)
    np.testing.assert_allclose(made.x, expected[:, -1], atol=1e-7)
    exact = jax.vmap(oracles.GaussianFlowMap(teacher), (0, None, None))(start, 1.0, COSINE.t_min)
    assert np.max(np.abs(exact - expected[:, -1])) > 0.03
    # At 0, below all times that were trained, it is the signal at t_min.
    at_zero = run(student, solvers.FlowMapSteps(), jnp.asarray([1.0, 0.0])).x
    np.testing.assert_allclose(at_zero, jax.vmap(student.signal, (0, None))(start, COSINE.t_min))


def test_passes_and_gradients(x64):
    """Two of the student and one of the teacher; a teacher that starts has no boundary loss."""
    process = processes.EDM()
    loss = distillation.BOOT(losses.Karras())
    student, teacher = Passes(gaussian(process)), Passes(gaussian(process, 1.0))

    @eqx.filter_jit
    def run(pair, frozen):
        model = distillation.SignalMap(pair[0])
        return loss(model, KEY, {"x": jnp.ones((8, 1))}, {"teacher": pair[frozen]})

    grads = eqx.filter_grad(lambda pair: run(pair, 1)[0])((student, teacher))
    assert (student.count.number, teacher.count.number) == (2, 1)
    np.testing.assert_array_equal(grads[1].base.means, 0)
    assert np.all(grads[0].base.means != 0)
    assert run((student, teacher), 0)[1]["boundary"] < 1e-24
    assert run((student, teacher), 1)[1]["boundary"] > 0.5


def test_a_told_student_of_a_guided_teacher(x64):
    """Told the same scales as the teacher is guided by."""
    classes = oracles.gaussian_mixture(
        COSINE, jnp.asarray([[-1.0], [1.0]]), jnp.full((2, 1, 1), 0.25), labels=[0, 1]
    )

    class Told(Denoiser):
        @property
        def process(self):
            return COSINE

        def __call__(self, x, t, cond=None, *, key=None):
            given, none = classes(x, t, cond["label"]), classes(x, t, None)
            return none + cond["scale"] * (given - none)

    model = distillation.SignalMap(Told())
    guided = guidance.ClassifierFree(classes, null_cond=2)
    loss = distillation.BOOT(scales=(1, 4))
    batch = {"x": jnp.ones((8, 1)), "cond": jnp.arange(8) % 2}
    value, metrics = jit(loss)(model, KEY, batch, {"teacher": guided})
    assert metrics["boundary"] < 1e-24
    np.testing.assert_allclose(jit(loss)(model, KEY, batch, {"teacher": Told()})[0], value)


def test_a_map_from_the_start_makes_one_step():
    model = distillation.SignalMap(gaussian())
    with pytest.raises(ValueError, match="`times` must be one step for SignalMap.*got 2"):
        jaxdiff.sample(KEY, model, (1,), 2, solver=solvers.FlowMapSteps(), times=2)


def test_wrong_arguments():
    batch, teacher = {"x": jnp.ones((2, 1))}, gaussian()
    loss = distillation.BOOT()
    for model in (teacher, distillation.Jump(teacher)):
        with pytest.raises(TypeError, match="`model` must be a map of starts.*SignalMap"):
            loss(model, KEY, batch, {"teacher": teacher})
    with pytest.raises(ValueError, match="`teacher` must be of the process .* Cosine.*got EDM"):
        loss(distillation.SignalMap(teacher), KEY, batch, {"teacher": gaussian(processes.EDM())})
    with pytest.raises(TypeError, match="`base` must be a denoiser"):
        distillation.SignalMap(distillation.Jump(teacher))
    with pytest.raises(ValueError, match="`boundary` must be above 0"):
        distillation.BOOT(boundary=0)
