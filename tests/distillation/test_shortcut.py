import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from students import GaussianJump, TwoTimesTable

import jaxdiff
from jaxdiff import distillation, losses, oracles, predictions, processes, solvers
from jaxdiff._tree import jit
from jaxdiff.denoiser import NetworkDenoiser
from jaxdiff.training import ConstantEMA, Player, init_train_state, make_train_step

KEY = jax.random.key(0)
MEAN, STD = 0.3, 0.5


def gaussian(process):
    return oracles.gaussian(process, jnp.full(1, MEAN), STD**2 * jnp.eye(1))


def exact(process):
    return distillation.Jump(GaussianJump.of(process, MEAN, STD), until="until")


@pytest.mark.parametrize(
    "process", [processes.RectifiedFlow(), processes.Cosine(), processes.EDM()],
    ids=lambda p: type(p).__name__,
)  # fmt: skip
def test_two_halves_of_the_exact_flow_map_are_the_whole(x64, process):
    times = process.time(jnp.asarray([-3.0, -1.0, 1.0]))

    @jit
    def found(student):
        x = jnp.asarray([0.7])
        whole = distillation.mean_velocity(student, x, times[0], times[2])
        return distillation.Shortcut().goal(student, x, times), whole

    goal, whole = found(exact(process))
    np.testing.assert_allclose(goal, whole, rtol=1e-9)
    # Of a rectified flow's equal halves, it is the mean of the two.
    if isinstance(process, processes.RectifiedFlow):
        student, x, times = exact(process), jnp.asarray([0.7]), jnp.asarray([0.8, 0.5, 0.2])
        first = distillation.mean_velocity(student, x, times[0], times[1])
        second = distillation.mean_velocity(student, x - 0.3 * first, times[1], times[2])
        goal = distillation.Shortcut().goal(student, x, times)
        np.testing.assert_allclose(goal, (first + second) / 2, rtol=1e-12)


def test_a_table_learns_the_composed_steps_of_its_teacher(x64):
    """Over 1, 2, 4 and 8 cells, from every place they start at; then loss is 0."""
    process, grid, count = processes.RectifiedFlow(0.01, 0.99), losses.UniformTime(), 8
    loss = distillation.Shortcut(steps=count, one_in=2, teacher="teacher", target="student")
    student = distillation.Jump(TwoTimesTable.start(process, grid, count), until="until")
    rate, ema = optax.cosine_decay_schedule(0.1, 800), ConstantEMA(0.9)
    players = {"student": Player(student, loss, optax.adam(rate), ema=ema)}
    state, step = init_train_state(players, KEY), make_train_step(players)
    teacher = gaussian(process)
    for n in range(800):
        x = MEAN + STD * jax.random.normal(jax.random.fold_in(KEY, n), (96, 1))
        state, metrics = step(state, {"x": x}, {"teacher": teacher})
    assert metrics["loss"] < 1e-6 and metrics["bootstrap"] < 1e-6
    learned, x = state.players["student"].model, jnp.asarray([[-1.0], [0.5], [2.0]])
    times = student.base.times

    @jit
    def both(learned, teacher, ends):
        n, cells = ends
        jump = jax.vmap(lambda x: learned(x, times[n], times[n - cells]))(x)
        return jump

    for cells, place in [(1, 3), (2, 1), (4, 2), (8, 1)]:
        n = cells * place
        path = times[n - cells : n + 1][::-1]
        composed = jaxdiff.denoise(KEY, teacher, x, solver=solvers.DDIM(), times=path).x
        np.testing.assert_allclose(both(learned, teacher, (n, cells)), composed, atol=3e-3)
    whole = jax.vmap(lambda x: oracles.gaussian_flow_map(teacher, x, times[8], times[0]))(x)
    assert np.abs(composed - whole).max() > 0.02


def test_lengths_and_places_are_those_of_halved_grids(x64):
    """Every example starts at a multiple of its length, told where it ends."""
    process, seen = processes.RectifiedFlow(), []

    class Told(jaxdiff.Denoiser):
        process: processes.RectifiedFlow

        def __call__(self, x, t, cond=None, *, key=None):
            jax.debug.callback(lambda t, s: seen.append((float(t), float(s))), t, cond["until"])
            return x

    student = distillation.Jump(Told(process), until="until")
    loss = distillation.Shortcut(steps=16, one_in=2)
    jit(loss)(student, KEY, {"x": jnp.ones((64, 1))}, {})
    jax.effects_barrier()
    cells = (np.asarray(seen) - process.t_min) / (process.t_max - process.t_min) * 16
    start, length = cells[:, 0], cells[:, 0] - cells[:, 1]
    np.testing.assert_allclose(start / length, np.rint(start / length), atol=1e-4)
    lengths, counts = np.unique(np.rint(length), return_counts=True)
    # 32 over one cell; of 32 others 8 of each length, and their two halves.
    assert dict(zip(lengths, counts, strict=True)) == {1: 32 + 16, 2: 24, 4: 24, 8: 24, 16: 8}


def test_guidance_is_of_single_cells(x64):
    """Two guided steps of DDIM, and the condition's own jumps over anything longer."""
    process = processes.RectifiedFlow()
    classes = oracles.gaussian_mixture(
        process, jnp.asarray([[-1.0], [1.0]]), jnp.full((2, 1, 1), 0.25), labels=[0, 1]
    )
    student = distillation.Jump(_Deaf(classes), until="until")
    loss = distillation.Shortcut(null_cond=2, scale=3.0)
    x, label, times = jnp.asarray([0.7]), jnp.asarray(1), jnp.asarray([0.8, 0.6, 0.4])
    for single in (True, False):
        goal, here = loss.goal(student, x, times, label, single=single), x
        for t, s in zip(times, times[1:], strict=False):
            given, none = classes(here, t, label), classes(here, t, jnp.asarray(2))
            x0 = none + 3.0 * (given - none) if single else given
            here = here + (s - t) * (here - x0) / t
        np.testing.assert_allclose(goal, (x - here) / 0.4, rtol=1e-9)


class _Deaf(jaxdiff.Denoiser):
    """A denoiser that does not hear where to."""

    base: oracles.GaussianMixture

    @property
    def process(self):
        return self.base.process

    def __call__(self, x, t, cond=None, *, key=None):
        return self.base(x, t, cond["label"])


def test_passes_and_gradients(x64):
    process, sizes = processes.RectifiedFlow(), []

    class Counted(eqx.Module):
        weight: jax.Array
        name: str = eqx.field(static=True)

        def __call__(self, x, t, cond, *, key=None):
            jax.debug.callback(lambda *_: sizes.append(self.name), x, *jax.tree.leaves(cond))
            return self.weight * x

    def network(name):
        made = Counted(jnp.asarray(0.3), name)
        return NetworkDenoiser(made, process, predictions.Velocity())

    batch = {"x": jnp.ones((8, 1)), "cond": jnp.zeros(8, int)}
    for options, evaluations in [
        ({}, {"student": 8 + 2 * 2}),
        ({"null_cond": 2}, {"student": 8 + 2 * 4}),
        ({"teacher": "teacher"}, {"student": 8 + 2 * 2, "teacher": 6}),
    ]:
        loss = distillation.Shortcut(**options)

        def value(pair, loss=loss):
            return loss(distillation.Jump(pair[0], "until"), KEY, batch, {"teacher": pair[1]})[0]

        slopes = eqx.filter_jit(eqx.filter_grad(value))((network("student"), network("teacher")))
        jax.effects_barrier()
        assert {name: sizes.count(name) for name in set(sizes)} == evaluations
        assert slopes[0].network.weight != 0 and slopes[1].network.weight == 0
        sizes.clear()


def test_wrong_arguments():
    process, batch = processes.RectifiedFlow(), {"x": jnp.ones((2, 1))}
    for steps in (1, 12):
        with pytest.raises(
            ValueError, match=f"`steps` must be a power of 2, 2 or more, got {steps}"
        ):
            distillation.Shortcut(steps=steps)
    with pytest.raises(ValueError, match="one in 4, got 2 examples"):
        distillation.Shortcut()(exact(process), KEY, batch, {})
    with pytest.raises(ValueError, match="must be told where it jumps to"):
        distillation.Shortcut()(distillation.Jump(gaussian(process)), KEY, batch, {})
    with pytest.raises(ValueError, match="`null_cond` is of guidance without a teacher"):
        distillation.Shortcut(null_cond=2, teacher="teacher")
    with pytest.raises(ValueError, match="`frozen` must have a denoiser 'teacher'"):
        distillation.Shortcut(teacher="teacher", one_in=1)(exact(process), KEY, batch, {})
