import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.geometry._frequency import (
    low_frequency_fraction,
    mean_frequency,
    power_spectral_density,
    ring_energy,
    ring_frequencies,
    ring_sizes,
)


def wave(height, width, cycles):
    """A plane wave of so many cycles along each axis, in two channels."""
    y, x = np.mgrid[:height, :width]
    phase = 2 * np.pi * (cycles[0] * y / height + cycles[1] * x / width)
    return np.stack([np.cos(phase), 0.5 * np.sin(phase + 0.3)], -1)


@pytest.mark.parametrize("shape", [(16, 16), (12, 20)])
def test_plane_waves_land_in_their_ring(x64, shape):
    cycles = [(0, 1), (3, 0), (3, 4), (-2, 5), (5, -5)]
    waves = jnp.asarray([wave(*shape, c) for c in cycles])
    frequency = [np.hypot(c[0] / shape[0], c[1] / shape[1]) for c in cycles]
    np.testing.assert_allclose(mean_frequency(waves), frequency, rtol=1e-10)
    density = jax.jit(power_spectral_density)(waves)
    np.testing.assert_allclose(density.sum(-1), 1, rtol=1e-12)
    nearest = np.abs(ring_frequencies(*shape) - np.asarray(frequency)[:, None]).argmin(1)
    np.testing.assert_allclose(density[np.arange(5), nearest], 1, rtol=1e-10)
    for cut in (0.2, 1.0):
        expected = np.less(frequency, cut)
        np.testing.assert_allclose(low_frequency_fraction(waves, cut), expected, atol=1e-10)


def test_energy_is_the_squared_norm(x64):
    directions = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 9, 14, 3)))
    energy = ring_energy(directions)
    assert energy.shape == (2, 3, len(ring_frequencies(9, 14)))
    np.testing.assert_allclose(energy.sum(-1), (directions**2).sum((-3, -2, -1)), rtol=1e-12)
    assert ring_sizes(9, 14).min() > 0 and ring_sizes(9, 14).sum() == 9 * 14
    constant = ring_energy(jnp.ones((9, 14, 1)))
    np.testing.assert_allclose(constant[0], 9 * 14, rtol=1e-12)


def test_white_noise_is_flat():
    noise = jax.random.normal(jax.random.key(0), (400, 16, 16, 2))
    density = power_spectral_density(noise)
    assert density.dtype == jnp.float32
    rings = density.shape[1]
    error = density.std(0) / 400**0.5
    assert np.all(np.abs(density.mean(0) - 1 / rings) < 4 * error)
    assert error.max() < 0.1 / rings
    # The mean distance of a unit square's points from its centre.
    np.testing.assert_allclose(mean_frequency(noise).mean(), 0.3826, rtol=0.01)


def test_flat_activations_are_refused():
    with pytest.raises(ValueError, match="H, W, C"):
        mean_frequency(jnp.ones((3, 4)))
