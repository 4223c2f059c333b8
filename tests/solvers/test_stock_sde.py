"""Stock SDE solvers on the additive-noise form: strong orders, laws, and adaptive steps."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import gaussian, times_at

import jaxdiff
from jaxdiff import oracles, processes, solvers
from jaxdiff.solvers._base import GridSteps

SRK = {"ShARK": diffrax.ShARK(), "SRA1": diffrax.SRA1(), "SEA": diffrax.SEA()}


def solve(solver, steps, oracle, x):
    """Equal steps in lambda on the Brownian tree, whose path does not depend on them."""
    times = times_at(oracle.process, -3.0, 3.0, 2)
    # Rounding may put the end of the solve beyond this one.
    controller = GridSteps(jnp.linspace(-1.5, 1.5 + 1e-9, steps + 1))
    key = jax.random.key(0)
    return jaxdiff.denoise(
        key, oracle, x, solver=solver, times=times, stepsize_controller=controller
    )


def problem():
    return gaussian(processes.VP()), jax.random.normal(jax.random.key(1), (64, 3))


@functools.cache
def finely(stock):
    return solve(solvers.ReverseSDE(stock()), 1024, *problem()).x


@pytest.mark.parametrize(
    ("stock", "order"),
    [(diffrax.Euler(), 1), (SRK["SEA"], 1), (SRK["ShARK"], 1.5), (SRK["SRA1"], 1.5)],
)
def test_strong_order_on_one_brownian_path(x64, stock, order):
    oracle, x = problem()
    # A tree of increments alone is another path than one with Levy areas.
    finest = stock if isinstance(stock, diffrax.Euler) else SRK["ShARK"]
    reference = finely(type(finest))
    errors = [
        np.sqrt(np.mean((solve(solvers.ReverseSDE(stock), n, oracle, x).x - reference) ** 2))
        for n in (64, 128)
    ]
    # On a linear drift the error of order 2 of the ODE may dominate still.
    assert np.log2(errors[0] / errors[1]) > order - 0.15, errors


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_law_of_a_gaussian(eta):
    process = processes.RectifiedFlow()
    oracle = oracles.gaussian(process, jnp.asarray([0.4, -1.0]), jnp.diag(jnp.asarray([0.3, 1.5])))
    times, count = times_at(process, -6.0, 5.0, 51), 20_000
    ends = times[jnp.asarray([0, -1])]
    alpha, sigma = process.alpha(ends), process.sigma(ends)
    mean, variance = oracle.means[0], jnp.diagonal(oracle.covariances()[0])
    normal = jax.random.normal(jax.random.key(2), (count, 2))
    x = alpha[0] * mean + jnp.sqrt(alpha[0] ** 2 * variance + sigma[0] ** 2) * normal
    solver = solvers.ReverseSDE(SRK["ShARK"], eta)
    x = jaxdiff.denoise(jax.random.key(3), oracle, x, solver=solver, times=times).x
    exact = alpha[1] ** 2 * variance + sigma[1] ** 2
    error = np.sqrt(exact / count)
    np.testing.assert_array_less(np.abs(x.mean(0) - alpha[1] * mean), 4 * error)
    np.testing.assert_array_less(np.abs(x.var(0) / exact - 1), 4 * np.sqrt(2 / count) + 0.005)


def test_without_noise_it_is_the_ode(x64):
    oracle = gaussian(processes.EDM())
    times = times_at(oracle.process, -3.0, 3.0, 401)
    x = jnp.asarray([[1.0, -0.5, 0.7]])
    solver = solvers.ReverseSDE(SRK["ShARK"], 0.0)
    found = jaxdiff.denoise(jax.random.key(0), oracle, x, solver=solver, times=times).x[0]
    exact = oracles.gaussian_flow_map(oracle, x[0], times[0], times[-1])
    np.testing.assert_allclose(found, exact, rtol=1e-4)


def test_adaptive_steps_follow_the_same_path(x64):
    """The Brownian tree does not depend on the steps: tighter tolerances approach the path."""
    oracle = gaussian(processes.VP())
    x = jax.random.normal(jax.random.key(1), (8, 3))
    times = times_at(oracle.process, -3.0, 3.0, 2)
    run = lambda tol: jaxdiff.denoise(
        jax.random.key(0),
        oracle,
        x,
        solver=solvers.ReverseSDE(SRK["ShARK"]),
        times=times,
        stepsize_controller=diffrax.PIDController(tol, tol, dtmin=1e-3),
    )
    reference = solve(solvers.ReverseSDE(SRK["ShARK"]), 1024, oracle, x).x
    errors = [np.abs(run(tol).x - reference).max() for tol in (1e-1, 1e-3)]
    assert errors[1] < 1e-2 < errors[0]


def test_wrong_solvers_are_named():
    with pytest.raises(TypeError, match=r"diffrax.Euler\(\), EulerHeun\(\).*got Tsit5"):
        solvers.ReverseSDE(diffrax.Tsit5())
    with pytest.raises(ValueError, match="must be deterministic to invert"):
        oracle = gaussian(processes.VP())
        jaxdiff.invert(oracle, jnp.ones((1, 3)), solver=solvers.ReverseSDE(SRK["SEA"]))
