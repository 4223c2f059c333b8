"""Twisted particles and trees of rollouts tend to the tilted law of the discretised chain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import jaxdiff
from jaxdiff import guidance, oracles, processes, solvers

KEY = jax.random.key(0)
MEAN, COVARIANCE = np.array([0.3, -0.2]), np.array([[1.0, 0.4], [0.4, 0.5]])
SLOPE = np.array([0.8, -0.5])
TIMES = np.linspace(0.9, 0.0, 5)
Y, STD = 1.2, 0.8


def laws():
    return oracles.gaussian(processes.VP(), jnp.asarray(MEAN), jnp.asarray(COVARIANCE))


def chain(times=TIMES):
    """Mean and covariance of what ancestral steps make of the prior, in NumPy."""
    process = processes.VP()
    mean = np.zeros(2)
    covariance = float(process.sigma(times[0])) ** 2 * np.eye(2)
    for t, s in zip(times[:-1], times[1:], strict=True):
        (a, b), (p, q) = (
            (float(process.alpha(u)), float(process.sigma(u)) if u else 0.0) for u in (t, s)
        )
        gain = a * COVARIANCE @ np.linalg.inv(a**2 * COVARIANCE + b**2 * np.eye(2))
        decay = a * q / (p * b)
        # x_s = p D + q decay (x - a D) / b + noise, D = MEAN + gain (x - a MEAN).
        slope = (p - q * decay * a / b) * gain + q * decay / b * np.eye(2)
        offset = (p - q * decay * a / b) * (MEAN - a * gain @ MEAN)
        mean = slope @ mean + offset
        covariance = slope @ covariance @ slope.T + q**2 * (1 - decay**2) * np.eye(2)
    return mean, covariance


def seen(x0, y):
    return -((x0[0] - y) ** 2) / (2 * STD**2)


def reward(x0):
    return jnp.vdot(jnp.asarray(SLOPE, x0.dtype), x0)


SEEN, REWARD = map(jax.tree_util.Partial, (seen, reward))


def populations(size, count, **options):
    solver = guidance.TwistedSMC(size=size, log_prob=SEEN, **options)
    total = size * count
    cond = {"y": jnp.full(total, Y)}
    out = jaxdiff.sample(KEY, laws(), (2,), total, cond=cond, solver=solver, times=TIMES)
    x = np.asarray(out.x).reshape(count, size, 2)
    return x, np.asarray(out.memory.log_evidence).reshape(count, size)


def test_twisted_particles_tend_to_the_posterior_of_the_chain(x64):
    mean, covariance = chain()
    gain = covariance[:, 0] / (covariance[0, 0] + STD**2)
    expected = mean + gain * (Y - mean[0])
    spread = covariance - np.outer(gain, covariance[0])
    variance = covariance[0, 0] + STD**2
    evidence = STD / np.sqrt(variance) * np.exp(-((Y - mean[0]) ** 2) / (2 * variance))
    errors = []
    for size, count in ((4, 2000), (64, 125)):
        x, log_evidence = populations(size, count)
        assert np.all(log_evidence == log_evidence[:, :1])
        found = np.exp(log_evidence[:, 0])
        # Unbiased for any size.
        assert abs(found.mean() - evidence) < 4 * found.std() / np.sqrt(count)
        assert found.std() / np.sqrt(count) < 0.02 * evidence
        errors.append(np.abs(x.mean((0, 1)) - expected).max())
    assert errors[1] < 0.05 and errors[1] < errors[0] / 2
    assert_allclose(np.cov(x.reshape(-1, 2).T), spread, atol=0.05)
    # Guidance alone, without weights, is off: the twist's covariance is not the law's.
    x, _ = populations(1, 8000)
    assert np.abs(x.mean((0, 1)) - expected).max() > 0.1


def test_the_better_the_twist_the_less_is_lost(x64):
    """A twist with the variance that the posterior has makes weights more equal."""
    process = processes.VP()

    def wider(x0, y, level):
        # Var[x0_1 | x_t], of the marginal alone.
        variance = STD**2 + level**2 / (1 + level**2)
        return -((x0[0] - y) ** 2) / (2 * variance) - jnp.log(variance) / 2 + jnp.log(STD)

    plain, better = (
        populations(8, 500, **options)[1][:, 0]
        for options in ({}, {"twist": jax.tree_util.Partial(wider)})
    )
    assert better.std() < 0.6 * plain.std()
    never, _ = populations(8, 500, threshold=0.0)
    assert np.isfinite(never).all() and process.t_max == 1


def test_trees_tend_to_the_tilted_law_of_the_chain(x64):
    """temperature log E exp(r / temperature) at the root, and the law of walks down.

    Independent rollouts by 1 / sqrt(rollouts); those that share, slower: what looked poor once is
    seen rarely again, and its value stays low.
    """
    times, temperature = np.array([0.9, 0.3, 0.0]), 0.7
    mean, covariance = chain(times)
    expected = mean + covariance @ SLOPE / temperature
    value = SLOPE @ mean + SLOPE @ covariance @ SLOPE / (2 * temperature)

    def errors(rollouts, **options):
        out = guidance.tree_sample(
            KEY, laws(), (2,), REWARD, rollouts=rollouts, num_samples=16, num_trees=100,
            times=times, temperature=temperature, **options,
        )  # fmt: skip
        assert_allclose(jax.vmap(jax.vmap(reward))(out.x), out.reward, rtol=1e-9)
        assert np.all(out.nfe <= rollouts * 2) and np.all(out.nfe >= 2)
        off = np.sqrt(np.mean((np.asarray(out.value) - value) ** 2))
        return off, np.asarray(out.x).reshape(-1, 2)

    alone = [errors(n, widening=1e6, exponent=1.0) for n in (16, 144)]
    assert 2.2 < alone[0][0] / alone[1][0] < 4  # 3 by nine times the rollouts
    shared = [errors(n) for n in (32, 512)]
    assert shared[1][0] < 0.55 * shared[0][0]
    for _, found in (alone[1], shared[1]):
        assert_allclose(found.mean(0), expected, atol=0.06)
        assert_allclose(np.cov(found.T), covariance, atol=0.05)
    assert np.abs(expected - mean).max() > 0.18  # tilted, indeed


def test_a_search_finds_more_for_half_of_the_evaluations(x64):
    run = lambda rollouts, **options: guidance.tree_sample(
        KEY, laws(), (2,), REWARD, rollouts=rollouts, num_trees=64, times=TIMES, search=True,
        temperature=0.1, exploration=0.1, **options,
    )  # fmt: skip
    found = run(300, num_samples=3, widening=1.0)
    assert np.all(np.diff(found.reward, axis=1) <= 0)
    assert_allclose(found.reward[:, 0], jax.vmap(reward)(found.x[:, 0]), rtol=1e-9)
    # Rollouts that know nothing of each other: the best of so many.
    best = run(128, widening=1e6)
    assert np.mean(found.reward[:, 0]) > np.mean(best.reward[:, 0]) + 0.04
    assert np.mean(found.nfe) < 0.6 * 128 * 4 and np.all(best.nfe == 128 * 4)


def test_a_tree_by_itself_is_that_of_many():
    small = lambda count: guidance.tree_sample(
        KEY, jaxdiff.Clipped(laws()), (2,), REWARD, rollouts=12, num_samples=2, num_trees=count,
        times=3,
    ).x  # fmt: skip
    assert_allclose(small(1)[0], small(3)[0], rtol=1e-5)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_what_has_no_number_is_the_worst(x64, temperature):
    """A reward that is NaN is one of -infinity, and there is no such sample."""

    def found(method, bad):
        return method(jax.tree_util.Partial(lambda x0, *y: jnp.where(x0[0] > 1, bad, x0[1])))

    def decoded(log_prob):
        solver = guidance.SVDD(count=4, temperature=temperature, reward=log_prob)
        return jaxdiff.sample(KEY, laws(), (2,), 16, solver=solver, times=TIMES[:3]).x

    def grown(log_prob):
        options = {"num_samples": 4, "times": 3, "search": temperature == 0}
        return guidance.tree_sample(KEY, laws(), (2,), log_prob, rollouts=16, **options).x[0]

    def twisted(log_prob):
        cond = {"y": jnp.zeros(32)}
        solver = guidance.TwistedSMC(size=32, log_prob=log_prob)
        return jaxdiff.sample(KEY, laws(), (2,), 32, cond=cond, solver=solver, times=TIMES).x

    for method in (decoded, grown, twisted):
        x = found(method, jnp.nan)
        assert_allclose(x, found(method, -jnp.inf), rtol=1e-12)
        assert method is decoded or np.all(np.isfinite(x)) and np.all(x[:, 0] <= 1)


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_of_a_population_of_no_weight_every_particle_goes_on(x64, threshold):
    """As without weights, by the same draws; and the one beside it is not touched."""
    refused = jax.tree_util.Partial(
        lambda x0, y: jnp.where(y > 0, 0.0, -jnp.inf) * jnp.ones((), x0.dtype) + 0 * x0[0]
    )
    solver = guidance.TwistedSMC(size=4, log_prob=refused, threshold=threshold)
    out = lambda y: jaxdiff.sample(
        KEY, laws(), (2,), 8, solver=solver, times=TIMES, cond={"y": jnp.repeat(jnp.asarray(y), 4)}
    )
    half, whole = out([-1.0, 1.0]), out([1.0, 1.0])
    assert_allclose(half.x[4:], whole.x[4:], rtol=1e-12)
    assert len(np.unique(np.asarray(half.x[:4, 0]))) == 4
    assert np.all(np.isfinite(half.x)) and np.all(half.memory.log_evidence[:4] == -np.inf)
    assert_allclose(half.memory.log_evidence[4:], 0.0, atol=1e-12)


def test_errors():
    with pytest.raises(TypeError, match="`base` of TwistedSMC must draw from a Gaussian kernel"):
        guidance.TwistedSMC(solvers.UniPC(2), log_prob=SEEN)
    with pytest.raises(ValueError, match="`base` of TwistedSMC must draw its steps, got DDIM"):
        guidance.TwistedSMC(solvers.DDIM(), log_prob=SEEN)
    solver = guidance.TwistedSMC(size=2, log_prob=SEEN)
    with pytest.raises(ValueError, match="`cond` must have the entries 'y' for TwistedSMC"):
        jaxdiff.sample(KEY, laws(), (2,), 2, solver=solver, times=2)
    with pytest.raises(ValueError, match="`cond` must be the same for 2 examples in a row"):
        cond = {"y": jnp.asarray([0.1, 0.2])}
        jaxdiff.sample(KEY, laws(), (2,), 2, solver=solver, times=2, cond=cond)
    grow = lambda *args, **options: guidance.tree_sample(
        KEY, *args, **{"rollouts": 2, "times": 2, **options}
    )
    with pytest.raises(ValueError, match="`reward` must return a floating scalar"):
        grow(laws(), (2,), jax.tree_util.Partial(lambda x0: x0))
    with pytest.raises(ValueError, match="`num_samples` must be at most `rollouts` = 2"):
        grow(laws(), (2,), REWARD, search=True, num_samples=3)
    with pytest.raises(TypeError, match="`solver` must draw from a Gaussian kernel"):
        grow(laws(), (2,), REWARD, solver=solvers.EDMHeun())
    with pytest.raises(TypeError, match="`tree_sample` cannot tell it"):
        remembers = guidance.AdaptiveGuidance(laws(), null_cond=1)
        grow(remembers, (2,), REWARD)
