"""Strengths of training-free guidance: schedules of a grid, and the search for good ones."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import gaussian
from numpy.testing import assert_allclose

import jaxdiff
from jaxdiff import guidance, processes, solvers
from jaxdiff.guidance import DecreasingStrength, IncreasingStrength, NoiseStrength, TrainingFree

KEY = jax.random.key(0)
MATRIX = np.array([[1.0, -0.5, 0.3]])
NOISE, COUNT = 0.4, 64
Y = {"y": np.full((COUNT, 1), 0.7)}
Partial = jax.tree_util.Partial


def towards(x0, y):
    return -jnp.sum((y - jnp.asarray(MATRIX) @ x0) ** 2) / (2 * NOISE**2)


def near(mean, covariance, x):
    """How near samples are to the moments of the exact posterior."""
    return -jnp.sum((x.mean(0) - mean) ** 2) - jnp.sum((jnp.cov(x.T) - covariance) ** 2)


def solver_of(rho, mu, smoothing, base=solvers.Ancestral(), **options):
    options = {"draws": 2, "iterations": 2} | options
    return TrainingFree(
        base, log_prob=Partial(towards), rho=rho, mu=mu, smoothing=smoothing, **options
    )


def posterior():
    laws = gaussian(processes.VP())
    exact = laws.condition(jnp.asarray(MATRIX), jnp.asarray([0.7]), NOISE)
    return laws, Partial(near, *exact.moments())


def test_schedules_of_a_grid_are_the_published_ones(x64):
    """In proportion to exp(-int beta) over a step, or one less that, of mean strength."""
    process, times = processes.VP(), jnp.linspace(1.0, 0.0, 11)
    t = np.asarray(times)
    integral = 0.1 * t + 0.5 * 19.9 * t**2
    kept = np.exp(integral[1:] - integral[:-1])
    rising = IncreasingStrength(0.7).over(process, times)
    assert_allclose(rising, 0.7 * 10 * kept / kept.sum(), rtol=1e-12)
    falling = DecreasingStrength(0.7).over(process, times)
    assert_allclose(falling, 0.7 * 10 * (1 - kept) / (1 - kept).sum(), rtol=1e-12)
    assert np.all(np.diff(rising) > 0) and np.all(np.diff(falling) < 0)
    found = NoiseStrength(0.3)(process, times[2], times[3], jnp.ones(()))
    assert_allclose(found, 0.3 * np.sqrt(1 - np.exp(-integral[2])), rtol=1e-12)


def test_schedules_are_followed_step_by_step(x64):
    """The table of a grid, and a function of t that looks it up; in repeated steps, too."""
    laws, times = gaussian(processes.VP()), jnp.linspace(1.0, 0.0, 6)
    rising, falling = (kind(0.05) for kind in (IncreasingStrength, DecreasingStrength))

    def looked_up(strength):
        table = strength.over(laws.process, times)
        return lambda process, t, s, length: table[jnp.round(5 * (1 - t)).astype(int)]

    run = lambda solver: (
        jaxdiff.sample(
            KEY, laws, (3,), 3, cond={"y": jnp.ones((3, 1))}, solver=solver, times=times
        ).x
    )
    around = [
        guidance.Recurrence(solver_of(a, b, 0.1, iterations=1), count=2)
        for a, b in ((rising, falling), (looked_up(rising), looked_up(falling)))
    ]
    assert_allclose(run(around[0]), run(around[1]), rtol=1e-9)
    energy = Partial(lambda x0, y: -towards(x0, y))
    both = [guidance.FreeDoM(energy=energy, rho=rho) for rho in (rising, looked_up(rising))]
    assert_allclose(run(both[0]), run(both[1]), rtol=1e-9)


def test_the_search_finds_the_best_of_the_grid_in_one_program(x64):
    """Of all 144 settings within the limits, those of schedules; each round is one call."""
    laws, metric = posterior()
    traces = []

    class Traced(jaxdiff.DenoiserMap):
        base: jaxdiff.Denoiser

        def __call__(self, x, t, cond=None, *, key=None):
            traces.append(1)
            return self.base(x, t, cond, key=key)

    size = 0.05

    def schedules(rho, mu, smoothing):
        return solver_of(
            IncreasingStrength(size * rho), IncreasingStrength(size * mu), NoiseStrength(smoothing)
        )

    @jax.jit
    def every(table):
        def score(row):
            found = jaxdiff.sample(KEY, laws, (3,), COUNT, cond=Y, solver=schedules(*row), times=10)
            return metric(found.x)

        return jax.vmap(score)(table)

    exponents = np.array(list(itertools.product(range(6), range(6), range(4))))
    table = np.array([0.25, 0.25, 0.001]) * np.array([2.0, 2.0, 10.0]) ** exponents
    whole = np.asarray(every(jnp.asarray(table)))

    search = lambda base, **options: guidance.search_training_free(
        KEY, base, schedules(1.0, 1.0, 1.0), (3,), COUNT, metric=metric, cond=Y, times=10, **options
    )
    found = search(Traced(laws), rounds=8)
    once = len(traces)
    assert 0 < once <= 2  # of a gradient
    best = np.argmax(found.scores)
    assert_allclose(found.strengths[best], table[np.argmax(whole)], rtol=1e-9)
    assert_allclose(found.scores[best], whole.max(), rtol=1e-9)
    assert len(found.scores) < 40 and len(np.unique(found.strengths, axis=0)) == len(found.scores)
    assert np.all(found.strengths <= [8.001, 8.001, 1.001])
    out = jaxdiff.sample(KEY, laws, (3,), COUNT, cond=Y, solver=found.solver, times=10)
    assert_allclose(metric(out.x), whole.max(), rtol=1e-9)
    # Other numbers, of as many candidates, are the same program.
    search(Traced(laws), rounds=2, start=(0.5, 0.125, 0.01))
    assert len(traces) == once


def test_only_what_is_used_is_searched(x64):
    """mu alone, of a solver without draws and without a gradient through the network."""
    laws, metric = posterior()
    solver = solver_of(None, 0.05, 1.0, draws=0, iterations=1)
    found = guidance.search_training_free(
        KEY, laws, solver, (3,), COUNT, metric=metric, cond=Y, times=4, rounds=9, beam=1
    )
    assert_allclose(found.strengths[:, 1], 0.25 * 2.0 ** np.arange(6), rtol=1e-12)
    assert np.ptp(found.strengths[:, 0]) == np.ptp(found.strengths[:, 2]) == 0
    best = found.strengths[np.argmax(found.scores), 1]
    assert found.solver.rho is None and found.solver.mu == pytest.approx(0.05 * best)


@pytest.mark.usefixtures("unchecked")
def test_errors(x64):
    laws = gaussian(processes.VP())
    go = lambda solver, **options: guidance.search_training_free(
        KEY, laws, solver, (3,), 2, cond={"y": jnp.ones((2, 1))}, times=2,
        **{"metric": Partial(jnp.sum)} | options,
    )  # fmt: skip
    with pytest.raises(ValueError, match="`DecreasingStrength` must be of a process whose alpha"):
        flat = TrainingFree(log_prob=Partial(lambda x0, y: -jnp.sum(x0)), rho=DecreasingStrength())
        jaxdiff.sample(
            KEY, gaussian(processes.EDM()), (3,), 2, cond={"y": jnp.ones((2, 1))}, solver=flat,
            times=2,
        )  # fmt: skip
    full = solver_of(1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="`solver` must use one strength at least"):
        go(solver_of(None, 1.0, 1.0, draws=0, iterations=0))
    with pytest.raises(ValueError, match="`factors` must be above 1"):
        go(full, factors=(2.0, 1.0, 2.0))
    with pytest.raises(ValueError, match="`start` must not be beyond `limits`"):
        go(full, start=(9.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="`limits` must be three numbers"):
        go(full, limits=(9.0, 1.0))
    with pytest.raises(TypeError, match="`solver` must be a TrainingFree"):
        go(solvers.DDIM())
    with pytest.raises(ValueError, match="`metric` must return a scalar"):
        go(full, metric=Partial(jnp.ravel))
    with pytest.raises(ValueError, match="`strength`"):
        IncreasingStrength(jnp.nan)
