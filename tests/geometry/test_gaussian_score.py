import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import gaussian, mixture

import jaxdiff
from jaxdiff import oracles, processes
from jaxdiff.geometry._gaussian_score import (
    explained_variance,
    fit_gaussian,
    fit_gaussian_mixture,
    teleport,
)

KEY = jax.random.key(0)


@functools.partial(jax.jit, static_argnums=1)
def draw(oracle, count):
    return jax.vmap(oracle.sample_data)(jax.random.split(KEY, count))


def at_log_snr(process, log_snr):
    return process.time(jnp.asarray(log_snr))


def test_the_full_fit_has_the_moments_of_the_data(x64):
    data = jax.random.normal(KEY, (40, 2, 3)) @ jnp.diag(jnp.asarray([1.0, 0.3, 2.0])) + 0.5
    mean, covariance = fit_gaussian(processes.VP(), data).moments()
    rows = np.asarray(data).reshape(40, 6)
    np.testing.assert_allclose(mean.ravel(), rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(rows.T, bias=True), atol=1e-12)


def test_fewer_examples_than_dimensions(x64):
    data = jax.random.normal(KEY, (3, 6))
    fit = fit_gaussian(processes.VP(), data)
    assert fit.spectrum.shape == (1, 3)
    np.testing.assert_allclose(fit.covariances()[0], np.cov(data.T, bias=True), atol=1e-12)


@pytest.mark.parametrize("rank", [0, 2])
def test_low_rank_fit_is_the_most_likely_of_its_kind(x64, rank):
    data = jax.random.normal(KEY, (40, 5)) * jnp.asarray([3.0, 2.0, 0.5, 0.3, 0.2])
    fit = fit_gaussian(processes.VP(), data, rank=rank)
    values = np.linalg.eigvalsh(np.cov(data.T, bias=True))[::-1]
    got = np.linalg.eigvalsh(fit.covariances()[0])[::-1]
    expected = np.concatenate([values[:rank], np.full(5 - rank, values[rank:].mean())])
    np.testing.assert_allclose(got, expected, rtol=1e-10)

    def likelihood(spectrum, isotropic, basis):
        other = oracles.GaussianMixture(
            fit.process, fit.log_weights, fit.means, basis, spectrum, isotropic, fit.labels, 1
        )
        return jax.vmap(lambda x: other.log_prob(x, jnp.zeros(())))(data).mean()

    slopes = jax.jit(jax.grad(likelihood, (0, 1)))(fit.spectrum, fit.isotropic, fit.basis)
    for slope in slopes:
        np.testing.assert_allclose(slope, 0, atol=1e-10)


def test_the_fit_is_the_best_affine_denoiser(x64):
    oracle = mixture(processes.VP())
    data, t = draw(oracle, 60), jnp.asarray(0.4)
    alpha, sigma = oracle.process.alpha(t), oracle.process.sigma(t)
    # The regression of x0 on x_t over the data, the noise integrated out, as a ridge problem.
    centred = np.asarray(data) - np.asarray(data).mean(0)
    rows = np.concatenate([alpha * centred, sigma * np.sqrt(60) * np.eye(2)])
    slope = np.linalg.lstsq(rows, np.concatenate([centred, np.zeros((2, 2))]), rcond=None)[0]
    x = jnp.asarray([0.7, -0.2])
    mean = np.asarray(data).mean(0)
    expected = mean + (np.asarray(x) - alpha * mean) @ slope
    fit = fit_gaussian(oracle.process, data)
    np.testing.assert_allclose(jax.jit(lambda x: fit(x, t))(x), expected, rtol=1e-9)


def test_a_mixture_has_the_moments_of_its_groups(x64):
    data = jax.random.normal(KEY, (80, 2)) * jnp.asarray([1.0, 0.3])
    labels = np.repeat([0, 1], [30, 50])
    fit = fit_gaussian_mixture(processes.VP(), data, labels)
    np.testing.assert_allclose(np.exp(fit.log_weights), [30 / 80, 50 / 80], rtol=1e-12)
    np.testing.assert_array_equal(fit.labels, [0, 1])
    for label, covariance in enumerate(fit.covariances()):
        group = np.asarray(data)[labels == label]
        np.testing.assert_allclose(fit.means[label], group.mean(0), rtol=1e-12)
        np.testing.assert_allclose(covariance, np.cov(group.T, bias=True), atol=1e-12)
    covariance = jax.jit(lambda fit: fit.moments()[1])(fit)
    np.testing.assert_allclose(covariance, np.cov(data.T, bias=True), atol=1e-12)


def test_explained_variance_grows_with_the_noise(x64):
    oracle = mixture(processes.VP())
    data = draw(oracle, 400)
    one = fit_gaussian(oracle.process, data)
    several = fit_gaussian_mixture(oracle.process, data, np.asarray(nearest(data)))
    levels = at_log_snr(oracle.process, [2.0, 0.0, -3.0])

    @jax.jit
    def curves(t):
        part = lambda other: explained_variance(KEY, oracle, other, data, t)
        return part(one), part(several), part(oracle)

    of_one, of_several, of_itself = jax.vmap(curves)(levels)
    assert np.all(np.diff(of_one) > 0)
    assert of_one[0] < 0.9 < 0.995 < of_one[-1] < 1
    assert np.all(of_several[:2] > of_one[:2])
    np.testing.assert_array_equal(of_itself, 1)


def nearest(data):
    centres = jnp.asarray([[-1.5, 0.5], [1.0, 1.0], [0.5, -1.5]])
    return jnp.argmin(jnp.sum((data[:, None] - centres) ** 2, -1), 1)


def test_explained_variance_of_a_wrong_scale_in_closed_form(x64):
    # Scores -x / v and -x / w explain 1 - (1 - v / w)^2 of each other, whatever the noise.
    process, t = processes.EDM(), jnp.asarray(1.5)
    one, other = (oracles.gaussian(process, jnp.zeros(2), c * jnp.eye(2)) for c in (0.5, 2.0))
    part = explained_variance(KEY, one, other, draw(one, 5), t)
    np.testing.assert_allclose(part, 1 - (1 - (0.5 + 2.25) / (2.0 + 2.25)) ** 2, rtol=1e-12)


def test_each_denoiser_has_its_own_condition(x64):
    oracle = mixture(processes.VP())
    data, cond = draw(oracle, 20), jnp.ones(20, jnp.int32)

    @jax.jit
    def part(cond, approximation_cond):
        conds = {"cond": cond, "approximation_cond": approximation_cond}
        return explained_variance(KEY, oracle, oracle, data, 0.3, **conds)

    assert part(cond, cond) == 1
    assert part(cond, None) < 0.95


def integrate(oracle, start, skip, count):
    """To t_min from given states, or from the prior, to high accuracy."""
    ends = jnp.stack([jnp.asarray(skip), jnp.asarray(oracle.process.t_min)])
    exact = {
        "solver": diffrax.Dopri5(),
        "times": ends,
        "stepsize_controller": diffrax.PIDController(rtol=1e-8, atol=1e-8),
    }
    if start is None:
        return jaxdiff.sample(KEY, oracle, oracle.event_shape, count, **exact).x
    return jaxdiff.denoise(KEY, oracle, start, **exact).x


def test_teleported_sampling_of_a_gaussian_is_the_full_trajectory(x64):
    oracle = gaussian(processes.VP())
    skip = at_log_snr(oracle.process, -1.0)
    start = teleport(KEY, oracle, skip, 4)
    whole = integrate(oracle, None, oracle.process.t_max, 4)
    assert np.abs(whole - oracle.means[0]).max() > 0.3
    np.testing.assert_allclose(integrate(oracle, start, skip, 4), whole, atol=1e-6)
    np.testing.assert_allclose(teleport(KEY, oracle, oracle.process.t_min, 4), whole, atol=1e-6)
    again = teleport(KEY, oracle, skip, 2, first_index=2, t_start=oracle.process.t_max)
    np.testing.assert_array_equal(again, start[2:])


def test_teleporting_a_mixture_errs_less_the_earlier_it_stops(x64):
    oracle = mixture(processes.VP())
    approximation = oracles.gaussian(oracle.process, *oracle.moments())
    whole = integrate(oracle, None, oracle.process.t_max, 64)
    errors = []
    for log_snr in (-6.0, -4.0, -2.0, 0.0):
        skip = at_log_snr(oracle.process, log_snr)
        rest = integrate(oracle, teleport(KEY, approximation, skip, 64), skip, 64)
        errors.append(float(jnp.sqrt(jnp.mean((rest - whole) ** 2))))
    assert errors == sorted(errors)
    assert errors[0] < 0.01 < 0.1 < errors[-1]


def test_each_example_by_its_own_gaussian(x64):
    oracle = mixture(processes.VP())
    means, covariances = oracle.means[:2], oracle.covariances()[:2]
    both = oracles.gaussian_mixture(oracle.process, means, covariances)
    x = teleport(KEY, both, 0.2, 3, component=jnp.asarray([0, 1, 1]))
    for k in (0, 1):
        alone = oracles.gaussian(oracle.process, means[k], covariances[k])
        expected = teleport(KEY, alone, 0.2, 3)
        members = slice(0, 1) if k == 0 else slice(1, 3)
        np.testing.assert_allclose(x[members], expected[members], rtol=1e-12)


def test_float32_in_float32_out():
    fit = fit_gaussian(processes.VP(), jax.random.normal(KEY, (20, 4)), rank=2)
    dtypes = {leaf.dtype for leaf in (fit.means, fit.basis, fit.spectrum, fit.isotropic)}
    assert dtypes == {jnp.dtype("float32")}
    assert teleport(KEY, fit, 0.5, 2).dtype == jnp.float32


def test_errors():
    process, data = processes.VP(), jnp.ones((6, 4))
    with pytest.raises(ValueError, match="`rank` must lie between 0 and 4.* got 5"):
        fit_gaussian(process, data, rank=5)
    with pytest.raises(ValueError, match=r"`assignments` .* shape \(6,\), got \(2,\)"):
        fit_gaussian_mixture(process, data, [0, 1])
    with pytest.raises(ValueError, match="none in group 1"):
        fit_gaussian_mixture(process, data, [0, 0, 0, 2, 2, 2])
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        fit_gaussian_mixture(process, data, [0, 0, 0, -1, 1, 1])
    with pytest.raises(TypeError, match="`assignments` must be integers"):
        fit_gaussian_mixture(process, data, np.zeros(6))
    both = fit_gaussian_mixture(process, data, [0, 0, 0, 1, 1, 1])
    with pytest.raises(ValueError, match="`component` must choose"):
        teleport(KEY, both, 0.5, 2)
    with pytest.raises(ValueError, match=r"`component` .* shape \(2,\), got \(3,\)"):
        teleport(KEY, both, 0.5, 2, component=jnp.zeros(3, jnp.int32))
