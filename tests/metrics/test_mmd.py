import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxdiff import metrics
from jaxdiff.metrics import RBF, Polynomial

mmd2_biased, mmd2_unbiased = jax.jit(metrics.mmd2_biased), jax.jit(metrics.mmd2_unbiased)
median_bandwidth = jax.jit(metrics.median_bandwidth)
RNG = np.random.default_rng(0)
MU1, MU2 = np.array([0.5, -0.2]), np.array([-0.1, 0.3])
A1, A2 = np.array([[0.8, 0.0], [0.3, 0.5]]), np.array([[0.5, 0.2], [0.0, 0.9]])


def gaussian_batches(count, n, mu, factor, seed):
    return mu + np.random.default_rng(seed).normal(size=(count, n, 2)) @ factor.T


def moments(mu, cov):
    """E[x^(x) j] of a Gaussian, j = 1, 2, 3."""
    pairs = np.einsum("ij,k->ijk", cov, mu)
    pairs = pairs + pairs.transpose(0, 2, 1) + pairs.transpose(2, 1, 0)
    return mu, cov + np.outer(mu, mu), pairs + np.einsum("i,j,k->ijk", mu, mu, mu)


def polynomial_mmd2(gamma):
    """sum_j C(3, j) gamma^j |M_j - M'_j|^2."""
    first, second = moments(MU1, A1 @ A1.T), moments(MU2, A2 @ A2.T)
    gaps = [((a - b) ** 2).sum() for a, b in zip(first, second, strict=True)]
    return 3 * gamma * gaps[0] + 3 * gamma**2 * gaps[1] + gamma**3 * gaps[2]


def rbf_expectation(mu, cov, bandwidth):
    """E exp(-|d|^2 / (2 h^2)) for d ~ N(mu, cov), as a density of N(0, cov + h^2)."""
    from scipy.stats import multivariate_normal

    density = multivariate_normal(np.zeros(2), cov + bandwidth**2 * np.eye(2)).pdf(mu)
    return density * 2 * np.pi * bandwidth**2


def rbf_mmd2(bandwidth):
    cov1, cov2 = A1 @ A1.T, A2 @ A2.T
    return (
        rbf_expectation(np.zeros(2), 2 * cov1, bandwidth)
        + rbf_expectation(np.zeros(2), 2 * cov2, bandwidth)
        - 2 * rbf_expectation(MU1 - MU2, cov1 + cov2, bandwidth)
    )


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (Polynomial(), polynomial_mmd2(1 / 2)),
        (Polynomial(gamma=0.2), polynomial_mmd2(0.2)),
        (RBF(0.7), rbf_mmd2(0.7)),
    ],
)
def test_the_u_statistic_is_unbiased_for_unequal_sizes(x64, kernel, expected):
    x = gaussian_batches(6000, 5, MU1, A1, seed=1)
    y = gaussian_batches(6000, 8, MU2, A2, seed=2)
    values = np.asarray(jax.vmap(lambda x, y: mmd2_unbiased(x, y, kernel))(x, y))
    error = values.std() / len(values) ** 0.5
    assert abs(values.mean() - expected) < 4 * error
    assert error < 0.1 * expected  # the test has power: a missing term would show
    assert (values < 0).any()


def test_the_v_statistic_has_its_known_bias(x64):
    # (E k(x, x) - E k(x, x')) / n for either sample; k(x, x) = 1 for this kernel.
    h, n, m = 0.7, 5, 8
    x = gaussian_batches(6000, n, MU1, A1, seed=1)
    y = gaussian_batches(6000, m, MU2, A2, seed=2)
    bias = (1 - rbf_expectation(np.zeros(2), 2 * A1 @ A1.T, h)) / n
    bias += (1 - rbf_expectation(np.zeros(2), 2 * A2 @ A2.T, h)) / m
    values = np.asarray(jax.vmap(lambda x, y: mmd2_biased(x, y, RBF(h)))(x, y))
    assert abs(values.mean() - rbf_mmd2(h) - bias) < 4 * values.std() / len(values) ** 0.5
    assert (values > 0).all()


@pytest.mark.parametrize("kernel", [Polynomial(), Polynomial(degree=1), RBF(2.0)])
def test_statistics_of_a_small_case(x64, kernel):
    x, y = RNG.normal(size=(4, 3)), RNG.normal(size=(6, 3))

    def k(u, v):
        if isinstance(kernel, RBF):
            return np.exp(-(np.linalg.norm(u - v) ** 2) / 8)
        return (u @ v / 3 + 1) ** kernel.degree

    def mean(a, b, off_diagonal=False):
        values = [
            k(u, v)
            for i, u in enumerate(a)
            for j, v in enumerate(b)
            if not (off_diagonal and i == j)
        ]
        return sum(values) / len(values)

    v_statistic = mean(x, x) + mean(y, y) - 2 * mean(x, y)
    u_statistic = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y)
    assert_allclose(mmd2_biased(x, y, kernel), v_statistic, rtol=1e-10, atol=1e-12)
    assert_allclose(mmd2_unbiased(x, y, kernel), u_statistic, rtol=1e-10, atol=1e-12)


def test_degree_one_compares_means(x64):
    x, y = RNG.normal(size=(7, 3)), RNG.normal(size=(5, 3))
    gap = ((x.mean(0) - y.mean(0)) ** 2).sum()
    assert_allclose(mmd2_biased(x, y, Polynomial(degree=1, gamma=1.0, offset=5.0)), gap, rtol=1e-9)


def test_equal_samples_and_symmetry():
    x, y = (jnp.asarray(RNG.normal(size=(n, 4)), jnp.float32) for n in (9, 6))
    for kernel in (Polynomial(), RBF(1.0)):
        assert abs(mmd2_biased(x, x, kernel)) < 1e-6
        assert_allclose(mmd2_unbiased(x, y, kernel), mmd2_unbiased(y, x, kernel), rtol=1e-5)


def test_single_precision_holds_a_small_difference():
    # Entries of order 30; a difference of order 1e-2.
    x = RNG.normal(size=(200, 64)) + 1.5
    y = RNG.normal(size=(300, 64)) + 1.51
    single = mmd2_unbiased(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
    with jax.enable_x64(True):
        double = float(mmd2_unbiased(jnp.asarray(x), jnp.asarray(y)))
    assert single.dtype == jnp.float32 and abs(double) < 0.1
    assert_allclose(single, double, atol=1e-5)
    # Distances of points far from the origin.
    x, y = x[:, :3] + 1000, y[:, :3] + 1000
    single = mmd2_biased(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32), RBF(1.0))
    with jax.enable_x64(True):
        double = float(mmd2_biased(jnp.asarray(x), jnp.asarray(y), RBF(1.0)))
    assert_allclose(single, double, atol=1e-4)


def test_median_bandwidth_is_the_median_of_all_pairs(x64):
    from scipy.spatial.distance import pdist

    x, y = RNG.normal(size=(7, 3)), RNG.normal(size=(6, 3)) + 2
    assert_allclose(median_bandwidth(x, y), np.median(pdist(np.concatenate([x, y]))), rtol=1e-12)


def test_the_bandwidth_is_a_leaf_and_the_gradient_is_finite():
    x, y = (jnp.asarray(RNG.normal(size=(n, 4)), jnp.float32) for n in (9, 6))
    sweep = jax.vmap(lambda h: mmd2_biased(x, y, RBF(h)))(jnp.array([0.5, 2.0]))
    assert_allclose(sweep, [mmd2_biased(x, y, RBF(h)) for h in (0.5, 2.0)], rtol=1e-4)
    assert jnp.isfinite(jax.grad(lambda x: mmd2_unbiased(x, y, RBF(1.0)))(x)).all()


@pytest.mark.usefixtures("unchecked")
def test_errors():
    x = jnp.zeros((5, 3))
    with pytest.raises(ValueError, match=r"`x` must hold at least 2 samples"):
        mmd2_unbiased(x[:1], x)
    with pytest.raises(ValueError, match=r"`y` must hold at least 1 samples"):
        mmd2_biased(x, x[:0])
    with pytest.raises(ValueError, match=r"events of one shape, got \(3,\) and \(2,\)"):
        mmd2_unbiased(x, x[:, :2])
