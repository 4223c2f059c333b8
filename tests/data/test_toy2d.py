import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.data import checkerboard, eight_gaussians, rings, swiss_roll, two_moons

SAMPLERS = [two_moons, swiss_roll, checkerboard, eight_gaussians, rings]
N = 20_000


def check_mean(values, expected):
    """Within 4.5 standard errors."""
    values = np.asarray(values, np.float64)
    assert abs(values.mean() - expected) < 4.5 * values.std() / len(values) ** 0.5 + 1e-6


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_point_i_depends_on_key_and_i_alone(sampler):
    key = jax.random.key(1)
    many = sampler(key, 50)
    assert many.shape == (50, 2) and many.dtype == jnp.float32
    np.testing.assert_array_equal(many[:7], sampler(key, 7))
    assert not np.array_equal(many, sampler(jax.random.key(2), 50))
    with pytest.raises(TypeError, match="typed PRNG key"):
        sampler(jax.random.PRNGKey(0), 3)


def test_two_moons_moments():
    # E cos a = 0, E sin a = 2 / pi, E cos^2 a = E sin^2 a = 1/2 on a half circle.
    x = np.asarray(two_moons(jax.random.key(0), N, noise=0.2))
    check_mean(x[:, 0], 0)
    check_mean(x[:, 1], 0)
    check_mean(x[:, 0] ** 2, 3 / 4 + 0.04)
    check_mean(x[:, 1] ** 2, 1 / 2 - 1 / np.pi + 1 / 16 + 0.04)


def test_two_moons_are_sklearns():
    from sklearn.datasets import make_moons
    from sklearn.neighbors import NearestNeighbors

    theirs = make_moons(4000)[0] - [0.5, 0.25]
    ours = np.asarray(two_moons(jax.random.key(0), 500, noise=0.0))
    assert NearestNeighbors(n_neighbors=1).fit(theirs).kneighbors(ours)[0].max() < 2e-3


def test_swiss_roll_winds_as_far_as_its_radius_says():
    x = np.asarray(swiss_roll(jax.random.key(0), N, noise=0.0), np.float64)
    angle = 7 * np.linalg.norm(x, axis=1)
    np.testing.assert_allclose(x[:, 0] * 7, angle * np.cos(angle), atol=1e-4)
    np.testing.assert_allclose(x[:, 1] * 7, angle * np.sin(angle), atol=1e-4)
    check_mean(angle, 3 * np.pi)
    check_mean((angle - 3 * np.pi) ** 2, 3 * np.pi**2 / 4)
    noisy = np.asarray(swiss_roll(jax.random.key(0), N, noise=0.3), np.float64)
    check_mean((noisy - x)[:, 0] ** 2, 0.09)


def test_checkerboard_fills_eight_squares_evenly():
    x = np.asarray(checkerboard(jax.random.key(0), N))
    cells = np.floor(x).astype(int)
    assert (cells.sum(1) % 2 == 0).all() and cells.min() == -2 and cells.max() == 1
    _, counts = np.unique(cells, axis=0, return_counts=True)
    assert len(counts) == 8
    assert ((counts - N / 8) ** 2 / (N / 8)).sum() < 24.3  # chi-square, 7 dof, 99.9 %
    inside = x - cells
    check_mean(inside[:, 0], 1 / 2)
    check_mean(inside[:, 1] ** 2, 1 / 3)


def test_eight_gaussians_are_isotropic():
    x = np.asarray(eight_gaussians(jax.random.key(0), N, noise=0.1), np.float64)
    check_mean(x[:, 0] ** 2, 1 + 0.01)
    check_mean(x[:, 1] ** 2, 1 + 0.01)
    # Isotropic noise leaves E z^8 = c^8 for each centre c, and every c^8 is 2^4.
    check_mean(((x[:, 0] + 1j * x[:, 1]) ** 8).real, 2**4)


def test_rings_have_four_radii():
    x = np.asarray(rings(jax.random.key(0), N, noise=0.0))
    radius = np.linalg.norm(x, axis=1)
    counts = np.bincount(np.rint(2 * radius).astype(int), minlength=5)
    np.testing.assert_allclose(radius, np.rint(2 * radius) / 2, atol=1e-5)
    assert counts[0] == 0 and ((counts[1:] - N / 4) ** 2 / (N / 4)).sum() < 16.3
    check_mean((x[:, 0] / radius) ** 2, 1 / 2)


def test_double_precision(x64):
    assert two_moons(jax.random.key(0), 3).dtype == jnp.float64
