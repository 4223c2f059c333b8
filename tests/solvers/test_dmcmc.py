"""Denoising MCMC against the exact laws of its chains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import gaussian, mixture

import jaxdiff
from jaxdiff import oracles, processes, solvers
from jaxdiff.solvers import OracleNoisePosterior, langevin_gibbs

LEVELS = np.asarray([0.5, 1.0, 2.0])
LOG_PRIOR = np.log([0.5, 0.3, 0.2])
DATA_VARIANCE = 0.5
VARIANCES = DATA_VARIANCE + LEVELS**2


def grids(process, levels, steps):
    grid = lambda t: solvers.karras_times(process, steps, t_start=t)
    return jax.vmap(grid)(process.time(-2 * jnp.log(levels)))


def unit_oracle(dtype=jnp.float32):
    mean, covariance = jnp.zeros(1, dtype), jnp.full((1, 1), DATA_VARIANCE, dtype)
    return oracles.gaussian(processes.EDM(), mean, covariance)


def run(count, *, seed=0, **options):
    """Last states of `count` independent chains that start far from stationary: y = 3, k = 2."""
    oracle = unit_oracle()
    posterior = OracleNoisePosterior(
        oracle, jnp.asarray(LEVELS, jnp.float32), jnp.asarray(LOG_PRIOR)
    )
    y, level = jnp.full((count, 1), 3.0), jnp.full(count, 2)
    options = dict(keep_every=options["num_steps"]) | options
    states = langevin_gibbs(
        jax.random.key(seed), oracle, posterior, y, level, LEVELS.astype(np.float32), **options
    )
    return np.asarray(states.y[:, -1, 0], np.float64), np.asarray(states.level_index[:, -1])


def exact_law(step_sizes, *, argmax=False, half_width=12.0, count=1201):
    """Weights and variances of each level in the stationary law, step-size bias included.

    (y, k) -> N((1 - eta_k / (2 V_k)) y, eta_k), then k ~ p(k | y): k does not depend on the past
    given y, so y alone is a Markov chain, whose stationary law solves a linear system on a grid.
    """
    y = np.linspace(-half_width, half_width, count)
    logits = LOG_PRIOR - y[:, None] ** 2 / (2 * VARIANCES) - np.log(VARIANCES) / 2
    level = np.exp(logits - logits.max(1, keepdims=True))
    level = np.eye(3)[logits.argmax(1)] if argmax else level / level.sum(1, keepdims=True)
    move = np.zeros((count, count))
    for k in range(3):
        eta = np.broadcast_to(step_sizes, 3)[k]
        distance = y - (1 - eta / (2 * VARIANCES[k])) * y[:, None]
        kernel = np.exp(-(distance**2) / (2 * eta))
        move += level[:, [k]] * kernel / kernel.sum(1, keepdims=True)
    system = np.vstack([move.T - np.eye(count), np.ones(count)])
    law = np.linalg.lstsq(system, np.append(np.zeros(count), 1.0), rcond=None)[0]
    joint = law[:, None] * level
    return joint.sum(0), (joint * y[:, None] ** 2).sum(0) / joint.sum(0)


def scores(y, level, weights, variances):
    """Deviations from the stated weights and variances, in standard errors."""
    count, result = len(y), []
    for k in range(3):
        mine = y[level == k]
        error = np.sqrt(weights[k] * (1 - weights[k]) / count)
        result.append((len(mine) / count - weights[k]) / error)
        spread = np.std(mine**2) / np.sqrt(len(mine))
        result += [(np.mean(mine**2) - variances[k]) / spread]
        result += [np.mean(mine) / np.sqrt(np.mean(mine**2) / len(mine))]
    return np.asarray(result)


def test_the_noise_posterior_is_bayes_rule_for_every_process(x64):
    for process in (processes.EDM(), processes.VP()):
        oracle = oracles.gaussian(process, jnp.zeros(1), jnp.full((1, 1), DATA_VARIANCE))
        posterior = OracleNoisePosterior(oracle, LEVELS, jnp.asarray(LOG_PRIOR))
        y = jnp.asarray([1.3])
        joint = LOG_PRIOR - 1.3**2 / (2 * VARIANCES) - np.log(VARIANCES) / 2
        expected = np.exp(joint) / np.exp(joint).sum()
        np.testing.assert_allclose(np.exp(posterior(y)), expected, rtol=1e-8)
        uniform = OracleNoisePosterior(oracle, LEVELS)(y)
        np.testing.assert_allclose(
            np.diff(uniform), np.diff(joint - LOG_PRIOR), rtol=1e-6, atol=1e-9
        )


def test_one_level_has_the_closed_form_bias_of_langevin_steps():
    """Variance V / (1 - eta / (4 V)): 33% too large at eta = V."""
    oracle, level, count = unit_oracle(), 0.5, 40_000
    variance = DATA_VARIANCE + level**2
    for eta in (variance, 0.2 * variance):
        states = langevin_gibbs(
            jax.random.key(1),
            oracle,
            lambda y, cond: jnp.zeros(1),
            jnp.full((count, 1), 3.0),
            jnp.zeros(count, int),
            [level],
            step_size=eta,
            num_steps=100,
            keep_every=100,
        )
        expected = variance / (1 - eta / (4 * variance))
        np.testing.assert_allclose(states.y.var(), expected, rtol=4 * np.sqrt(2 / count))


def test_small_steps_have_the_joint_law_prior_times_noised_data():
    """p(k) N(0, S + k^2); eta = 0.04 V_k, whose bias is below half a standard error."""
    step_size = 0.04 * VARIANCES
    weights, variances = exact_law(step_size)
    bias = [weights / np.exp(LOG_PRIOR) - 1, variances / VARIANCES - 1]
    assert np.abs(bias).max() < 0.02
    y, level = run(10_000, step_size=step_size, num_steps=500)
    assert np.abs(scores(y, level, np.exp(LOG_PRIOR), VARIANCES)).max() < 4
    assert np.abs(scores(y, level, weights, variances)).max() < 4


def test_large_steps_have_the_law_of_the_discrete_chain_and_their_bias_is_first_order():
    step_size = 0.8 * VARIANCES
    weights, variances = exact_law(step_size)
    y, level = run(60_000, step_size=step_size, num_steps=60)
    assert np.abs(scores(y, level, weights, variances)).max() < 4
    assert np.abs(scores(y, level, np.exp(LOG_PRIOR), VARIANCES)).max() > 10
    # One eta for all levels is another law, still exact as eta -> 0: Richardson takes it there.
    for base in (VARIANCES, 1.0):
        laws = [np.concatenate(exact_law(eta * base)) for eta in (0.2, 0.1, 0.05)]
        limit = np.concatenate([np.exp(LOG_PRIOR), VARIANCES])
        errors = [np.abs(law / limit - 1).max() for law in laws]
        assert 1.7 < errors[0] / errors[1] < 2.3 and 1.8 < errors[1] / errors[2] < 2.2
        np.testing.assert_allclose(2 * laws[2] - laws[1], limit, rtol=0.1 * errors[2])


def test_the_argmax_is_biased():
    """Its levels partition space: their weights and variances are not those of p(k, y)."""
    step_size = 0.1 * VARIANCES
    weights, variances = exact_law(step_size, argmax=True)
    occupied = weights > 1e-3
    y, level = run(20_000, step_size=step_size, num_steps=300, sample_level=False)
    for k in np.flatnonzero(occupied):
        error = np.sqrt(weights[k] * (1 - weights[k]) / len(y))
        assert abs(np.mean(level == k) - weights[k]) < 4 * error
    error = np.sqrt(np.exp(LOG_PRIOR) * (1 - np.exp(LOG_PRIOR)) / len(y))
    frequencies = np.bincount(level, minlength=3) / len(y)
    assert (np.abs(frequencies - np.exp(LOG_PRIOR)) / error).max() > 20
    # Nothing of y given k is left: within k = 0.5 no state lies far out.
    assert np.abs(y[level == 0]).max() < 3 < 4 * np.sqrt(VARIANCES[0])


def test_every_process_runs_the_same_chain(x64):
    options = dict(step_size=0.1, num_steps=20, keep_every=5)
    y, level = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), jnp.asarray([0, 1, 2, 1])
    states = []
    for process in (processes.EDM(), processes.VP()):
        oracle = gaussian(process)
        posterior = OracleNoisePosterior(oracle, LEVELS)
        states.append(
            langevin_gibbs(jax.random.key(2), oracle, posterior, y, level, LEVELS, **options)
        )
    np.testing.assert_array_equal(states[1].level_index, states[0].level_index)
    np.testing.assert_allclose(states[1].y, states[0].y, rtol=1e-7)
    assert len(np.unique(states[0].level_index)) > 1


def test_a_step_is_the_formula_and_chains_do_not_depend_on_each_other(x64):
    oracle, eta = gaussian(processes.EDM()), jnp.asarray([0.1, 0.2, 0.3])
    posterior = OracleNoisePosterior(oracle, LEVELS)
    y, level = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), jnp.asarray([0, 1, 2, 1])
    run = lambda y, level, steps, **o: langevin_gibbs(
        jax.random.key(2), oracle, posterior, y, level, LEVELS, step_size=eta, num_steps=steps, **o
    )
    every = run(y, level, 12)
    mean, covariance = oracle.means[0], oracle.covariances()[0]
    for i in range(4):
        k, step = LEVELS[level[i]], eta[level[i]]
        score = -jnp.linalg.solve(covariance + k**2 * jnp.eye(3), y[i] - mean)
        chain_key = jax.random.fold_in(jax.random.key(2), i)
        noise_key, _ = jax.random.split(jax.random.fold_in(chain_key, 0))
        expected = y[i] + step / 2 * score + jnp.sqrt(step) * jax.random.normal(noise_key, (3,))
        np.testing.assert_allclose(every.y[i, 0], expected, rtol=1e-10)
    np.testing.assert_allclose(run(y[:2], level[:2], 12).y, every.y[:2], rtol=1e-12)
    # The kernel by itself, driven by somebody else.
    kernel = solvers.LangevinGibbs(oracle, posterior, jnp.asarray(LEVELS), eta)
    state = kernel.init(y[1], level[1])
    for i in range(3):
        chain_key = jax.random.fold_in(jax.random.key(2), 1)
        state = kernel.step(jax.random.fold_in(chain_key, i), state)
        np.testing.assert_allclose(state.y, every.y[1, i], rtol=1e-10)
        assert state.level_index == every.level_index[1, i]
    # What is kept: the last of each four, or the first with the smallest level.
    np.testing.assert_array_equal(run(y, level, 12, keep_every=4).y, every.y[:, 3::4])
    smallest = run(y, level, 12, keep_every=4, keep_smallest=True)
    index = LEVELS[every.level_index].reshape(4, 3, 4).argmin(-1)
    chosen = np.take_along_axis(np.asarray(every.y).reshape(4, 3, 4, 3), index[..., None, None], 2)
    np.testing.assert_array_equal(smallest.y, chosen[:, :, 0])
    assert len(np.unique(index)) > 1


def test_chains_follow_their_conditions(x64):
    """The null label is no condition; another label is another law."""
    oracle = mixture(processes.EDM())
    posterior = OracleNoisePosterior(oracle, LEVELS)
    y, level = jnp.zeros((2, 2)), jnp.zeros(2, int)
    run = lambda cond: langevin_gibbs(
        jax.random.key(9), oracle, posterior, y, level, LEVELS,
        step_size=0.2, num_steps=5, cond=cond,
    ).y  # fmt: skip
    conditioned, free = run(jnp.asarray([2, 0])), run(None)
    np.testing.assert_allclose(conditioned[0], free[0], rtol=1e-12)
    assert np.abs(conditioned[1] - free[1]).max() > 0.01


def test_each_state_is_carried_from_its_own_level_to_the_data(x64):
    """Against the exact flow of a Gaussian, inside jit, with a multistep solver's own plans."""
    process = processes.VP()
    oracle = gaussian(process)
    y = jax.random.normal(jax.random.key(3), (3, 3))
    levels = jnp.asarray(LEVELS)

    times = grids(process, levels, 60)
    x = process.alpha(times[:, :1]) * y
    solver = solvers.DPMSolverMultistep()
    solution = jaxdiff.denoise(jax.random.key(0), oracle, x, solver=solver, times=times)
    flow = lambda x, t: oracles.gaussian_flow_map(oracle, x, t, jnp.asarray(0.0))
    np.testing.assert_allclose(solution.x, jax.jit(jax.vmap(flow))(x, times[:, 0]), atol=3e-3)
    np.testing.assert_array_equal(solution.nfe, 60)
    np.testing.assert_allclose(np.exp(-process.log_snr(times[:, 0]) / 2), LEVELS, rtol=1e-8)


def test_samples_of_a_mixture_have_its_weights_and_means():
    """All chains start in one mode; they reach the others through the larger levels."""
    oracle = mixture(processes.EDM(), jnp.float32)
    levels, count = jnp.asarray([0.15, 0.4, 1.0, 2.5]), 4000
    y = jnp.broadcast_to(oracle.means[0], (count, 2))
    posterior = OracleNoisePosterior(oracle, levels)
    states = langevin_gibbs(
        jax.random.key(6),
        oracle,
        posterior,
        y,
        jnp.zeros(count, int),
        levels,
        step_size=0.08 * (0.1 + levels**2),
        num_steps=600,
        keep_every=600,
    )
    assert np.unique(states.level_index).size == 4
    level = levels[states.level_index.reshape(-1)]
    times = grids(oracle.process, level, 12)
    y = states.y.reshape(count, 2)
    solver = solvers.DPMSolverMultistep()
    x = jaxdiff.denoise(jax.random.key(7), oracle, y, solver=solver, times=times).x
    x = np.asarray(x)

    component = jax.vmap(lambda x: jnp.argmax(oracle._components(x, jnp.float32(0.01))[0]))
    exact = np.asarray(jax.vmap(oracle.sample_data)(jax.random.split(jax.random.key(8), 50_000)))
    mine, theirs = np.asarray(component(x)), np.asarray(component(exact))
    for k in range(3):
        weight = np.mean(theirs == k)
        assert abs(np.mean(mine == k) - weight) < 4 * np.sqrt(weight * (1 - weight) / count)
        a, b = x[mine == k], exact[theirs == k]
        spread = np.sqrt(b.var(0) * (1 / len(a) + 1 / len(b)))
        assert np.all(np.abs(a.mean(0) - b.mean(0)) < 4 * spread)
        # The step size inflates the variance of p(y | k) by about 2%; four errors are 6%.
        np.testing.assert_allclose(a.var(0), b.var(0), rtol=0.1)


def test_wrong_arguments_are_named():
    oracle, key = unit_oracle(), jax.random.key(0)
    posterior = OracleNoisePosterior(oracle, LEVELS)
    run = lambda y, level, **options: langevin_gibbs(
        key, oracle, posterior, y, level, LEVELS, **(dict(step_size=0.1, num_steps=4) | options)
    )
    y, level = jnp.zeros((2, 1)), jnp.zeros(2, int)
    with pytest.raises(ValueError, match=r"`level_index` must be integers of shape \(2,\)"):
        run(y, jnp.zeros(2))
    with pytest.raises(ValueError, match="multiple of `keep_every` = 3, got 4. Use 6."):
        run(y, level, keep_every=3)
    with pytest.raises(ValueError, match=r"one per level, shape \(3,\), got shape \(2,\)"):
        run(y, level, step_size=[0.1, 0.2])
