import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.training import ConstantEMA, PowerEMA, reconstruct_ema, sigma_rel_to_gamma


def track(ema, steps, params=lambda t: jnp.asarray(t, jnp.float64)):
    """Averages after updates 1 .. steps of params(t)."""

    def body(t, averages):
        return ema.update(averages, params(t), t.astype(jnp.float64))

    return jax.lax.fori_loop(1, steps + 1, body, ema.init(params(jnp.asarray(0))))


def test_published_widths():
    """Table of arXiv 2312.02696: sigma_rel 0.05 and 0.10 are gamma 16.97 and 6.94."""
    assert sigma_rel_to_gamma(0.05) == pytest.approx(16.97, abs=5e-3)
    assert sigma_rel_to_gamma(0.10) == pytest.approx(6.94, abs=5e-3)
    gamma = sigma_rel_to_gamma(0.2)
    assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(0.04)
    for wrong in (0.0, 0.3):
        with pytest.raises(ValueError, match="sigma_rel"):
            sigma_rel_to_gamma(wrong)


def test_power_average_of_a_line(x64):
    """theta(u) = u averages to (gamma + 1) / (gamma + 2) t, for long training."""
    averages = track(PowerEMA((0.05, 0.15)), 20_000)
    for average, width in zip(averages, (0.05, 0.15), strict=True):
        gamma = sigma_rel_to_gamma(width)
        np.testing.assert_allclose(average, (gamma + 1) / (gamma + 2) * 20_000, rtol=1e-3)


def test_constant_average_follows_its_recursion(x64):
    (average,) = track(ConstantEMA(0.5), 4)
    value = 0.0
    for t in range(1, 5):
        decay = min(0.5, (1 + t) / (10 + t))
        value = decay * value + (1 - decay) * t
    np.testing.assert_allclose(average, value, rtol=1e-12)


def test_reconstruction_of_a_tracked_profile_is_that_profile(x64):
    """All weight falls on the stored average of the same width and step."""
    one_hot = [
        (step, width, jnp.asarray(float((step, width) == (400, 0.1))))
        for step in (100, 200, 300, 400)
        for width in (0.05, 0.1)
    ]
    np.testing.assert_allclose(reconstruct_ema(one_hot, step=400, sigma_rel=0.1), 1, atol=1e-9)
    constant = [(step, width, jnp.asarray(3.0)) for step, width, _ in one_hot]
    np.testing.assert_allclose(reconstruct_ema(constant, step=400, sigma_rel=0.13), 3, rtol=1e-12)


def test_reconstruction_of_another_width_matches_direct_tracking(x64):
    path = lambda t: jnp.sin(t / 700.0) + t / 4000.0
    snapshots = [
        (step, width, average)
        for step in range(500, 4001, 500)
        for width, average in zip(
            (0.05, 0.1), track(PowerEMA((0.05, 0.1)), step, path), strict=True
        )
    ]
    (direct,) = track(PowerEMA((0.08,)), 4000, path)
    wrong = abs(float(snapshots[-1][2] - direct))
    assert abs(reconstruct_ema(snapshots, step=4000, sigma_rel=0.08) - direct) < wrong / 50


def test_averages_keep_float32_and_structure():
    params = {"a": jnp.ones(3, jnp.float32), "b": [jnp.zeros((2, 2), jnp.float32)]}
    ema = PowerEMA()
    averages = ema.update(ema.init(params), params, jnp.float32(7))
    assert len(averages) == 2
    for average in averages:
        jax.tree.map(np.testing.assert_array_equal, average, params)
        assert {leaf.dtype for leaf in jax.tree.leaves(average)} == {jnp.dtype("float32")}
