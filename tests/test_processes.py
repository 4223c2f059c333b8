import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PROCESSES

from jaxdiff import processes
from jaxdiff._tree import derivative

every_process = pytest.mark.parametrize("make", PROCESSES.values(), ids=PROCESSES.keys())


@every_process
def test_log_snr_and_its_inverse_agree(x64, make):
    process = make()
    t = jnp.linspace(process.t_min, process.t_max, 501)
    expected = 2 * (jnp.log(process.alpha(t)) - jnp.log(process.sigma(t)))
    log_snr = process.log_snr(t)
    np.testing.assert_allclose(log_snr, expected, rtol=1e-10, atol=1e-10)
    assert np.all(np.diff(log_snr) < 0)
    np.testing.assert_allclose(process.time(log_snr), t, rtol=1e-10, atol=1e-13)
    # The generic inverse needs nothing but alpha and sigma.
    np.testing.assert_allclose(
        processes.GaussianProcess.unbounded_time(process, log_snr), t, rtol=1e-10, atol=1e-13
    )


@every_process
def test_drift_and_diffusion_carry_the_marginals(x64, make):
    """The SDE's moment equations: m' = f m and (s^2)' = 2 f s^2 + g^2."""
    process = make()
    # Away from the nodes of a table, where its derivative jumps.
    t = jnp.linspace(process.t_min, process.t_max, 38)[1:-1]
    f, g = process.drift(t), process.diffusion(t)
    np.testing.assert_allclose(f * process.alpha(t), derivative(process.alpha, t), atol=1e-12)
    variance_slope = derivative(lambda t: process.sigma(t) ** 2, t)
    scale = 1 + np.abs(2 * f * process.sigma(t) ** 2)
    np.testing.assert_allclose(
        (2 * f * process.sigma(t) ** 2 + g**2) / scale,
        variance_slope / scale,
        rtol=1e-10,
        atol=1e-10,
    )


@every_process
def test_unit_time_grows_from_data_to_noise(x64, make):
    process = make()
    t = jnp.linspace(0.0, process.t_max, 101)
    u = process.unit_time(t)
    assert u[0] == 0 and np.all(np.diff(u) > 0) and 0.98 < u[-1] <= 1
    if process.horizon == 1:
        np.testing.assert_array_equal(u, t)


def test_unit_time_of_angles_and_noise_levels(x64):
    """TrigFlow's angle over a right one; EDM's is the time at which Cosine is as noisy."""
    t = jnp.linspace(0.01, 0.99, 50)
    assert processes.TrigFlow().unit_time(jnp.pi / 4) == 0.5
    cosine = processes.Cosine()
    levels = cosine.sigma(t) / cosine.alpha(t)
    np.testing.assert_allclose(processes.EDM().unit_time(levels), t, rtol=1e-12)


def test_drift_and_diffusion_match_their_published_forms(x64):
    t = jnp.linspace(0.01, 0.99, 50)
    beta = 0.1 + 19.9 * t
    integral = 0.1 * t + 19.9 * t**2 / 2
    vp, subvp = processes.VP(), processes.SubVP()
    for process in (vp, subvp):
        np.testing.assert_allclose(process.drift(t), -beta / 2, rtol=1e-10)
    np.testing.assert_allclose(vp.diffusion(t) ** 2, beta, rtol=1e-10)
    np.testing.assert_allclose(
        subvp.diffusion(t) ** 2, beta * (1 - np.exp(-2 * integral)), rtol=1e-10
    )
    ve = processes.VE()
    np.testing.assert_allclose(
        ve.diffusion(t) ** 2, 2 * np.log(50 / 0.01) * (0.01 * 5000**t) ** 2, rtol=1e-10
    )
    np.testing.assert_allclose(processes.EDM().diffusion(t) ** 2, 2 * t, rtol=1e-10)
    flow = processes.RectifiedFlow()
    np.testing.assert_allclose(flow.drift(t), -1 / (1 - t), rtol=1e-10)
    np.testing.assert_allclose(flow.diffusion(t) ** 2, 2 * t / (1 - t), rtol=1e-10)
    cosine = processes.Cosine()
    np.testing.assert_allclose(cosine.alpha(t), np.cos(np.pi * t / 2), rtol=1e-10)
    np.testing.assert_allclose(cosine.drift(t), -np.pi / 2 * np.tan(np.pi * t / 2), rtol=1e-10)


@every_process
def test_everything_is_finite_at_both_ends_in_float32(make):
    process = make()
    for end in (process.t_min, process.t_max):
        t = jnp.float32(end)
        for value in (
            process.alpha(t),
            process.sigma(t),
            process.log_snr(t),
            process.drift(t),
            process.diffusion(t),
            jax.grad(process.log_snr)(t),
        ):
            assert value.dtype == jnp.float32
            assert np.isfinite(value)
        np.testing.assert_allclose(process.time(process.log_snr(t)), t, rtol=2e-3, atol=1e-6)
    assert np.isfinite(process.alpha(0.0)) and np.isfinite(process.sigma(0.0))
    last = min(process.horizon, 1e4)
    assert np.isfinite(process.alpha(last)) and np.isfinite(process.sigma(last))


def test_tabulated_is_exact_at_its_nodes(x64):
    table = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    process = processes.Tabulated(table)
    t = jnp.arange(1, 1001) / 1000
    np.testing.assert_allclose(process.alpha(t) ** 2, table, rtol=1e-12)
    np.testing.assert_allclose(process.sigma(t) ** 2, 1 - table, rtol=1e-12)
    # Constant beta between nodes: alpha^2 is geometric there.
    np.testing.assert_allclose(
        process.alpha(t[:-1] + 0.0005) ** 2, np.sqrt(table[:-1] * table[1:]), rtol=1e-12
    )


@pytest.mark.parametrize("table", [[0.5, 0.6], [1.0, 0.5], [0.5, 0.0], [[0.5]], [], [0.5, np.nan]])
def test_tabulated_rejects_what_is_no_schedule(table):
    with pytest.raises(ValueError, match="alphas_cumprod"):
        processes.Tabulated(table)


def test_inverse_is_differentiable(x64):
    process = processes.VP()
    generic = jax.grad(lambda y: processes.GaussianProcess.unbounded_time(process, y))(0.3)
    np.testing.assert_allclose(generic, jax.grad(process.time)(0.3), rtol=1e-8)


def test_edm_times_are_the_published_grid(x64):
    times = processes.EDM().times(18)
    i = np.arange(18)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(times[:-1], expected, rtol=1e-12)
    assert times[-1] == 0 and times.shape == (19,)
    ending = processes.EDM().times(18, 0.01)
    assert ending.shape == (19,) and ending[-1] == 0.01 and ending[0] == 80
