import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdiff import distillation, networks, predictions, processes
from jaxdiff.denoiser import NetworkDenoiser, TimeLabel

KEY = jax.random.key(0)


def network_denoiser(label):
    network = networks.MLP(2, hidden=16, num_blocks=1, rngs=nnx.Rngs(0))
    for layer in (network.last, network.blocks[0].second):  # which start at zero
        kernel = layer.kernel[...]
        layer.kernel[...] = 0.3 * jax.random.normal(KEY, kernel.shape, kernel.dtype)
    return NetworkDenoiser(network, processes.TrigFlow(), predictions.Velocity(), label)


@pytest.mark.parametrize("factor", [1000.0, 1.0])
def test_the_derivative_by_time_is_that_of_the_label(x64, factor):
    """Of a label of order 1000 it is far above the change over a hundredth."""
    denoiser = network_denoiser(TimeLabel(factor))
    x = jax.random.normal(KEY, (64, 2))
    t = jnp.linspace(0.1, 1.4, 64)
    found = distillation.time_sensitivity(denoiser, x, t, distances=[1e-6, 0.01, 0.04])
    np.testing.assert_allclose(found.differences[0], found.derivative, rtol=1e-5)
    if factor == 1.0:
        np.testing.assert_allclose(found.differences, found.derivative, rtol=0.01)
        assert found.derivative < 5
    else:
        assert found.derivative > 50
        assert np.all(found.derivative > np.asarray([2.5, 10]) * found.differences[1:])
