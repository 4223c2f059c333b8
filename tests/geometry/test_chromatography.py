import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PROCESSES

from jaxdiff import oracles, processes
from jaxdiff.geometry._chromatography import (
    adjusted_time,
    band_power,
    chromatogram,
    coarse_state,
    downsample,
    generation_rate,
    relative_power,
    signal_fraction,
)
from jaxdiff.geometry._frequency import ring_frequencies

SIDE = 8


def fourier():
    """The unitary transform of an image as a matrix, and the ring of each coefficient."""
    eye = np.eye(SIDE * SIDE).reshape(-1, SIDE, SIDE)
    matrix = np.fft.fft2(eye, norm="ortho").reshape(SIDE * SIDE, -1).T
    cycles = np.fft.fftfreq(SIDE, 1 / SIDE)
    rings = np.rint(np.hypot(cycles[:, None], cycles)).astype(int).ravel()
    return matrix, rings


def field():
    """The covariance of a Gaussian field whose spectrum falls as a power, and that spectrum."""
    matrix, rings = fourier()
    power = 4.0 * (1.0 + np.arange(rings.max() + 1)) ** -2.5
    return (matrix.conj().T * power[rings] @ matrix).real, power


def test_signal_fraction_is_that_of_the_gaussian_denoiser(x64):
    covariance, power = field()
    matrix, rings = fourier()
    process = processes.VP()
    oracle = oracles.gaussian(process, jnp.zeros(SIDE * SIDE), jnp.asarray(covariance))
    t = process.time(jnp.asarray(0.7))
    response = jax.jacfwd(lambda x: oracle(x, t))(jnp.zeros(SIDE * SIDE))
    noisy = process.alpha(t) ** 2 * covariance + process.sigma(t) ** 2 * np.eye(SIDE * SIDE)
    spectrum = np.diag(matrix @ (response @ noisy @ response.T) @ matrix.conj().T).real
    expected = spectrum / power[rings]
    np.testing.assert_allclose(
        signal_fraction(process, jnp.asarray(power), t)[rings], expected, rtol=1e-9
    )


def test_rates_integrate_to_what_was_generated(x64):
    power = jnp.asarray([1e-2, 1.0, 30.0])
    process = processes.VP()
    ends = process.time(jnp.asarray([9.0, -9.0]))
    nodes, weights = np.polynomial.legendre.leggauss(400)
    log_snr = jnp.asarray(9.0 * nodes)
    t = process.time(log_snr)
    rates = jax.jit(generation_rate)(process, power, t)
    # Quadrature in log snr.
    slope = -1 / jax.vmap(jax.grad(process.log_snr))(t)
    total = (9.0 * weights * slope) @ rates
    known = signal_fraction(process, power, ends)
    np.testing.assert_allclose(total, known[0] - known[1], rtol=1e-8)
    np.testing.assert_allclose(total[1], 1, atol=1e-3)
    peak = jnp.asarray(process.time(-jnp.log(power)))
    per_log_snr = jnp.diag(generation_rate(process, power, peak))
    per_log_snr /= -jax.vmap(jax.grad(process.log_snr))(peak)
    np.testing.assert_allclose(per_log_snr, 0.25, rtol=1e-8)


def test_chromatogram_is_one_for_all_processes_and_never_underflows():
    power = jnp.asarray([1e-3, 1.0, 1e3])
    log_snr = jnp.linspace(-8, 8, 9)
    shares = [
        chromatogram(process, power, process.time(log_snr))
        for process in (processes.VP(), processes.TrigFlow())
    ]
    np.testing.assert_allclose(shares[0], shares[1], atol=2e-4)
    np.testing.assert_allclose(shares[0].sum(-1), 1, rtol=1e-6)
    # Coarse, strong bands first.
    np.testing.assert_array_equal(shares[0].argmax(-1)[jnp.asarray([0, 4, 8])], [2, 1, 0])
    rates = generation_rate(processes.VP(), power, processes.VP().time(log_snr))
    np.testing.assert_allclose(rates / rates.sum(-1, keepdims=True), shares[0], atol=1e-5)
    extreme = chromatogram(processes.EDM(), power * 1e-30, jnp.asarray(80.0))
    np.testing.assert_allclose(extreme, [1e-6, 1e-3, 1], rtol=2e-3)


@pytest.mark.parametrize("name", ["VP", "EDM", "RectifiedFlow", "Cosine"])
def test_coarse_state_has_the_law_of_the_process(x64, name):
    """Signal and noise of c D_m[x_t], exactly, against those of the process at tau."""
    process, factor, power = PROCESSES[name](), 2, 0.6
    t = process.time(jnp.asarray(0.5))
    image = jax.random.normal(jax.random.key(0), (SIDE, SIDE, 1))
    signal, tau = coarse_state(process, process.alpha(t) * image, t, factor, power)
    coarse = image.reshape(4, 2, 4, 2, 1).mean((1, 3))
    expected = process.alpha(tau) * coarse / power**0.5
    np.testing.assert_allclose(signal, expected, rtol=1e-9)

    def noise(eps):
        return coarse_state(process, process.sigma(t) * eps, t, factor, power)[0].ravel()

    matrix = jax.jacfwd(noise)(jnp.zeros((SIDE, SIDE, 1))).reshape(16, -1)
    expected = process.sigma(tau) ** 2 * np.eye(16)
    np.testing.assert_allclose(matrix @ matrix.T, expected, atol=1e-9)
    assert tau < t


def test_powers_of_data_known_in_closed_form(x64):
    covariance, power = field()
    root = np.linalg.cholesky(covariance)
    draws = np.random.default_rng(0).normal(size=(4000, SIDE * SIDE))
    images = jnp.asarray(0.3 + draws @ root.T).reshape(-1, SIDE, SIDE, 1)
    found = jax.jit(band_power)(images)
    assert len(found) == len(ring_frequencies(SIDE, SIDE))
    np.testing.assert_allclose(found, power, rtol=0.1)
    blocks = np.kron(np.eye(4), np.full((1, 2), 0.5))
    mean = np.kron(blocks, blocks)
    expected = np.trace(mean @ covariance @ mean.T) / 16 / (np.trace(covariance) / 64)
    np.testing.assert_allclose(relative_power(images, 2), expected, rtol=0.02)
    # White noise is as noisy at every resolution; what is constant gains the whole factor.
    white = jnp.asarray(draws).reshape(images.shape)
    np.testing.assert_allclose(relative_power(white, 4), 1 / 16, rtol=0.05)
    constant = jnp.broadcast_to(white[:, :1, :1], white.shape)
    np.testing.assert_allclose(relative_power(constant, 4), 1, rtol=1e-12)
    process, t = processes.VP(), jnp.asarray(0.4)
    np.testing.assert_allclose(adjusted_time(process, t, 4, 1 / 16), t, rtol=1e-9)
    shift = process.log_snr(adjusted_time(process, t, 2, 1.0)) - process.log_snr(t)
    np.testing.assert_allclose(shift, np.log(4), rtol=1e-9)


def test_factors_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="divide"):
        downsample(jnp.zeros((8, 8, 1)), 3)
    with pytest.raises(ValueError, match="two"):
        band_power(jnp.zeros((1, 8, 8, 1)))
