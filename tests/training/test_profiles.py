"""Averages of weights in float32: lag, warm-up, late rates, and post-hoc profiles of noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.training import ConstantEMA, PowerEMA, reconstruct_ema


def track(ema, trajectory):
    """Averages after each element of a trajectory, beginning at its first."""

    def step(averages, inputs):
        averages = ema.update(averages, *inputs)
        return averages, averages

    counts = jnp.arange(1.0, len(trajectory) + 1)
    return jax.lax.scan(step, ema.init(trajectory[0]), (trajectory, counts))[1]


def test_constant_decay_lags_a_line_by_a_constant():
    # After the warm-up, the average of theta(n) = n trails by decay / (1 - decay).
    (average,) = track(ConstantEMA(0.8), jnp.arange(1.0, 400.0))
    np.testing.assert_allclose(average[-1], 399 - 0.8 / 0.2, rtol=1e-5)


def test_warm_up_forgets_the_initial_weights():
    # Fraction of the initial weights after n updates, by multiplying the decays.
    ones = jnp.concatenate([jnp.ones(1), jnp.zeros(50)])
    (average,) = track(ConstantEMA(0.9999), ones[1:])
    assert average[-1] == 0
    (average,) = track(ConstantEMA(0.9999), ones)
    expected = np.prod([(1 + n) / (10 + n) for n in range(2, 52)])
    np.testing.assert_allclose(average[-1], expected, rtol=1e-4)


@pytest.fixture(scope="module")
def run():
    """A noisy trajectory, its averages of three widths, and snapshots of the first two."""
    n = np.arange(1, 2049)
    noise = np.cumsum(np.random.default_rng(0).normal(size=(2048, 3)), 0) / 50
    trajectory = jnp.asarray(np.sin(n / 300)[:, None] + noise, jnp.float32)
    widths = (0.05, 0.10, 0.075)
    averages = dict(zip(widths, track(PowerEMA(widths), trajectory), strict=True))
    snapshots = [
        (t, width, {"w": averages[width][t - 1]})
        for t in range(256, 2049, 256)
        for width in widths[:2]
    ]
    return trajectory, averages, snapshots


def test_reconstructing_a_stored_profile_returns_it(run):
    _, averages, snapshots = run
    for step, width in ((2048, 0.05), (1024, 0.10)):
        got = reconstruct_ema(snapshots, step=step, sigma_rel=width)["w"]
        np.testing.assert_allclose(got, averages[width][step - 1], rtol=1e-5, atol=1e-6)
        assert got.dtype == jnp.float32


def test_reconstructing_another_profile_approximates_the_tracked_one(run):
    trajectory, averages, snapshots = run
    got = reconstruct_ema(snapshots, step=2048, sigma_rel=0.075)["w"]
    want = averages[0.075][-1]
    between = np.abs(np.asarray(averages[0.05][-1] - averages[0.10][-1]))
    assert np.all(np.abs(got - want) < 0.02 * between)


def test_reconstruction_keeps_what_is_constant(run):
    snapshots = [(t, width, jnp.full((2,), 3.0)) for t, width, _ in run[2]]
    got = reconstruct_ema(snapshots, step=2048, sigma_rel=0.15)
    np.testing.assert_allclose(got, 3.0, rtol=1e-6)
