import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import gaussian, mixture

import jaxdiff
from jaxdiff import oracles, processes
from jaxdiff.denoiser import Denoiser
from jaxdiff.geometry import (
    GaugeField,
    ScaledDenoiser,
    asymmetry,
    decomposition_error,
    density_dimension,
    effective_dimension,
    gauge_residual,
    jacobian_dimension,
)
from jaxdiff.predictions import Score
from jaxdiff.traces import Hutchinson

KEY = jax.random.key(0)
effective = jax.jit(effective_dimension, static_argnames="trace")
on_data = jax.jit(density_dimension)


class Half(processes.GaussianProcess):
    """Half the signal, at every time: alpha stays away from 1 as the noise vanishes."""

    t_min: float = 1e-4
    t_max: float = 1.0

    def alpha(self, t):
        return 0.5 * jnp.ones_like(t)

    def sigma(self, t):
        return 1.0 * t


def planted(process, size=10, rank=3):
    """A Gaussian on a subspace, its basis, and one of its examples."""
    basis = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (size, rank)))[0]
    factor = basis * jnp.linspace(0.5, 1.5, rank)
    oracle = oracles.low_rank_mixture(process, jnp.ones((1, size)), factor[None])
    return oracle, basis, oracle.sample_data(jax.random.key(2))


def low_noise(process, rho=1e-3):
    return process.time(jnp.asarray(-2 * np.log(rho)))


class Turned(Denoiser):
    """A Gaussian's denoiser with the gauge field A (alpha^2 C + sigma^2)^{-1} (x - alpha m)."""

    oracle: oracles.GaussianMixture
    turn: jax.Array

    @property
    def process(self):
        return self.oracle.process

    def covariance(self, t):
        square = self.process.alpha(t) ** 2 * self.oracle.covariances()[0]
        return square + self.process.sigma(t) ** 2 * jnp.eye(len(square))

    def gauge(self, x, t):
        offset = x - self.process.alpha(t) * self.oracle.means[0]
        return self.turn @ jnp.linalg.solve(self.covariance(t), offset)

    def __call__(self, x, t, cond=None, *, key=None):
        sigma, alpha = self.process.sigma(t), self.process.alpha(t)
        return self.oracle(x, t) + sigma**2 / alpha * self.gauge(x, t)


def antisymmetric(size):
    factor = jax.random.normal(jax.random.key(5), (size, size))
    return factor - factor.T


@pytest.mark.parametrize("process", [processes.VP, Half])
def test_dimensions_of_a_gaussian_on_a_subspace(x64, process):
    oracle, _, x0 = planted(process())
    t = low_noise(oracle.process)
    noise = jax.random.normal(KEY, x0.shape)
    x = oracle.process.marginal(x0, noise, t)
    # Signal in units of signal and noise, for each of the three variances.
    share = np.sum(1 / (1 + 1e-6 / np.linspace(0.5, 1.5, 3) ** 2))
    np.testing.assert_allclose(effective(oracle, x, t).value, share, rtol=1e-5)
    clean = on_data(oracle, x0, t)
    np.testing.assert_allclose(clean.value, 3, rtol=1e-4)
    assert clean.standard_error == 0
    assert on_data(oracle, x0 + 0.1, t).value > 100


def test_dimension_and_tangent_space_by_the_spectrum(x64):
    oracle, basis, x0 = planted(Half())
    t = low_noise(oracle.process)
    x = oracle.process.marginal(x0, jax.random.normal(KEY, x0.shape), t)
    for threshold in (0.5, None):
        out = jacobian_dimension(KEY, oracle, x, t, rank=6, threshold=threshold)
        assert int(out.dimension) == 3
        tangent = out.spectrum.right[:3]
        np.testing.assert_allclose(tangent.T @ tangent, basis @ basis.T, atol=1e-4)


def test_effective_dimension_is_the_posterior_variance_in_units_of_the_noise(x64):
    oracle = mixture(processes.VP())
    t, x = jnp.asarray(0.3), jnp.asarray([0.2, -0.1])
    alpha, sigma = oracle.process.alpha(t), oracle.process.sigma(t)
    # Of the mixture's law given x, not by any derivative.
    posterior = oracle.condition(alpha * jnp.eye(2), x, sigma).moments()[1]
    expected = (alpha / sigma) ** 2 * jnp.trace(posterior)
    np.testing.assert_allclose(effective(oracle, x, t).value, expected, rtol=1e-9)
    trace = Hutchinson(4000, "gaussian")
    estimate = effective(oracle, x, t, key=KEY, trace=trace)
    assert abs(estimate.value - expected) < 4 * estimate.standard_error
    assert estimate.standard_error < 0.05 * expected


def test_density_dimension_is_the_slope_of_the_log_density(x64):
    oracle = mixture(processes.VP())
    process, x0 = oracle.process, jnp.asarray([0.2, -0.1])

    def log_density(log_rho):
        t = process.time(-2 * log_rho)
        return oracle.log_prob(process.alpha(t) * x0, t) + 2 * jnp.log(process.alpha(t))

    log_rho = jnp.asarray(-1.0)
    slope = jax.jit(jax.grad(log_density))(log_rho)
    out = on_data(oracle, x0, process.time(-2 * log_rho))
    np.testing.assert_allclose(out.value, 2 + slope, rtol=1e-8)


def test_asymmetry_against_the_dense_matrix(x64):
    size = 20
    dense = jax.random.normal(jax.random.key(1), (size, size)) + jnp.diag(jnp.arange(20.0))
    expected = jnp.sum((dense - dense.T) ** 2) / (2 * jnp.sum(dense**2))
    out = asymmetry(KEY, lambda x: dense @ x, jnp.ones(size), num_probes=1000, chunk=300)
    assert abs(out.value - expected) < 4 * out.standard_error
    assert out.standard_error < 0.03 * expected
    many = jax.jit(jax.vmap(lambda key: asymmetry(key, lambda x: dense @ x, jnp.ones(size)).value))
    spread = np.std(many(jax.random.split(KEY, 200)))
    np.testing.assert_allclose(out.standard_error * np.sqrt(1000 / 8), spread, rtol=0.2)


def test_asymmetry_of_gradients_and_rotations(x64):
    oracle = mixture(processes.VP())
    x = jnp.asarray([0.2, -0.1])
    t = jnp.asarray(0.3)
    exact = asymmetry(KEY, ScaledDenoiser(oracle, t), x)
    assert exact.value < 1e-25
    gradient = asymmetry(KEY, jax.grad(lambda x: oracle.log_prob(x, t) ** 3), x)
    assert gradient.value < 1e-25
    turn = antisymmetric(4)
    rotation = asymmetry(KEY, lambda x: turn @ x, jnp.ones(4))
    np.testing.assert_allclose(rotation.value, 2, rtol=1e-12)
    np.testing.assert_allclose(rotation.standard_error, 0, atol=1e-12)
    triangle = jnp.triu(jnp.ones((4, 4)), 1)
    triangular = asymmetry(KEY, lambda x: triangle @ x, jnp.ones(4), num_probes=4000)
    assert abs(triangular.value - 1) < 4 * triangular.standard_error


def test_a_gauge_field_is_found_and_split_off_exactly(x64):
    oracle = gaussian(processes.VP())
    turned, t = Turned(oracle, 2 * antisymmetric(3)), jnp.asarray(0.4)
    root = jnp.linalg.cholesky(turned.covariance(t))
    # Points with the mean and covariance of the law at t, for which sums are expectations.
    offsets = jnp.sqrt(3.0) * jnp.concatenate([root.T, -root.T])
    points = oracle.process.alpha(t) * oracle.means[0] + offsets

    def potential(params, x, t, cond):
        matrix = jnp.zeros((3, 3)).at[jnp.tril_indices(3)].set(params[:6])
        return x @ matrix @ x + params[6:] @ x

    def loss(params):
        energy = eqx.Partial(potential, params)
        errors = jax.vmap(lambda x: decomposition_error(energy, turned, x, t))(points)
        return errors.mean()

    score = lambda x: oracle.predict(Score(), x, t)

    @jax.jit
    def split(x):
        start = jnp.zeros(9)
        slope, curvature = jax.grad(loss)(start), jax.jacfwd(jax.grad(loss))(start)
        params = start - jnp.linalg.solve(curvature, slope)
        energy = eqx.Partial(potential, params)
        remainder = GaugeField(energy, turned, t)
        residual = gauge_residual(remainder, score, x)
        return jax.grad(energy)(x, t, None), remainder(x), residual, loss(params)

    x = jax.random.normal(KEY, (3,))
    gradient, remainder, residual, left = split(x)
    np.testing.assert_allclose(gradient, score(x), rtol=1e-8)
    np.testing.assert_allclose(remainder, turned.gauge(x, t), rtol=1e-8)
    np.testing.assert_allclose(residual, 0, atol=1e-8)
    # What is left of the loss is the gauge field's own mean square.
    field = jax.vmap(lambda x: turned.gauge(x, t))(points)
    expected = oracle.process.sigma(t) ** 2 * jnp.mean(field**2)
    np.testing.assert_allclose(left, expected, rtol=1e-8)


def test_a_score_is_no_gauge_field(x64):
    dense = jnp.asarray([[2.0, 0.5], [0.5, 1.0]])
    score, x = lambda x: -dense @ x, jnp.asarray([0.4, -0.8])
    # div s + ||s||^2 for s = -P x.
    expected = -3 + np.sum(np.asarray(dense @ x) ** 2)
    np.testing.assert_allclose(gauge_residual(score, score, x), expected, rtol=1e-12)
    estimate = gauge_residual(score, score, x, key=KEY, trace=Hutchinson(4000))
    np.testing.assert_allclose(estimate, expected, atol=4 * 2 * 0.5 * 2**0.5 / np.sqrt(4000))


def test_a_gauge_field_turns_trajectories_but_not_the_law(x64):
    oracle = gaussian(processes.VP())
    turned = Turned(oracle, antisymmetric(3))
    process = oracle.process
    start, end = jnp.asarray(0.9), jnp.asarray(0.05)
    root = jnp.linalg.cholesky(turned.covariance(start))
    offsets = jnp.sqrt(3.0) * jnp.concatenate([root.T, -root.T])
    points = process.alpha(start) * oracle.means[0] + offsets
    out = jaxdiff.denoise(
        KEY,
        turned,
        points,
        solver=diffrax.Dopri5(),
        times=jnp.stack([start, end]),
        stepsize_controller=diffrax.PIDController(rtol=1e-8, atol=1e-8),
    )
    # A linear flow takes the points' moments to those of the law.
    np.testing.assert_allclose(out.x.mean(0), process.alpha(end) * oracle.means[0], atol=1e-6)
    centred = out.x - out.x.mean(0)
    np.testing.assert_allclose(centred.T @ centred / 6, turned.covariance(end), atol=1e-6)
    straight = jax.vmap(lambda x: oracles.gaussian_flow_map(oracle, x, start, end))(points)
    assert jnp.abs(out.x - straight).max() > 0.1


def test_a_gauge_field_misleads_the_count_of_dimensions(x64):
    oracle, _, x0 = planted(processes.VP(), 6, 2)
    # Without the field the count is right: see above.
    turned = Turned(oracle, 2 * antisymmetric(6))
    t = low_noise(oracle.process)
    x = oracle.process.marginal(x0, jax.random.normal(KEY, x0.shape), t)
    assert asymmetry(KEY, ScaledDenoiser(turned, t), x).value > 0.1
    assert int(jacobian_dimension(KEY, turned, x, t, rank=6).dimension) > 2
    # Its trace has none of it.
    np.testing.assert_allclose(effective(turned, x, t).value, 2, rtol=1e-4)


def test_errors():
    oracle, _, x = planted(processes.VP())
    with pytest.raises(ValueError, match="`key` must be given to Hutchinson"):
        effective_dimension(oracle, x, 0.1, trace=Hutchinson())
    with pytest.raises(ValueError, match="`rank` must be at least 2 to count by the largest gap"):
        jacobian_dimension(KEY, oracle, x, 0.1, rank=1, threshold=None)
    with pytest.raises(ValueError, match=r"`f` must be a vector field.* 10 inputs and 3 outputs"):
        asymmetry(KEY, lambda x: x[:3], x)
    with pytest.raises(ValueError, match="`num_probes` must be at least 1, got 0"):
        asymmetry(KEY, lambda x: x, x, num_probes=0)
