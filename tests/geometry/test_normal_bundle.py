import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import oracles, processes
from jaxdiff.geometry._normal_bundle import normal_bundle

KEY = jax.random.key(0)
RHO = 1e-3


class Half(processes.GaussianProcess):
    """Half the signal, at every time: alpha stays away from 1 as the noise vanishes."""

    t_min: float = 1e-4
    t_max: float = 1.0

    def alpha(self, t):
        return 0.5 * jnp.ones_like(t)

    def sigma(self, t):
        return 1.0 * t


def planted(process, size=12, rank=4, shape=(3, 2, 2)):
    """A Gaussian on a subspace, its basis, and one of its examples."""
    basis = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (size, rank)))[0]
    factor = basis * jnp.linspace(0.5, 1.5, rank)
    oracle = oracles.low_rank_mixture(process, jnp.ones((1, *shape)), factor[None])
    return oracle, np.asarray(basis), oracle.sample_data(jax.random.key(2))


def low_noise(process, rho=RHO):
    return process.time(jnp.asarray(-2 * np.log(rho)))


@pytest.mark.parametrize("process", [processes.VP, Half])
def test_dimension_and_tangent_space_of_a_gaussian_on_a_subspace(x64, process):
    oracle, basis, x = planted(process())
    out = normal_bundle(KEY, oracle, x, low_noise(oracle.process))
    assert int(out.dimension) == 4
    tangent = np.asarray(out.basis[8:]).reshape(4, 12)
    assert np.linalg.norm(tangent @ basis, 2) == pytest.approx(1, abs=1e-5)
    # The scores' mean lies in the tangent space, and tilts it by about the noise.
    assert np.linalg.norm(basis - tangent.T @ (tangent @ basis)) < 2 * RHO
    direction = jax.random.normal(jax.random.key(3), x.shape)
    expected = (basis @ (basis.T @ np.asarray(direction).ravel())).reshape(x.shape)
    np.testing.assert_allclose(out.tangent_part(direction), expected, atol=5 * RHO)
    # Normal values are those of K Gaussian vectors of size 1 / sigma.
    sigma = oracle.process.sigma(low_noise(oracle.process))
    normal = np.asarray(out.values[:8]) * sigma / np.sqrt(48)
    edge = np.sqrt(8 / 48)
    assert np.all((normal > 1 - 1.3 * edge) & (normal < 1 + 1.3 * edge))
    assert np.all(np.asarray(out.values[8:]) < 10 * RHO * np.asarray(out.values[7]))


def test_values_and_vectors_against_numpy(x64):
    oracle, _, x = planted(processes.VP(), size=4, rank=2, shape=(2, 2))
    t = low_noise(oracle.process, 0.1)
    out = normal_bundle(KEY, oracle, x, t, num_perturbations=7, chunk=2)
    alpha, sigma = (np.asarray(f(t)) for f in (oracle.process.alpha, oracle.process.sigma))
    noise = [jax.random.normal(jax.random.fold_in(KEY, k), (2, 2)) for k in range(7)]
    offset = (alpha * (np.asarray(x) - 1) + sigma * np.asarray(noise)).reshape(7, 4)
    precision = np.linalg.inv(alpha**2 * np.asarray(oracle.covariances()[0]) + sigma**2 * np.eye(4))
    _, values, right = np.linalg.svd(-offset @ precision)
    np.testing.assert_allclose(out.values, values, rtol=1e-7)
    rows = np.asarray(out.basis).reshape(4, 4)
    np.testing.assert_allclose(np.abs(rows @ right.T), np.eye(4), atol=1e-7)
    assert np.all(rows[np.arange(4), np.abs(rows).argmax(1)] > 0)


def test_a_circle_has_one_dimension(x64):
    angles = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    frame = np.linalg.qr(np.asarray(jax.random.normal(jax.random.key(4), (5, 2))))[0]
    data = np.stack([np.cos(angles), np.sin(angles)], -1) @ frame.T
    oracle = oracles.empirical(processes.VP(), data)
    # Between the spacing of the points, 0.016, and the radius.
    t = low_noise(oracle.process, 0.05)
    some = jax.jit(jax.vmap(lambda key, x: normal_bundle(key, oracle, x, t)))
    out = some(jax.random.split(KEY, 4), jnp.asarray(data[::100]))
    np.testing.assert_array_equal(out.dimension, 1)
    tangents = np.roll(data, -100, 0)[::100]
    overlap = np.abs(np.sum(np.asarray(out.basis[:, -1]) * tangents, -1))
    assert overlap.min() > 0.98


def test_float32_stays_float32_and_finds_the_dimension():
    oracle, _, x = planted(processes.VP())
    out = normal_bundle(KEY, oracle, x, low_noise(oracle.process, 1e-2))
    assert int(out.dimension) == 4
    assert out.values.dtype == out.basis.dtype == jnp.float32


def test_errors():
    oracle, _, x = planted(processes.VP())
    with pytest.raises(ValueError, match=r"`num_perturbations` must be at least .* 12.* got 3"):
        normal_bundle(KEY, oracle, x, 0.1, num_perturbations=3)
    with pytest.raises(ValueError, match="at least two numbers"):
        normal_bundle(KEY, oracle, jnp.ones(1), 0.1)
