import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PROCESSES, gaussian, mixture

from jaxdiff import oracles
from jaxdiff.predictions import Score, Velocity
from jaxdiff.processes import VP, RectifiedFlow


@pytest.mark.parametrize("make", PROCESSES.values(), ids=PROCESSES.keys())
def test_score_is_the_gradient_of_log_prob(x64, make):
    oracle = mixture(make())
    x = jax.random.normal(jax.random.key(0), (5, 2))

    @jax.jit
    def both(x, t, cond):
        return oracle.predict(Score(), x, t, cond), jax.grad(oracle.log_prob)(x, t, cond)

    for log_snr in (-6.0, 0.0, 6.0):
        t = oracle.process.time(jnp.asarray(log_snr))
        for cond in (0, 1, 2):
            for example in x:
                score, gradient = both(example, t, jnp.asarray(cond))
                np.testing.assert_allclose(score, gradient, rtol=1e-8, atol=1e-8)


def test_log_prob_is_normalised_and_class_posterior_is_bayes(x64):
    oracle, t = mixture(VP()), jnp.asarray(0.2)
    axis = jnp.linspace(-6, 6, 301)
    grid = jnp.stack(jnp.meshgrid(axis, axis), -1).reshape(-1, 2)
    for cond in (None, 0, 1):
        density = jnp.exp(jax.vmap(lambda x, c=cond: oracle.log_prob(x, t, c))(grid))
        np.testing.assert_allclose(density.sum() * (axis[1] - axis[0]) ** 2, 1, rtol=1e-6)
    points = grid[::9001]
    posterior = jax.vmap(lambda x: oracle.class_log_posterior(x, t))(points)
    for c, weight in ((0, 0.5), (1, 0.5)):
        bayes = jax.vmap(
            lambda x, c=c, w=weight: jnp.log(w) + oracle.log_prob(x, t, c) - oracle.log_prob(x, t)
        )(points)
        np.testing.assert_allclose(posterior[:, c], bayes, rtol=1e-10)


def test_conditioned_denoiser_matches_quadrature(x64):
    """E[x0 | x_t, y] by brute force over a grid of x0."""
    oracle, t = mixture(RectifiedFlow()), jnp.asarray(0.6)
    operator, y, noise_std = jnp.asarray([[1.0, 0.5]]), jnp.asarray([0.4]), 0.3
    posterior = oracle.condition(operator, y, noise_std)
    axis = jnp.linspace(-5, 5, 401)
    grid = jnp.stack(jnp.meshgrid(axis, axis), -1).reshape(-1, 2)
    x = jnp.asarray([0.2, -0.7])
    means = jnp.asarray([[-1.5, 0.5], [1.0, 1.0], [0.5, -1.5]])
    log_prior = jax.nn.logsumexp(
        jnp.log(jnp.asarray([0.5, 0.3, 0.2]))
        + jax.vmap(lambda m, c: jax.scipy.stats.multivariate_normal.logpdf(grid, m, c), out_axes=1)(
            means, oracle.covariances()
        ),
        axis=1,
    )
    log_weight = (
        log_prior
        - 0.5 * jnp.sum((x - 0.4 * grid) ** 2, 1) / 0.36
        - 0.5 * jnp.sum((y - grid @ operator.T) ** 2, 1) / noise_std**2
    )
    expected = jax.nn.softmax(log_weight) @ grid
    np.testing.assert_allclose(posterior(x, t), expected, rtol=1e-6)


def test_flow_map_follows_the_probability_flow(x64):
    for make in PROCESSES.values():
        oracle = gaussian(make())
        t = oracle.process.time(jnp.asarray(0.5)) + 1e-4  # off a table's node
        x = jnp.asarray([0.3, -1.0, 0.7])
        slope = jax.jacfwd(lambda s: oracles.gaussian_flow_map(oracle, x, t, s))(t)  # noqa: B023
        np.testing.assert_allclose(slope, oracle.predict(Velocity(), x, t), rtol=1e-8, atol=1e-10)
    s = oracle.process.time(jnp.asarray(4.0))
    there = oracles.gaussian_flow_map(oracle, x, t, s)
    np.testing.assert_allclose(oracles.gaussian_flow_map(oracle, there, s, t), x, rtol=1e-12)


def test_low_rank_equals_full_covariance(x64):
    process, t = VP(), jnp.asarray(0.3)
    means = jax.random.normal(jax.random.key(0), (2, 5))
    factors = jax.random.normal(jax.random.key(1), (2, 5, 2))
    low = oracles.low_rank_mixture(process, means, factors, noise_std=0.2, weights=[0.3, 0.7])
    covariances = factors @ factors.mT + 0.04 * jnp.eye(5)
    full = oracles.gaussian_mixture(process, means, covariances, weights=[0.3, 0.7])
    x = jax.random.normal(jax.random.key(2), (5,))
    np.testing.assert_allclose(low(x, t), full(x, t), rtol=1e-10)
    np.testing.assert_allclose(low.log_prob(x, t), full.log_prob(x, t), rtol=1e-10)
    np.testing.assert_allclose(low.covariances(), covariances, rtol=1e-10, atol=1e-12)
    subspace = oracles.low_rank_mixture(process, means[:1], factors[:1])
    inside = jnp.linalg.lstsq(factors[0], subspace(x, t) - means[0])[0]
    np.testing.assert_allclose(factors[0] @ inside, subspace(x, t) - means[0], atol=1e-12)


def test_empirical_is_a_softmax_over_the_data(x64):
    process, t = VP(), jnp.asarray(0.3)
    data = jax.random.normal(jax.random.key(0), (6, 2, 2))
    oracle = oracles.empirical(process, data, labels=[0, 0, 1, 1, 2, 2])
    x = jax.random.normal(jax.random.key(1), (2, 2))
    distance = jnp.sum((x - process.alpha(t) * data) ** 2, axis=(1, 2))
    weights = jax.nn.softmax(-distance / (2 * process.sigma(t) ** 2))
    np.testing.assert_allclose(oracle(x, t), jnp.tensordot(weights, data, 1), rtol=1e-10)
    one_class = oracles.empirical(process, data[2:4])
    np.testing.assert_allclose(oracle(x, t, 1), one_class(x, t), rtol=1e-10)


def test_samples_have_the_stated_moments(x64):
    oracle = mixture(VP())
    for cond in (None, 1):
        x = jax.vmap(lambda key, c=cond: oracle.sample_data(key, c))(
            jax.random.split(jax.random.key(0), 40_000)
        )
        mean, covariance = oracle.moments(cond)
        deviation = (x.mean(0) - mean) / (x.std(0) / np.sqrt(len(x)))
        assert np.abs(deviation).max() < 4
        np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.04)


def test_bad_shapes_are_named():
    process = VP()
    with pytest.raises(ValueError, match="covariances.*shape"):
        oracles.gaussian(process, jnp.zeros(2), jnp.eye(3))
    with pytest.raises(ValueError, match="labels"):
        oracles.gaussian_mixture(process, jnp.zeros((2, 2)), jnp.zeros((2, 2, 2)), labels=[0])
    with pytest.raises(ValueError, match="one example"):
        oracles.gaussian(process, jnp.zeros(2), jnp.eye(2))(jnp.zeros((4, 2)), 0.5)
    with pytest.raises(ValueError, match="single Gaussian"):
        oracles.gaussian_flow_map(mixture(process, jnp.float32), jnp.zeros(2), 0.5, 0.1)
