import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generators import Affine, Posterior, counted, law

from jaxdiff import distillation, oracles, processes
from jaxdiff._tree import jit
from jaxdiff.distillation._generated import noise_and_times
from jaxdiff.flow_map import FlowMap
from jaxdiff.processes import GaussianProcess

KEY = jax.random.key(0)
MEAN, STD = 0.3, 0.5


class Particles(FlowMap):
    """The particle whose number is the condition."""

    process: GaussianProcess
    x: jax.Array

    def __call__(self, x, t, s, cond=None, *, key=None):
        return self.x[cond]


class Blind(Posterior):
    """A teacher without conditions."""

    def __call__(self, x, t, cond=None, *, key=None):
        return super().__call__(x, t)


def gradient(loss, process, x, teacher):
    """By the particles, each times their number: a batch is a mean."""
    batch = {"x": jnp.zeros_like(x), "cond": jnp.arange(len(x))}

    @jit
    def run(model):
        return jax.grad(lambda model: loss(model, KEY, batch, {"teacher": teacher})[0])(model)

    return len(x) * run(Particles(process, x)).x


def test_without_repulsion_it_is_sds_bit_for_bit():
    process = processes.Cosine()
    teacher = Blind(process, jnp.full(1, MEAN), jnp.full(1, STD))
    x = jax.random.normal(KEY, (5, 3))
    sds = gradient(distillation.SDS(), process, x, teacher)
    np.testing.assert_array_equal(gradient(distillation.Repulsive(0.0), process, x, teacher), sds)
    assert np.any(gradient(distillation.Repulsive(0.1), process, x, teacher) != sds)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_the_repulsion_by_hand(x64, count):
    """Two particles too: there the kernel is one of log 2, and of log 1 it would be nothing."""
    f = jax.random.normal(KEY, (count, 2))
    repulsion = jit(distillation.Repulsive().repulsion)
    found = repulsion(f)
    distances = np.sum((f[:, None] - f[None]) ** 2, axis=-1)
    h = np.median(distances[np.triu_indices(count, 1)]) / np.log(count)
    for i in range(count):
        k = np.exp(-distances[i] / h)
        k[i] = 0
        expected = sum(2 / h * k[j] * (f[i] - f[j]) for j in range(count)) / k.sum()
        np.testing.assert_allclose(found[i], expected, rtol=1e-9)
    order = np.random.default_rng(0).permutation(count)
    np.testing.assert_allclose(
        distillation.Repulsive().repulsion(f[order]), found[order], rtol=1e-9
    )
    if count == 2:
        apart = f[0] - f[1]
        np.testing.assert_allclose(found[0], 2 * np.log(2) * apart / np.sum(apart**2), rtol=1e-9)
        np.testing.assert_allclose(found[0], -found[1], rtol=1e-12)
    same = jnp.ones((3, 2))
    np.testing.assert_array_equal(distillation.Repulsive().repulsion(same), 0)


class Features(eqx.Module):
    """matrix x."""

    matrix: jax.Array

    def __call__(self, x):
        return self.matrix @ x


def test_it_acts_on_the_examples_through_their_features(x64):
    """-gamma sigma_t J^T R, with a teacher that has no opinion: D(x_t) = x_g."""
    process = processes.Cosine()
    teacher = Blind(process, jnp.full(1, MEAN), jnp.full(1, STD))
    x = jax.random.normal(KEY, (4, 3))
    matrix = jnp.asarray([[1.0, 2.0, 0.0], [0.0, -1.0, 0.5]])
    loss = distillation.Repulsive(0.3, Features(matrix))
    pull = gradient(distillation.SDS(), process, x, teacher)
    found = gradient(loss, process, x, teacher) - pull
    noise_key = jax.random.split(KEY)[1]
    _, t = noise_and_times(process, noise_key, x, loss.sds.time_law)
    expected = -0.3 * process.sigma(t)[:, None] * (loss.repulsion(x @ matrix.T) @ matrix)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    # A step of descent moves them apart.
    f, moved = x @ matrix.T, (x - 1e-3 * found) @ matrix.T
    assert np.sum((moved - moved.mean(0)) ** 2) > np.sum((f - f.mean(0)) ** 2)
    weights = jit(
        lambda matrix: jax.grad(
            lambda matrix: distillation.Repulsive(0.3, Features(matrix))(
                Particles(process, x), KEY, {"x": x, "cond": jnp.arange(4)}, {"teacher": teacher}
            )[0]
        )(matrix)
    )(matrix)
    np.testing.assert_array_equal(weights, 0)


def test_particles_spread_over_what_sds_makes_one(x64):
    process = processes.Cosine()
    teacher = oracles.gaussian(process, jnp.zeros(2), jnp.eye(2))

    class Deaf(Blind):
        def __call__(self, x, t, cond=None, *, key=None):
            return teacher(x, t)

    deaf = Deaf(process, jnp.zeros(1), jnp.zeros(1))
    batch = {"x": jnp.zeros((4, 2)), "cond": jnp.arange(4)}

    @jit
    def ended(loss, x):
        def move(x, key):
            value = lambda x: loss(Particles(process, x), key, batch, {"teacher": deaf})[0]
            return x - 0.2 * jax.grad(value)(x), None

        return jax.lax.scan(move, x, jax.random.split(KEY, 1000))[0]

    start = 0.1 * jax.random.normal(KEY, (4, 2))
    alone, parted = (ended(distillation.Repulsive(g), start) for g in (0.0, 0.5))
    assert np.max(np.abs(alone)) < 0.35
    distances = np.linalg.norm(parted[:, None] - parted[None], axis=-1)
    assert np.min(distances[np.triu_indices(4, 1)]) > 0.6


def test_passes_and_wrong_arguments(x64):
    process = processes.EDM(0.05, 5.0)
    model, passes = counted(law(Affine, process, -0.4, 1.3))
    teacher, teacher_passes = counted(law(Posterior, process, MEAN, STD))
    batch = {"x": jnp.zeros((4, 1))}
    jit(distillation.Repulsive())(model, KEY, batch, {"teacher": teacher})
    assert [len(passes), len(teacher_passes)] == [1, 1]
    with pytest.raises(ValueError, match="two examples at least, got a batch of one"):
        distillation.Repulsive()(model, KEY, {"x": jnp.zeros((1, 1))}, {"teacher": teacher})
    with pytest.raises(ValueError, match="`gamma` must be at least 0"):
        distillation.Repulsive(-1.0)
    with pytest.raises(TypeError, match="`sds` must be a SDS"):
        distillation.Repulsive(sds=distillation.VSD())
    with pytest.raises(TypeError, match="`features` must be a function"):
        distillation.Repulsive(features=3.0)
