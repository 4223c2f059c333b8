import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from students import AffineTable, Passes, learned

import jaxdiff
from jaxdiff import distillation, finetuning, losses, networks, oracles, predictions, processes
from jaxdiff.denoiser import NetworkDenoiser
from jaxdiff.flow_map import FlowMap
from jaxdiff.training import Player, init_train_state, make_train_step

KEY = jax.random.key(0)
MEAN, STD, BLUR = 0.3, 0.5, 0.7
EDM = processes.EDM(0.02, 5.0)


def unconditional():
    return oracles.gaussian(EDM, jnp.full(1, MEAN), STD**2 * jnp.eye(1))


class Between(losses.TimeLaw):
    """Uniform between two times."""

    t: float
    s: float

    def quantile(self, process, u):
        return self.s + u * (self.t - self.s)

    def density(self, process, t):
        return jnp.ones_like(t)


class Planes(FlowMap):
    """slope x + gain c + offset at the nearest of some times."""

    times: jax.Array
    slopes: jax.Array
    gains: jax.Array
    offsets: jax.Array

    @property
    def process(self):
        return EDM

    def __call__(self, x, t, s, cond=None, *, key=None):
        n = jnp.argmin(jnp.abs(self.times - t))
        return self.slopes[n] * x + self.gains[n] * cond + self.offsets[n]


def difference(a, b):
    return jnp.mean(a - b)


def denoised(t):
    """E[x0 | x_t, c] of c = x0 + BLUR n: (slope, gain, offset)."""
    precisions = np.array([1 / t**2, 1 / BLUR**2, 1 / STD**2])
    slope, gain, prior = precisions / precisions.sum()
    return np.array([slope, gain, prior * MEAN])


def fixed_point(p, q, times):
    """The recursion of the docstring: rows of (slope, gain, offset), from the clean end."""
    rows = [np.array([1.0, 0.0, 0.0])]
    for s, t in zip(times[:-1], times[1:], strict=True):
        said = STD**2 / (STD**2 + t**2)
        step = said + s / t * (1 - said), (1 - s / t) * (1 - said) * MEAN
        slope, gain, offset = rows[-1]
        first = np.array([slope * step[0], gain, slope * step[1] + offset])
        rows.append((p * first + q * denoised(t)) / (p + q))
    return np.array(rows)


@pytest.mark.parametrize(("p", "q"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (2.0, 0.5)])
def test_the_fixed_point_of_both_terms(x64, p, q):
    """The expected gradient is 0, at every node: of one term alone, and of both."""
    times = np.array([EDM.t_min, 0.2, 0.8, 2.0])
    table = Planes(jnp.asarray(times), *map(jnp.asarray, fixed_point(p, q, times).T))

    @eqx.filter_jit
    def residual(model, x0, c, t, s):
        """p (f - f') + q (f - x0), by which the gradient of the squares is twice weighted."""
        loss = distillation.ConditionalDistillation(
            difference, Between(t, s), distillation.FixedSteps(1), consistency=p, data=q
        )
        batch = {"x": jnp.full((1, 1), x0), "cond": jnp.full((1, 1), c)}
        return loss(model, KEY, batch, {"teacher": unconditional()})[0]

    def noise(t, s):
        """What the key draws: the identity says x0 + t eps."""
        loss = distillation.ConditionalDistillation(
            difference, Between(t, s), distillation.FixedSteps(1), consistency=0.0
        )
        same = Planes(jnp.ones(1), jnp.ones(1), jnp.zeros(1), jnp.zeros(1))
        batch = {"x": jnp.zeros((1, 1)), "cond": jnp.zeros((1, 1))}
        return loss(same, KEY, batch, {"teacher": unconditional()})[0] / t

    for n in (1, 2, 3):
        s, t = times[n - 1 : n + 1]
        eps = noise(t, s)
        # By hand, at x0 = c = eps = 0: what is left are the constants.
        said = STD**2 / (STD**2 + t**2)
        offsets, slopes = table.offsets, table.slopes
        stepped = slopes[n - 1] * (1 - s / t) * (1 - said) * MEAN + offsets[n - 1]
        zero = p * (offsets[n] - stepped) + q * offsets[n]
        base = residual(table, 0.0, 0.0, t, s)
        by_example = residual(table, 1.0, 0.0, t, s) - base
        by_cond = residual(table, 0.0, 1.0, t, s) - base
        by_noise = (base - zero) / eps
        # c = x0 + BLUR n, x_t = x0 + t eps.
        mean = zero + (by_example + by_cond) * MEAN
        with_x = (by_example + by_cond) * STD**2 + by_noise * t
        with_c = by_example * STD**2 + by_cond * (STD**2 + BLUR**2)
        np.testing.assert_allclose([mean, with_x, with_c], 0, atol=1e-10)


def test_the_first_term_alone_learns_the_map_of_the_teacher(x64):
    """Its composed steps of DDIM, whatever the condition; the loss is then 0."""
    grid, steps = losses.Karras(), 4

    class Table(AffineTable):
        """With a gain of the condition."""

        gains: jax.Array

        def __call__(self, x, t, s, cond=None, *, key=None):
            n = jnp.argmin(jnp.abs(jnp.log(jax.lax.stop_gradient(self.times) / t)))
            return super().__call__(x, t, s) + jnp.where(n == 0, 0, self.gains[n - 1]) * cond

    plain = AffineTable.start(EDM, grid, steps)
    table = Table(plain.process, plain.times, plain.slopes, plain.offsets, jnp.ones(steps))
    loss = distillation.ConditionalDistillation(
        grid=grid, steps=distillation.FixedSteps(steps), data=0.0
    )
    players = {
        "student": Player(
            table, loss, optax.adam(optax.cosine_decay_schedule(0.1, 600)),
            trainable=lambda model: (*learned(model), model.gains),
        )
    }  # fmt: skip
    state, step = init_train_state(players, KEY), make_train_step(players)
    draws, teacher = jax.random.normal(KEY, (2, 64, 1)), unconditional()
    x = MEAN + STD * draws[0]
    batch = {"x": x, "cond": x + BLUR * draws[1]}
    for _ in range(600):
        state, metrics = step(state, batch, {"teacher": teacher})
    student = state.players["student"].model
    assert metrics["loss"] < 1e-5
    expected = fixed_point(1.0, 0.0, np.asarray(student.times))[1:]
    reach = np.hypot(STD, student.times[1:])
    np.testing.assert_allclose(student.slopes * reach, expected[:, 0] * reach, atol=5e-3)
    np.testing.assert_allclose(student.gains, 0, atol=5e-3)
    start = jnp.asarray([[-4.0], [3.0]])
    made = jaxdiff.denoise(KEY, unconditional(), start, times=student.times[::-1]).x
    np.testing.assert_allclose(made, start * expected[-1, 0] + expected[-1, 2], rtol=1e-9)


def test_passes_and_gradients(x64):
    """Two of the student, one of the teacher, which sees no condition."""
    loss = distillation.ConditionalDistillation()

    class Refusing(Passes):
        def __call__(self, x, t, cond=None, *, key=None):
            assert cond is None
            return super().__call__(x, t)

    class Hearing(Passes):
        def __call__(self, x, t, cond=None, *, key=None):
            return super().__call__(x, t) + cond

    student, teacher = Hearing(unconditional()), Refusing(unconditional())
    batch = {"x": jnp.ones((8, 1)), "cond": jnp.ones((8, 1))}

    @eqx.filter_jit
    @eqx.filter_grad
    def slopes(pair):
        return loss(distillation.Jump(pair[0]), KEY, batch, {"teacher": pair[1]})[0]

    grads = slopes((student, teacher))
    assert (student.count.number, teacher.count.number) == (2, 1)
    assert np.all(grads[0].base.means != 0)
    np.testing.assert_array_equal(grads[1].base.means, 0)


def test_an_adapter_learns_and_the_teacher_stays(x64):
    network = networks.MLP(1, hidden=8, num_blocks=1, rngs=nnx.Rngs(0))
    network.last.kernel[...] = jnp.ones_like(network.last.kernel[...])
    teacher = NetworkDenoiser(network, processes.Cosine(), predictions.V())
    adapter = finetuning.make_adapter(network, KEY, rank=2)
    adapted = finetuning.AdaptedNetwork(network, (adapter,))
    student = distillation.Jump(dataclasses.replace(teacher, network=adapted))
    loss = distillation.ConditionalDistillation()
    players = {
        "student": Player(
            student, loss, optax.sgd(0.1),
            trainable=finetuning.adapter_weights,
        )
    }  # fmt: skip
    state, step = init_train_state(players, KEY), make_train_step(players)
    for _ in range(2):
        state, _ = step(state, {"x": jnp.ones((8, 1))}, {"teacher": teacher})
    after = state.players["student"].model.base.network
    for old, new in zip(
        jax.tree.leaves(eqx.filter(network, eqx.is_array)),
        jax.tree.leaves(eqx.filter(after.network, eqx.is_array)),
        strict=True,
    ):
        np.testing.assert_array_equal(old, new)
    assert all(np.any(low.up != 0) for low in after.adapters[0].kernels.values())


def test_wrong_arguments():
    loss, batch = distillation.ConditionalDistillation(), {"x": jnp.ones((2, 1))}
    with pytest.raises(TypeError, match="must be a map from one time to another"):
        loss(unconditional(), KEY, batch, {"teacher": unconditional()})
    with pytest.raises(ValueError, match="`frozen` must have a denoiser 'teacher'"):
        loss(distillation.Jump(unconditional()), KEY, batch, {})
    with pytest.raises(ValueError, match="`data` must be at least 0"):
        distillation.ConditionalDistillation(data=-1)
