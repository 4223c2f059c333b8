"""Stochastic solvers against exact moments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PROCESSES, gaussian, mixture, times_at

import jaxdiff
from jaxdiff import oracles, processes, solvers

STOCHASTIC = {
    "Ancestral": (solvers.Ancestral(), 250),
    "DDIM(1)": (solvers.DDIM(1.0), 250),
    "DDIM(0.5)": (solvers.DDIM(0.5), 250),
    "Churn": (solvers.EDMHeun(s_churn=20.0), 200),
}


@jax.jit
def components(oracle, x):
    return jax.vmap(lambda x: jnp.argmax(oracle._components(x, jnp.float32(0.01))[0]))(x)


@functools.cache
def exactly(process):
    oracle = mixture(PROCESSES[process](), jnp.float32)
    x = jax.jit(jax.vmap(oracle.sample_data))(jax.random.split(jax.random.key(4), 200_000))
    return x, components(oracle, x)


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("process", ["VP", "EDM"])
def test_samples_of_a_mixture_have_its_weights_means_and_covariances(name, process):
    solver, steps = STOCHASTIC[name]
    oracle = mixture(PROCESSES[process](), jnp.float32)
    # Karras's grid for both; the bias of so many steps is below the standard errors tested.
    times = solvers.karras_times(oracle.process, steps)
    count = 20_000
    x = jaxdiff.sample(jax.random.key(3), oracle, (2,), count, solver=solver, times=times).x
    component, (exact, label) = components(oracle, x), exactly(process)
    for k in range(3):
        mine, theirs = np.asarray(x[component == k]), np.asarray(exact[label == k])
        weight = len(theirs) / len(exact)
        standard_error = np.sqrt(weight * (1 - weight) / count)
        assert abs(len(mine) / count - weight) < 4 * standard_error
        spread = np.sqrt(theirs.var(0) * (1 / len(mine) + 1 / len(theirs)))
        assert np.all(np.abs(mine.mean(0) - theirs.mean(0)) < 4 * spread)
        products = [
            (a - theirs.mean(0))[:, :, None] * (a - theirs.mean(0))[:, None] for a in (mine, theirs)
        ]
        spread = np.sqrt(products[1].var(0) * (1 / len(mine) + 1 / len(theirs)))
        assert np.all(np.abs(products[0].mean(0) - products[1].mean(0)) < 4 * spread)


@pytest.mark.parametrize("process", ["VP", "VE", "RectifiedFlow"])
def test_one_ancestral_step_draws_the_exact_posterior(x64, process):
    """q(x_s | x_t, x0) averaged over the noise, from Gaussian conditioning of (x_s, x_t)."""
    process = PROCESSES[process]()
    oracle = oracles.gaussian(process, jnp.zeros(3), 1e-30 * jnp.eye(3))  # x0 is 0, known
    t, s = times_at(process, -1.0, 1.0, 2)
    x = jnp.ones((20_000, 3))
    out = jaxdiff.denoise(
        jax.random.key(0), oracle, x, solver=solvers.Ancestral(), times=jnp.stack([t, s])
    ).x
    # With x0 = 0: cov(x_s, x_t) = (alpha_t / alpha_s) sigma_s^2.
    cross = process.alpha(t) / process.alpha(s) * process.sigma(s) ** 2
    mean = cross / process.sigma(t) ** 2
    variance = process.sigma(s) ** 2 - cross**2 / process.sigma(t) ** 2
    np.testing.assert_allclose(out.mean(), mean, atol=4 * np.sqrt(variance / out.size))
    np.testing.assert_allclose(out.var(), variance, rtol=4 * np.sqrt(2 / out.size))


def test_ddim_with_eta_one_is_ancestral_and_eta_zero_is_ddim(x64):
    oracle = mixture(processes.VP())
    run = lambda solver: (
        jaxdiff.sample(jax.random.key(0), oracle, (2,), 8, solver=solver, times=12).x
    )
    np.testing.assert_allclose(run(solvers.DDIM(1.0)), run(solvers.Ancestral()), rtol=1e-10)
    np.testing.assert_allclose(run(solvers.DDIM(0.0)), run(solvers.DDIM()), rtol=1e-12)
    # Rounding is relative to the states of the whole run, and not to an end near zero.
    found, expected = run(solvers.EDMHeun(s_churn=0.0)), run(solvers.EDMHeun())
    assert np.abs(found - expected).max() < 1e-12 * np.abs(expected).max()


def test_large_variance_is_that_of_the_forward_step(x64):
    process = processes.VP()
    oracle = oracles.gaussian(process, jnp.zeros(3), 1e-30 * jnp.eye(3))
    times = jnp.asarray([0.5, 0.45])
    x = jnp.zeros((20_000, 3))
    out = jaxdiff.denoise(
        jax.random.key(0), oracle, x, solver=solvers.Ancestral(1.0), times=times
    ).x
    ratio = process.alpha(times[0]) / process.alpha(times[1])
    beta = process.sigma(times[0]) ** 2 - ratio**2 * process.sigma(times[1]) ** 2
    np.testing.assert_allclose(out.var(), beta, rtol=4 * np.sqrt(2 / out.size))


def test_mean_of_ancestral_sampling_of_a_gaussian_is_exact_on_any_grid(x64):
    oracle = gaussian(processes.VP())
    times = jnp.asarray([1.0, 0.7, 0.2, 0.05, 0.0])
    mean = oracle.means[0]
    start = oracle.process.alpha(times[0]) * mean
    matrix_free = jaxdiff.denoise(
        jax.random.key(0),
        oracle,
        jnp.stack([start, start]),
        solver=solvers.DDIM(0.0),
        times=times,
    ).x[0]
    np.testing.assert_allclose(matrix_free, mean, rtol=1e-10)
    # The noise enters additively: its expectation is the noiseless path above.
    noisy = jaxdiff.denoise(
        jax.random.key(1),
        oracle,
        jnp.broadcast_to(start, (40_000, 3)),
        solver=solvers.Ancestral(),
        times=times,
    ).x
    standard_error = noisy.std(0) / np.sqrt(len(noisy))
    assert np.all(np.abs(noisy.mean(0) - mean) < 4 * standard_error)
