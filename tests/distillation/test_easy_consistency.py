import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from students import Passes

from jaxdiff import distillation, losses, oracles, processes
from jaxdiff._tree import jit
from jaxdiff.denoiser import Denoiser
from jaxdiff.flow_map import FlowMap
from jaxdiff.training import Frozen

KEY = jax.random.key(0)
MEAN, STD = 0.3, 0.5
EDM = processes.EDM(0.05, 80.0)


class At(losses.TimeLaw):
    """One time."""

    t: float

    def quantile(self, process, u):
        return jnp.full_like(u, self.t)

    def density(self, process, t):
        return jnp.ones_like(t)


class Affine(FlowMap):
    """x -> slope x + offset at the nearest of some times, whatever the end."""

    times: jax.Array
    slopes: jax.Array
    offsets: jax.Array
    process: processes.EDM = EDM

    def __call__(self, x, t, s, cond=None, *, key=None):
        n = jnp.argmin(jnp.abs(self.times - t))
        return self.slopes[n] * x + self.offsets[n]


def constant(slope, offset=0.0):
    return Affine(jnp.ones(1), jnp.full(1, slope), jnp.full(1, offset))


def difference(a, b):
    return jnp.mean(a - b)


def test_the_levels_of_the_first_stage(x64):
    """Of the sheet: clean below log 7, for 81% of the draws; and a stage more each time."""
    loss = distillation.EasyConsistencyTuning(doubling=100)
    level = jnp.asarray([0.1, 1.0, 1.94, 1.95, 3.0, 40.0])
    n = 1 + 8 / (1 + np.exp(level))
    np.testing.assert_allclose(loss.level(level, 0), level * np.maximum(1 - n / 2, 0), rtol=1e-12)
    assert np.array_equal(loss.level(level, 99) > 0, [0, 0, 0, 1, 1, 1])
    for step, stage in ((100, 2), (199, 2), (200, 3), (1000, 11)):
        expected = level * np.maximum(1 - n / 2**stage, 0)
        np.testing.assert_allclose(loss.level(level, step), expected, rtol=1e-12)
    batch = {"x": jnp.ones((4096, 1))}
    model = dataclasses.replace(constant(0.0), process=processes.EDM())
    _, metrics = jit(loss)(model, KEY, batch, Frozen())
    np.testing.assert_allclose(metrics["denoising"], 0.81, atol=0.003)
    t = jnp.asarray([0.06, 3.0])
    r, length = loss.earlier(EDM, t, 200)
    np.testing.assert_array_equal(r[0], 0)  # below t_min: the clean example
    np.testing.assert_allclose(r[1], t[1] * (1 - n[4] / 8))
    np.testing.assert_allclose(length, t - r)


def test_without_stages_it_is_denoising(x64):
    """q = 1: the target is clean and the length the level, at every stage."""
    loss = distillation.EasyConsistencyTuning(
        distillation.PseudoHuber(0.0), At(3.0), q=1.0, doubling=1
    )
    batch = {"x": jnp.asarray([[1.0, 2.0], [-3.0, 0.5]])}
    norms = np.sqrt(np.mean((batch["x"] - 0.25) ** 2, axis=1))
    for step in (0, 7):
        value, metrics = jit(loss)(constant(0.0, 0.25), KEY, batch, Frozen(step=step))
        np.testing.assert_allclose(value, norms.mean() / 3.0, rtol=1e-12)
        assert metrics["denoising"] == 1
    # The denoiser's jump to 0 is itself, and of a squared distance the optimum.
    squared = distillation.EasyConsistencyTuning(distillation.Squared(), q=1.0)
    data = {"x": MEAN + STD * jax.random.normal(KEY, (4096, 1))}
    teacher = oracles.gaussian(EDM, jnp.full(1, MEAN), STD**2 * jnp.eye(1))

    class Scaled(Denoiser):
        base: Denoiser
        factor: jax.Array

        @property
        def process(self):
            return EDM

        def __call__(self, x, t, cond=None, *, key=None):
            return MEAN + self.factor * (self.base(x, t) - MEAN)

    @jit
    def value(factor):
        return squared(distillation.Jump(Scaled(teacher, factor)), KEY, data, Frozen())[0]

    at = [value(jnp.asarray(f)) for f in (0.9, 1.0, 1.1)]
    assert at[1] < at[0] and at[1] < at[2]


@pytest.mark.parametrize("t", [1.5, 6.0])
@pytest.mark.parametrize("step", [0, 2])
def test_the_fixed_point_of_a_stage(x64, t, step):
    """Long steps of DDIM on Gaussian data, down to the denoiser: the mean residual is 0."""
    loss = distillation.EasyConsistencyTuning(difference, At(t), doubling=1)
    levels = [t]
    while (r := float(loss.earlier(EDM, jnp.asarray(levels[-1]), step)[0])) > 0:
        levels.append(r)
    assert len(levels) == {(1.5, 0): 1, (6.0, 0): 3}.get((t, step), len(levels))
    slopes, slope = [], 1.0
    for n, level in reversed(list(enumerate(levels))):
        said = STD**2 / (STD**2 + level**2)
        r = levels[n + 1] if n + 1 < len(levels) else 0.0
        slope *= said + r / level * (1 - said)
        slopes.insert(0, slope)
    slopes = np.array(slopes)
    star = Affine(jnp.asarray(levels), jnp.asarray(slopes), jnp.asarray(MEAN * (1 - slopes)))

    @jit
    def residual(model, x0):
        return loss(model, KEY, {"x": jnp.full((1, 1), x0)}, Frozen(step=step))[0]

    # It is affine in example and noise; the identity tells the noise that the key draws, of which
    # it leaves t - r, or t and the example.
    length = t - (levels[1] if len(levels) > 1 else 0.0)
    eps = residual(constant(1.0), 0.0)
    goal = star.offsets[1] if len(levels) > 1 else 0.0
    without = (star.offsets[0] - goal) / length
    by_example = residual(star, 1.0) - residual(star, 0.0)
    by_noise = (residual(star, 0.0) - without) / eps
    np.testing.assert_allclose(by_example * MEAN + without, 0, atol=1e-12)
    np.testing.assert_allclose(by_example * STD**2 + by_noise * t, 0, atol=1e-12)


def test_any_process_by_its_noise_level(x64):
    """The same loss, of the same map of x / alpha at the level of t."""
    other = processes.VP()
    least = float(jnp.exp(-other.log_snr(jnp.asarray(other.t_min)) / 2))
    process = processes.EDM(least)
    teacher = oracles.gaussian(process, jnp.full(1, MEAN), STD**2 * jnp.eye(1))

    class Mapped(Denoiser):
        process: processes.GaussianProcess = other

        def __call__(self, x, t, cond=None, *, key=None):
            return teacher(x / other.alpha(t), jnp.exp(-other.log_snr(t) / 2))

    law = losses.LogNormal(1.0, 0.3)
    loss = distillation.EasyConsistencyTuning(time_law=law, doubling=1)
    batch = {"x": MEAN + STD * jax.random.normal(KEY, (64, 1))}
    found, expected = (
        jit(loss)(distillation.Jump(model), KEY, batch, Frozen()) for model in (Mapped(), teacher)
    )
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-8)
    assert 0 < expected[1]["denoising"] < 1


def test_the_exact_flow_map_is_the_limit_of_stages(x64):
    """Its mean residual given x_t over the length falls as the length, once a stage by half."""
    loss = distillation.EasyConsistencyTuning(doubling=1)
    t = 2.0

    def off(stage):
        """Of the slope; the target is one step of DDIM, and from there the map."""
        r = float(loss.earlier(EDM, jnp.asarray(t), stage)[0])
        said = STD**2 / (STD**2 + t**2)
        to_data = lambda level: STD / np.hypot(STD, level)
        return (to_data(t) - to_data(r) * (said + r / t * (1 - said))) / (t - r)

    found = np.array([off(n) for n in (9, 10, 11)])
    np.testing.assert_allclose(found[:-1] / found[1:], 2, rtol=0.02)


def test_passes_and_targets(x64):
    """Two of the student; where it is asked about nothing there is no NaN, nor in slopes."""
    student = Passes(oracles.gaussian(EDM, jnp.full(1, MEAN), STD**2 * jnp.eye(1)))
    loss = distillation.EasyConsistencyTuning()
    batch = {"x": jnp.ones((64, 1))}

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def run(student):
        return loss(distillation.Jump(student), KEY, batch, Frozen())[0]

    value, grads = run(student)
    assert student.count.number == 2 and np.isfinite(value)
    assert np.all(np.isfinite(grads.base.means)) and np.all(grads.base.means != 0)
    # A frozen target is another player.
    follower = distillation.EasyConsistencyTuning(target="follower")
    jump = distillation.Jump(student.base)
    same = jit(follower)(jump, KEY, batch, {"follower": jump})[0]
    np.testing.assert_allclose(same, value, rtol=1e-12)


def test_wrong_arguments():
    teacher = oracles.gaussian(EDM, jnp.zeros(1), jnp.eye(1))
    with pytest.raises(TypeError, match="must be a map from one time to another"):
        distillation.EasyConsistencyTuning()(teacher, KEY, {"x": jnp.ones((2, 1))}, {})
    with pytest.raises(ValueError, match="`q` must be at least 1"):
        distillation.EasyConsistencyTuning(q=0.5)
    with pytest.raises(ValueError, match="`doubling` must be above 0"):
        distillation.EasyConsistencyTuning(doubling=0)
