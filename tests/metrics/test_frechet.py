import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from numpy.testing import assert_allclose

from jaxdiff import metrics

frechet_distance = jax.jit(metrics.frechet_distance)
frechet_distance_gaussian = jax.jit(metrics.frechet_distance_gaussian)
RNG = np.random.default_rng(0)


def spd(d, rank=None, seed=0):
    factor = np.random.default_rng(seed).normal(size=(d, rank or d))
    return factor @ factor.T / d


def textbook(mu1, cov1, mu2, cov2):
    """The usual implementation, with a matrix square root, in double precision."""
    root = scipy.linalg.sqrtm(cov1 @ cov2).real
    return ((mu1 - mu2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root)


def textbook_of_samples(x, y):
    return textbook(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))


def test_gaussians_agree_with_the_matrix_square_root(x64):
    mu1, mu2 = RNG.normal(size=(2, 6))
    expected = textbook(mu1, spd(6, seed=1), mu2, spd(6, seed=2))
    got = frechet_distance_gaussian(mu1, spd(6, seed=1), mu2, spd(6, seed=2))
    assert_allclose(got, expected, rtol=1e-10)


def test_commuting_gaussians(x64):
    # |m|^2 + sum (s1 - s2)^2, in any common eigenbasis.
    basis, _ = np.linalg.qr(RNG.normal(size=(5, 5)))
    s1, s2 = np.array([3, 2, 1, 0.5, 0]), np.array([1, 2, 0, 4, 0])
    covs = [basis * s**2 @ basis.T for s in (s1, s2)]
    got = frechet_distance_gaussian(np.zeros(5), covs[0], np.full(5, 2.0), covs[1])
    assert_allclose(got, 20 + ((s1 - s2) ** 2).sum(), rtol=1e-7)


def test_lines_at_an_angle(x64):
    # Rank one against rank one: |u|^2 + |v|^2 - 2 |u.v|.
    u, v = RNG.normal(size=(2, 4))
    zero = np.zeros(4)
    got = frechet_distance_gaussian(zero, np.outer(u, u), zero, np.outer(v, v))
    assert_allclose(got, u @ u + v @ v - 2 * abs(u @ v), rtol=1e-7)


@pytest.mark.parametrize(("n", "m"), [(300, 200), (20, 300), (7, 5)])
def test_samples_agree_with_the_matrix_square_root(x64, n, m):
    # 12 dimensions: full rank, one or both of deficient rank.
    x = RNG.normal(size=(n, 12)) @ spd(12, seed=3)
    y = RNG.normal(size=(m, 12)) + 1
    # The square root of a singular matrix is the oracle's weak point, not ours.
    assert_allclose(frechet_distance(x, y), textbook_of_samples(x, y), rtol=1e-6)


def test_single_precision_resolves_small_distances_far_from_the_origin():
    x = RNG.normal(size=(400, 16)) * np.logspace(0, -3, 16) + 50
    y = x + 1e-3 * RNG.normal(size=x.shape)
    x, y = x.astype(np.float32), y.astype(np.float32)
    expected = textbook_of_samples(x.astype(np.float64), y.astype(np.float64))
    assert expected < 1e-4  # against a trace of order one
    got = frechet_distance(jnp.asarray(x), jnp.asarray(y))
    assert got.dtype == jnp.float32
    assert_allclose(got, expected, rtol=2e-3)


def test_equal_samples_are_at_distance_zero_and_order_is_immaterial():
    x = jnp.asarray(RNG.normal(size=(30, 40)), jnp.float32)
    y = jnp.asarray(RNG.normal(size=(50, 40)), jnp.float32)
    assert 0 <= frechet_distance(x, x) < 1e-9
    assert_allclose(frechet_distance(x, y), frechet_distance(y, x), rtol=1e-5)
    rotation = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (40, 40)))[0]
    rotated = frechet_distance(x @ rotation, y @ rotation)
    assert_allclose(rotated, frechet_distance(x, y), rtol=1e-4)
    images = frechet_distance(x.reshape(30, 5, 8), y.reshape(50, 5, 8))
    assert_allclose(images, frechet_distance(x, y), rtol=1e-6)


@pytest.mark.parametrize(("n", "m"), [(40, 30), (4, 30)])
def test_gradient(x64, n, m):
    x, y, v = (RNG.normal(size=(k, 6)) for k in (n, m, n))
    slope = jnp.vdot(jax.jit(jax.grad(frechet_distance))(x, y), v)
    h = 1e-5
    difference = (frechet_distance(x + h * v, y) - frechet_distance(x - h * v, y)) / (2 * h)
    assert_allclose(slope, difference, rtol=1e-6)


def test_the_gradient_where_a_feature_is_constant(x64):
    """A dead unit: the same as of the other features alone, and 0 for itself."""
    x, y = np.random.default_rng(0).normal(size=(2, 40, 3))
    dead = np.concatenate([x, np.full((40, 1), 0.5)], 1)
    other = np.concatenate([y, np.full((40, 1), 0.5)], 1)
    slope = jax.jit(jax.grad(frechet_distance))(jnp.asarray(dead), jnp.asarray(other))
    expected = jax.jit(jax.grad(frechet_distance))(jnp.asarray(x), jnp.asarray(y))
    assert_allclose(slope[:, :3], expected, rtol=1e-8, atol=1e-12)
    assert_allclose(slope[:, 3], 0, atol=1e-12)


@pytest.mark.usefixtures("unchecked")
def test_errors():
    x = jnp.zeros((5, 3))
    with pytest.raises(ValueError, match=r"`y` must hold at least 2 samples.*\(1, 3\)"):
        frechet_distance(x, x[:1])
    with pytest.raises(ValueError, match=r"`x` must hold at least 2 samples.*\(5,\)"):
        frechet_distance(x[:, 0], x)
    with pytest.raises(ValueError, match=r"events of one shape, got \(3,\) and \(2,\)"):
        frechet_distance(x, x[:, :2])
    with pytest.raises(ValueError, match="`x` must hold floats, got dtype int32"):
        frechet_distance(x.astype(int), x)
    with pytest.raises(ValueError, match=r"\(3,\), \(3,\), \(3,\), \(3, 3\)"):
        frechet_distance_gaussian(x[0], x[0], x[0], jnp.eye(3))
