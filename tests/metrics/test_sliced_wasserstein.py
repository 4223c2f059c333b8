import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from numpy.testing import assert_allclose

from jaxdiff import metrics

sliced_wasserstein = jax.jit(metrics.sliced_wasserstein, static_argnames=("num_projections", "p"))
wasserstein_1d = jax.jit(metrics.wasserstein_1d, static_argnames="p")
RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


@pytest.mark.parametrize(("n", "m"), [(7, 7), (7, 5), (4, 12), (1, 6), (100, 99)])
def test_order_one_agrees_with_scipy(x64, n, m):
    x, y = RNG.normal(size=n), RNG.normal(size=m) + 1
    expected = scipy.stats.wasserstein_distance(x, y)
    assert_allclose(wasserstein_1d(x, y, p=1.0), expected, rtol=1e-12)


@pytest.mark.parametrize(("n", "m"), [(5, 5), (3, 4), (2, 6)])
def test_order_two_solves_the_transport_problem(x64, n, m):
    # Equal masses after repeating points: an assignment problem.
    from scipy.optimize import linear_sum_assignment

    x, y = RNG.normal(size=n), RNG.normal(size=m)
    cost = (np.repeat(x, m)[:, None] - np.repeat(y, n)) ** 2
    expected = cost[linear_sum_assignment(cost)].mean() ** 0.5
    assert_allclose(wasserstein_1d(x, y), expected, rtol=1e-12)


def test_repeated_samples_are_the_same_measure(x64):
    x, y = RNG.normal(size=(6, 3)), RNG.normal(size=(5, 3))
    once = sliced_wasserstein(KEY, x, y)
    assert_allclose(sliced_wasserstein(KEY, np.tile(x, (3, 1)), y), once, rtol=1e-12)
    assert_allclose(sliced_wasserstein(KEY, x[::-1], np.tile(y, (2, 1))), once, rtol=1e-12)


@pytest.mark.parametrize("d", [2, 16])
def test_a_shift_costs_its_mean_square_projection(d):
    # W_2 of a shift s along theta is |s.theta|, and E (s.theta)^2 = |s|^2 / d.
    x = jnp.asarray(RNG.normal(size=(20, d)), jnp.float32)
    shift = jnp.asarray(RNG.normal(size=d), jnp.float32)
    count = 4000
    got = sliced_wasserstein(KEY, x, x + shift, num_projections=count) ** 2
    expected = jnp.sum(shift**2) / d
    # (s.theta)^2 / |s|^2 is Beta(1/2, (d - 1)/2).
    error = scipy.stats.beta(0.5, (d - 1) / 2).std() * d / count**0.5
    assert abs(got / expected - 1) < 4 * error


def test_scaled_gaussians():
    # W_2 of N(0, a^2) and N(0, b^2) is |a - b| in every direction.
    x = jnp.asarray(RNG.normal(size=(4000, 3)), jnp.float32)
    got = sliced_wasserstein(KEY, x, 2.5 * x[:3000], num_projections=32)
    assert_allclose(got, 1.5, rtol=0.04)


def test_invariances_and_dtype():
    x = jnp.asarray(RNG.normal(size=(9, 4)), jnp.float32)
    y = jnp.asarray(RNG.normal(size=(12, 4)), jnp.float32)
    value = sliced_wasserstein(KEY, x, y)
    assert value.dtype == jnp.float32
    assert sliced_wasserstein(KEY, x, x) == 0
    assert_allclose(sliced_wasserstein(KEY, y, x), value, rtol=1e-5)
    assert_allclose(sliced_wasserstein(KEY, 3 * x + 1, 3 * y + 1), 3 * value, rtol=1e-4)
    assert_allclose(sliced_wasserstein(KEY, x.reshape(9, 2, 2), y.reshape(12, 2, 2)), value)
    assert sliced_wasserstein(jax.random.key(1), x, y) != value
    assert sliced_wasserstein(KEY, x, y, p=1.0) <= value


def test_single_precision_is_kept_under_x64(x64):
    x = jnp.asarray(RNG.normal(size=(9, 4)), jnp.float32)
    assert sliced_wasserstein(KEY, x, x[:5]).dtype == jnp.float32


def test_gradient_matches_differences_and_is_zero_at_zero(x64):
    x, y, v = RNG.normal(size=(8, 3)), RNG.normal(size=(6, 3)), RNG.normal(size=(8, 3))
    cost = jax.jit(lambda x: sliced_wasserstein(KEY, x, y, num_projections=16))
    h = 1e-6
    slope = jnp.vdot(jax.grad(cost)(x), v)
    assert_allclose(slope, (cost(x + h * v) - cost(x - h * v)) / (2 * h), rtol=1e-6)
    at_zero = jax.grad(lambda x: sliced_wasserstein(KEY, x, jnp.asarray(y)))(jnp.asarray(y))
    assert (at_zero == 0).all()


@pytest.mark.usefixtures("unchecked")
def test_errors():
    x = jnp.zeros((5, 3))
    with pytest.raises(TypeError, match="typed PRNG key"):
        sliced_wasserstein(jax.random.PRNGKey(0), x, x)
    with pytest.raises(ValueError, match="`num_projections` must be at least 1, got 0"):
        sliced_wasserstein(KEY, x, x, num_projections=0)
    with pytest.raises(ValueError, match="`p` must be at least 1, got 0.5"):
        sliced_wasserstein(KEY, x, x, p=0.5)
    with pytest.raises(ValueError, match=r"events of one shape, got \(3,\) and \(2,\)"):
        sliced_wasserstein(KEY, x, x[:, :2])
    with pytest.raises(ValueError, match=r"\(n,\) and \(m,\), got \(5, 3\) and \(5, 3\)"):
        wasserstein_1d(x, x)
