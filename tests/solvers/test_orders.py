"""Every deterministic solver reaches the exact Gaussian flow map at its order."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PROCESSES, bimodal, gaussian, quantile_error, times_at

import jaxdiff
from jaxdiff import oracles, solvers

ORDERS = {
    "DDIM": (solvers.DDIM(), 1),
    "EDMHeun": (solvers.EDMHeun(), 2),
    "Euler": (diffrax.Euler(), 1),
    "Heun": (diffrax.Heun(), 2),
    "Bosh3": (diffrax.Bosh3(), 3),
}
CASES = [(name, "VP") for name in ORDERS] + [
    (name, process)
    for name in ("DDIM", "EDMHeun", "Bosh3")
    for process in ("EDM", "RectifiedFlow", "SubVP")
]


def error(solver, oracle, steps, *, inverting=False):
    times = times_at(oracle.process, -3.0, 3.0, steps + 1)
    x = jax.random.normal(jax.random.key(1), (4, 3))
    if inverting:
        times = times[::-1]
        out = jaxdiff.invert(oracle, x, solver=solver, times=times)
    else:
        out = jaxdiff.denoise(jax.random.key(0), oracle, x, solver=solver, times=times)
    exact = jax.vmap(lambda x: oracles.gaussian_flow_map(oracle, x, times[0], times[-1]))(x)
    return np.abs(out.x - exact).max()


@pytest.mark.parametrize(("name", "process"), CASES)
def test_order_on_the_gaussian_flow_map(x64, name, process):
    solver, order = ORDERS[name]
    oracle = gaussian(PROCESSES[process]())
    errors = [error(solver, oracle, steps) for steps in (40, 80)]
    assert abs(np.log2(errors[0] / errors[1]) - order) < 0.15


# On a mixture, whose flow on the line keeps quantiles; order 3 of the midpoint rule on Gaussians
# is a coincidence.
ON_THE_LINE = {
    "DDIM": (solvers.DDIM(), 1),
    "EDMHeun": (solvers.EDMHeun(), 2),
    "DPM-Solver-3": (solvers.DPMSolver(3), 3),
    "DPM-Solver++2M": (solvers.DPMSolverMultistep(2), 2),
    "BDIA, gamma=1": (solvers.BDIA(), 2),
    "BDIA, gamma=0.5": (solvers.BDIA(0.5), 1),
    "EDICT": (solvers.EDICT(), 1),
    "diffrax.Euler": (diffrax.Euler(), 1),
    "diffrax.Midpoint": (diffrax.Midpoint(), 2),
    "diffrax.Heun": (diffrax.Heun(), 2),
    "diffrax.Bosh3": (diffrax.Bosh3(), 3),
}


@pytest.mark.parametrize("name", ON_THE_LINE)
def test_order_on_the_flow_of_a_mixture(x64, name):
    solver, order = ON_THE_LINE[name]
    oracle = bimodal(PROCESSES["VP"]())
    errors = [quantile_error(solver, oracle, steps) for steps in (80, 160)]
    assert abs(np.log2(errors[0] / errors[1]) - order) < 0.15


def test_midpoint_in_the_stock_variables_is_that_of_the_rectified_flow(x64):
    """On a rectified flow they are its own: dx/dt = eps - x0 in t."""
    oracle = bimodal(PROCESSES["RectifiedFlow"]())
    times = jnp.linspace(0.9, 0.1, 9)
    x = jnp.asarray([[0.7]])
    found = jaxdiff.denoise(jax.random.key(0), oracle, x, solver=diffrax.Midpoint(), times=times)
    velocity = lambda x, t: (x - oracle(x, t)) / t
    y = x[0]
    for t, s in zip(times[:-1], times[1:], strict=True):
        middle = y + (s - t) / 2 * velocity(y, t)
        y = y + (s - t) * velocity(middle, (t + s) / 2)
    np.testing.assert_allclose(found.x[0], y, rtol=1e-12)


@pytest.mark.parametrize("name", ["DDIM", "EDMHeun", "Heun"])
def test_inversion_has_the_same_order(x64, name):
    solver, order = ORDERS[name]
    oracle = gaussian(PROCESSES["VP"]())
    errors = [error(solver, oracle, steps, inverting=True) for steps in (40, 80)]
    assert abs(np.log2(errors[0] / errors[1]) - order) < 0.15


@pytest.mark.parametrize("process", PROCESSES)
def test_euler_in_the_stock_variables_is_ddim(x64, process):
    oracle = gaussian(PROCESSES[process]())
    times = times_at(oracle.process, -2.0, 5.0, 9)
    x = jax.random.normal(jax.random.key(1), (2, 3))
    ddim = jaxdiff.denoise(jax.random.key(0), oracle, x, times=times)
    euler = jaxdiff.denoise(jax.random.key(0), oracle, x, times=times, solver=diffrax.Euler())
    np.testing.assert_allclose(ddim.x, euler.x, rtol=1e-11, atol=1e-11)


def test_adaptive_steps_reach_their_tolerance(x64):
    oracle = gaussian(PROCESSES["RectifiedFlow"]())
    x = jax.random.normal(jax.random.key(1), (3, 3))
    times = jnp.asarray([0.9999, 1e-4])
    out = jaxdiff.denoise(
        jax.random.key(0),
        oracle,
        x,
        solver=diffrax.Tsit5(),
        times=times,
        stepsize_controller=diffrax.PIDController(rtol=1e-8, atol=1e-8),
    )
    exact = jax.vmap(lambda x: oracles.gaussian_flow_map(oracle, x, times[0], times[-1]))(x)
    np.testing.assert_allclose(out.x, exact, atol=1e-6)
    assert np.all(np.asarray(out.nfe) > 20)


def test_last_step_to_zero_returns_the_denoiser(x64):
    oracle = gaussian(PROCESSES["VP"]())
    x = jax.random.normal(jax.random.key(1), (2, 3))
    for solver in (solvers.DDIM(), solvers.EDMHeun(), solvers.Ancestral(1.0)):
        out = jaxdiff.denoise(
            jax.random.key(0), oracle, x, solver=solver, times=jnp.asarray([0.4, 0.0])
        )
        np.testing.assert_allclose(out.x, jax.vmap(lambda x: oracle(x, 0.4))(x), rtol=1e-12)
        assert np.all(np.asarray(out.nfe) == 1)
