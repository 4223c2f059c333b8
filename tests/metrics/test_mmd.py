import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxdiff import metrics, parallel
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


KINDS = {"polynomial": Polynomial(), "rbf": RBF(0.8), "energy": metrics.Energy()}


@pytest.mark.parametrize("name", KINDS)
def test_the_variance_is_that_of_the_estimates(x64, name):
    """Over draws of both samples, of different laws and, where first-order terms vanish, of one."""
    kernel, count = KINDS[name], 3000

    @jax.jit
    @jax.vmap
    def both(x, y):
        return metrics.mmd2_unbiased(x, y, kernel), metrics.mmd2_variance(x, y, kernel)

    for shift in (MU2, MU1):
        factor = A2 if shift is MU2 else A1
        x = gaussian_batches(count, 30, MU1, A1, seed=3)
        y = gaussian_batches(count, 20, shift, factor, seed=4)
        values, variances = map(np.asarray, both(x, y))
        true = values.var(ddof=1)
        # The sampling error of a variance, with the kurtosis of the values.
        fourth = ((values - values.mean()) ** 4).mean()
        error = np.sqrt((fourth / true**2 - 1) / count) * true
        spread = variances.std() / count**0.5
        assert abs(variances.mean() - true) < 4 * np.hypot(error, spread) + 0.08 * true
        assert (variances >= 0).all()


def test_pairs_that_depend_on_each_other_are_left_out(x64):
    """y_i is near x_i, and the law of y is another's: unbiased without their own pairs."""
    count, n = 6000, 6
    common = np.random.default_rng(0).normal(size=(count, n, 2))
    x, y = common @ A1.T + MU1, common @ A2.T + MU2
    statistic = jax.jit(jax.vmap(lambda x, y: metrics.mmd2_unbiased(x, y, RBF(0.7), paired=True)))
    values, expected = statistic(x, y), rbf_mmd2(0.7)
    error = values.std() / count**0.5
    assert abs(values.mean() - expected) < 4 * error < 0.1 * expected
    plain = jax.vmap(lambda x, y: mmd2_unbiased(x, y, RBF(0.7)))(x, y)
    assert abs(plain.mean() - expected) > 10 * error


def test_the_variance_of_many_samples_in_single_precision():
    x, y = RNG.normal(size=(700, 4)), RNG.normal(size=(600, 4)) + 0.1
    with jax.enable_x64(True):
        double = float(metrics.mmd2_variance(jnp.asarray(x), jnp.asarray(y)))
    single = metrics.mmd2_variance(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
    assert_allclose(single, double, rtol=2e-3)


def test_blocks_are_the_whole(x64):
    x, y = jnp.asarray(RNG.normal(size=(11, 3))), jnp.asarray(RNG.normal(size=(8, 3)) + 0.2)
    for fn in (metrics.mmd2_unbiased, metrics.mmd2_biased, metrics.mmd2_variance):
        for kernel in KINDS.values():
            whole, slope = jax.value_and_grad(lambda x: fn(x, y, kernel))(x)  # noqa: B023
            pieces, parts = jax.value_and_grad(lambda x: fn(x, y, kernel, block_size=4))(x)  # noqa: B023
            assert_allclose(pieces, whole, rtol=1e-9)
            assert_allclose(parts, slope, rtol=1e-8, atol=1e-15)


def test_samples_over_a_mesh_see_all_others(x64):
    mesh = parallel.make_mesh(data=4, fsdp=2)
    x, y = RNG.normal(size=(16, 3)), RNG.normal(size=(24, 3)) + 0.2
    fn = jax.jit(jax.value_and_grad(lambda x, y: metrics.mmd2_unbiased(x, y)))
    value, slope = fn(x, y)
    spread, parts = fn(*parallel.shard_batch((x, y), mesh))
    assert_allclose(spread, value, rtol=1e-10)
    assert_allclose(parts, slope, rtol=1e-10)
    assert parts.sharding.is_equivalent_to(parallel.batch_sharding(mesh), 2)


def test_linear_time(x64):
    x, y = gaussian_batches(3000, 12, MU1, A1, 5), gaussian_batches(3000, 12, MU2, A2, 6)
    values, errors = jax.jit(jax.vmap(lambda x, y: metrics.mmd2_linear(x, y, RBF(0.7))))(x, y)
    assert abs(values.mean() - rbf_mmd2(0.7)) < 4 * values.std() / 3000**0.5
    assert_allclose(np.mean(errors**2), values.var(), rtol=0.1)
    # As the sum of its pairs.
    x, y = jnp.asarray(x), jnp.asarray(y)
    kernel = Polynomial()
    u, v, a, b = x[0, :1], x[0, 1:2], y[0, :1], y[0, 1:2]
    pair = kernel(u, v) + kernel(a, b) - kernel(u, b) - kernel(v, a)
    two, _ = metrics.mmd2_linear(jnp.tile(x[0, :2], (2, 1)), jnp.tile(y[0, :2], (2, 1)), kernel)
    assert_allclose(two, pair[0, 0], rtol=1e-10)


def test_permutations_give_valid_chances(x64):
    """Uniform where both laws are one; small where they are not."""
    count = 200

    def chances(y):
        keys = jax.random.split(jax.random.key(0), count)
        test = lambda key, x, y: metrics.permutation_test(key, x, y, RBF(1.0), num_permutations=99)  # noqa: E731
        return np.asarray(jax.jit(jax.vmap(test))(keys, x, y)[1])

    x = gaussian_batches(count, 12, MU1, A1, 7)
    same = chances(gaussian_batches(count, 9, MU1, A1, 8))
    for level in (0.1, 0.25, 0.5, 0.75):
        share = (same <= level).mean()
        assert abs(share - level) < 4 * np.sqrt(level * (1 - level) / count)
    assert np.median(chances(gaussian_batches(count, 9, MU1 + 2, A1, 9))) <= 0.02
    x = jnp.asarray(x)
    value, chance = metrics.permutation_test(jax.random.key(0), x[0], x[0], num_permutations=9)
    assert_allclose(value, mmd2_unbiased(x[0], x[0]))
    assert chance == 1.0


def test_within_classes(x64):
    x, y = jnp.asarray(RNG.normal(size=(12, 3))), jnp.asarray(RNG.normal(size=(9, 3)))
    a, b = (
        jnp.asarray([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]),
        jnp.asarray([0, 0, 0, 1, 1, 1, 1, 2, 3]),
    )
    mean, each = metrics.conditional_mmd2(x, a, y, b, num_classes=5)
    expected = [mmd2_unbiased(x[a == c], y[b == c]) for c in (0, 1)]
    assert_allclose(each[:2], expected, rtol=1e-10)
    assert np.isnan(each[2:]).all()
    assert_allclose(mean, np.mean(expected), rtol=1e-10)
    slope = jax.grad(lambda x: metrics.conditional_mmd2(x, a, y, b, num_classes=5)[0])(x)
    assert np.isfinite(slope).all() and (slope[:7] != 0).all() and (slope[7:] == 0).all()


@pytest.mark.usefixtures("unchecked")
def test_errors():
    x = jnp.zeros((5, 3))
    with pytest.raises(ValueError, match=r"`x` must hold at least 2 samples"):
        mmd2_unbiased(x[:1], x)
    with pytest.raises(ValueError, match=r"`y` must hold at least 1 samples"):
        mmd2_biased(x, x[:0])
    with pytest.raises(ValueError, match=r"events of one shape, got \(3,\) and \(2,\)"):
        mmd2_unbiased(x, x[:, :2])
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 5 samples, the first at index 2"):
        metrics.mmd2_unbiased(x.at[2, 1].set(jnp.nan), x)
    with pytest.raises(ValueError, match="as many, got 5 and 4"):
        metrics.mmd2_linear(x, x[:4])
    labels = jnp.arange(5)
    with pytest.raises(ValueError, match="two samples on both sides, got none"):
        metrics.conditional_mmd2(x, labels, x, labels, num_classes=5)
    with pytest.raises(ValueError, match=r"`y_labels` must lie in \[0, 4\), got 0 to 4"):
        metrics.conditional_mmd2(x, 0 * labels, x, labels, num_classes=4)
