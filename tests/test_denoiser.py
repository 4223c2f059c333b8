import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import gaussian, mixture

import jaxdiff
from jaxdiff import oracles, predictions, processes
from jaxdiff.predictions import Eps


def zero_network(x, label, cond=None, *, key=None):
    return jnp.zeros_like(x)


def test_edm_preconditioning_is_the_published_one(x64):
    """c_skip, c_out, c_in and c_noise of table 1 of arXiv 2206.00364."""
    seen = {}

    def network(x, label, cond, key):
        seen.update(x=x, label=label)
        return jnp.full_like(x, 2.0)

    denoiser = jaxdiff.NetworkDenoiser(
        network, processes.EDM(), predictions.F(0.5), jaxdiff.LogNoiseLabel(0.5)
    )
    x, sigma = jnp.asarray([1.0, -3.0]), jnp.asarray(1.7)
    total = sigma**2 + 0.25
    expected = 0.25 / total * x + sigma * 0.5 / np.sqrt(total) * 2.0
    np.testing.assert_allclose(denoiser(x, sigma), expected, rtol=1e-12)
    np.testing.assert_allclose(seen["x"], x / np.sqrt(total), rtol=1e-12)
    np.testing.assert_allclose(seen["label"], np.log(1.7) / 4, rtol=1e-12)


def test_a_zero_network_under_edm_is_exact_for_unstructured_data(x64):
    """F = 0 is optimal for N(0, sigma_data^2 I), for every process."""
    for process in (processes.EDM(), processes.VP(), processes.RectifiedFlow()):
        denoiser = jaxdiff.NetworkDenoiser(zero_network, process, predictions.F(0.5))
        oracle = oracles.gaussian(process, jnp.zeros(3), 0.25 * jnp.eye(3))
        t, x = process.time(jnp.asarray(0.3)), jnp.asarray([0.2, -1.0, 3.0])
        np.testing.assert_allclose(denoiser(x, t), oracle(x, t), rtol=1e-10)


def test_labels_of_a_table_are_its_timesteps(x64):
    process = processes.Tabulated(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    label = jaxdiff.TimeLabel(factor=1000.0, shift=-1.0)
    np.testing.assert_allclose(label.label(process, jnp.asarray([0.001, 1.0])), [0, 999], atol=1e-9)


def test_a_network_in_any_parameterisation_recovers_the_oracle(x64):
    oracle = mixture(processes.VP())
    t, x = jnp.asarray(0.4), jnp.asarray([0.5, -0.3])
    for prediction in (predictions.X0(), Eps(), predictions.V(), predictions.Score()):

        def network(x, label, cond, key, prediction=prediction):
            return oracle.predict(prediction, x, label / 1000)

        denoiser = jaxdiff.NetworkDenoiser(network, oracle.process, prediction)
        np.testing.assert_allclose(denoiser(x, t), oracle(x, t), rtol=1e-9)


def test_clipping_and_thresholding():
    process = processes.VP()

    def network(x, label, cond, key):
        return jnp.linspace(-4.0, 4.0, 9)

    base = jaxdiff.NetworkDenoiser(network, process, predictions.X0())
    x, t = jnp.zeros(9), jnp.asarray(0.5)
    np.testing.assert_array_equal(jaxdiff.Clipped(base)(x, t), [-1, -1, -1, -1, 0, 1, 1, 1, 1])
    # |x0| has the values 0, 1, 1, 2, 2, 3, 3, 4, 4; its median is 2.
    median = jaxdiff.DynamicThresholding(base, quantile=0.5)(x, t)
    np.testing.assert_allclose(median, [-1, -1, -1, -0.5, 0, 0.5, 1, 1, 1])
    # Inside [-1, 1] nothing changes.
    small = jaxdiff.NetworkDenoiser(
        lambda *a, **k: 0.1 * network(*a, **k), process, predictions.X0()
    )
    np.testing.assert_array_equal(jaxdiff.DynamicThresholding(small)(x, t), small(x, t))


def test_a_network_of_the_wrong_shape_is_named():
    denoiser = jaxdiff.NetworkDenoiser(lambda x, t, cond, key: x[:1], processes.VP())
    with pytest.raises(ValueError, match=r"shape \(3,\), got \(1,\)"):
        denoiser(jnp.zeros(3), jnp.asarray(0.5))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtype_is_kept_under_x64(x64, dtype):
    oracle = gaussian(processes.VP())
    denoiser = jaxdiff.NetworkDenoiser(zero_network, oracle.process)
    x, t = jnp.ones(3, dtype), jnp.asarray(0.5, jnp.float32)
    for d in (denoiser, jaxdiff.Clipped(denoiser), jaxdiff.DynamicThresholding(denoiser), oracle):
        assert d(x, t).dtype == dtype


def test_predict_is_the_inverse_of_the_denoiser(x64):
    oracle = gaussian(processes.Cosine())
    x, t = jax.random.normal(jax.random.key(0), (3,)), jnp.asarray(0.3)
    eps = oracle.predict(Eps(), x, t)
    alpha, sigma = oracle.process.alpha(t), oracle.process.sigma(t)
    np.testing.assert_allclose(alpha * oracle(x, t) + sigma * eps, x, rtol=1e-12)
