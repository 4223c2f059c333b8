import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PROCESSES

from jaxdiff import predictions
from jaxdiff.processes import VP, Cosine, RectifiedFlow, Tabulated

PREDICTIONS = [
    predictions.X0(),
    predictions.Eps(),
    predictions.V(),
    predictions.Score(),
    predictions.Velocity(),
    predictions.F(),
]


@pytest.mark.parametrize("make", PROCESSES.values(), ids=PROCESSES.keys())
def test_round_trips_at_every_log_snr(x64, make):
    process = make()
    keys = jax.random.split(jax.random.key(0))
    x0, eps = (jax.random.normal(key, (64,)) for key in keys)
    # A table's time range ends before +-12; beyond it the inverse clips.
    low, high = (-9.5, 9.0) if isinstance(process, Tabulated) else (-12.0, 12.0)

    @jax.jit
    @jax.vmap
    def worst(t):
        x = process.marginal(x0, eps, t)
        outputs = jnp.stack([p.from_x0(process, x, t, x0) for p in PREDICTIONS])
        found = jnp.stack(
            [p.to_x0(process, x, t, o) for p, o in zip(PREDICTIONS, outputs, strict=True)]
        )
        every = []  # from the first prediction to the second and back
        for second in PREDICTIONS:
            there = jax.vmap(lambda x0, p=second: p.from_x0(process, x, t, x0))(found)
            again = jax.vmap(lambda o, p=second: p.to_x0(process, x, t, o))(there)
            back = [p.from_x0(process, x, t, a) for p, a in zip(PREDICTIONS, again, strict=True)]
            every.append(jnp.abs(jnp.stack(back) - outputs).max(-1))
        # The condition number of the worst step, 1/alpha or 1/sigma of unit-scale data.
        return jnp.stack(every) / jnp.maximum(jnp.abs(outputs).max(-1), 1.0)

    found = worst(process.time(jnp.linspace(low, high, 25)))
    assert found.shape == (25, 6, 6) and found.max() < 1e-12, jnp.argmax(found)


@pytest.mark.parametrize("make", PROCESSES.values(), ids=PROCESSES.keys())
def test_outputs_are_what_they_are_called(x64, make):
    process = make()
    x0, eps = jax.random.normal(jax.random.key(1), (2, 16))
    t = process.time(jnp.asarray(0.7))
    x = process.marginal(x0, eps, t)
    alpha, sigma = process.alpha(t), process.sigma(t)
    step = 1e-6
    path = lambda t: process.marginal(x0, eps, t)
    expected = {
        "X0": x0,
        "Eps": eps,
        "V": alpha * eps - sigma * x0,
        "Score": -eps / sigma,
        "Velocity": (path(t + step) - path(t - step)) / (2 * step),
    }
    for prediction in PREDICTIONS[:-1]:
        value = prediction.from_x0(process, x, t, x0)
        np.testing.assert_allclose(value, expected[type(prediction).__name__], rtol=1e-6, atol=1e-6)


def test_f_has_unit_variance_and_vanishes_for_gaussian_data(x64):
    sigma_data = 0.5
    prediction = predictions.F(sigma_data)
    for process in (VP(), RectifiedFlow(), Cosine()):
        t = jnp.linspace(0.01, 0.99, 20)
        alpha, sigma = process.alpha(t), process.sigma(t)
        c_skip, c_out = prediction.coefficients(process, t)
        on_x0, on_eps = (1 - c_skip * alpha) / c_out, c_skip * sigma / c_out
        np.testing.assert_allclose(on_x0**2 * sigma_data**2 + on_eps**2, 1, rtol=1e-12)
        # E[x0 | x_t] of N(0, sigma_data^2) is c_skip x_t: the optimal F is zero.
        optimal = alpha * sigma_data**2 / (alpha**2 * sigma_data**2 + sigma**2)
        np.testing.assert_allclose(c_skip, optimal, rtol=1e-12)
