"""Solvers that wrap solvers: restarts, Langevin corrections, ancestral noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PROCESSES, gaussian, times_at, walk

import jaxdiff
from jaxdiff import oracles, processes, solvers
from jaxdiff.predictions import X0


def variances(oracle, t):
    """Standard deviations of the marginal along the axes, for a diagonal covariance."""
    process = oracle.process
    spread = jnp.diagonal(oracle.covariances()[0])
    return process.alpha(t) ** 2 * spread + process.sigma(t) ** 2


def diagonal(process):
    return oracles.gaussian(process, jnp.asarray([0.4, -1.0]), jnp.diag(jnp.asarray([0.3, 2.0])))


@pytest.mark.parametrize("process", ["VP", "EDM", "RectifiedFlow"])
@pytest.mark.parametrize("restarts", [1, 3])
def test_passes_contract_errors_as_the_exact_flow_does(x64, process, restarts):
    """Without noise a pass multiplies deviations from the mean by r sqrt(V_low / V_high)."""
    process = PROCESSES[process]()
    oracle = diagonal(process)
    times = times_at(process, -3.0, 3.0, 301)
    high = process.time(-2 * jnp.log(jnp.asarray(1.3)))
    # The grid level nearest to the lower end asked for.
    levels = jnp.exp(-process.log_snr(times) / 2)
    low = times[jnp.argmin(jnp.abs(levels - 0.4))]
    interval = solvers.RestartInterval(0.4, 1.3, 400, restarts)
    solver = solvers.Restart(intervals=(interval,), noise=0.0)
    x = jnp.asarray([1.0, -0.7])
    found = jaxdiff.denoise(jax.random.key(0), oracle, x[None], solver=solver, times=times)
    plain = oracles.gaussian_flow_map(oracle, x, times[0], times[-1])
    mean = process.alpha(times[-1]) * oracle.means[0]
    ratio = process.alpha(high) / process.alpha(low)
    factor = ratio * jnp.sqrt(variances(oracle, low) / variances(oracle, high))
    expected = mean + factor**restarts * (plain - mean)
    np.testing.assert_allclose(found.x[0], expected, rtol=2e-4)
    assert int(found.nfe[0]) == 2 * 300 + restarts * 2 * 400


def test_restarts_keep_the_law_whatever_their_number(x64):
    """With the exact flow and the exact noise; two intervals, in any order."""
    process, count = processes.VP(), 20_000
    oracle = diagonal(process)
    times = times_at(process, -3.0, 4.0, 41)
    start = variances(oracle, times[0])
    normal = jax.random.normal(jax.random.key(5), (count, 2))
    x = process.alpha(times[0]) * oracle.means[0] + jnp.sqrt(start) * normal
    exact = variances(oracle, times[-1])
    samples = []
    for intervals in (
        (solvers.RestartInterval(0.3, 1.0, 20, 1),),
        (solvers.RestartInterval(0.3, 1.0, 20, 4), solvers.RestartInterval(1.2, 2.5, 20, 2)),
    ):
        solver = solvers.Restart(solvers.DPMSolver(2, X0()), intervals)
        out = jaxdiff.denoise(jax.random.key(6), oracle, x, solver=solver, times=times)
        samples.append(out.x)
        np.testing.assert_allclose(out.x.var(0), exact, rtol=4 * np.sqrt(2 / count) + 0.003)
        mean = process.alpha(times[-1]) * oracle.means[0]
        np.testing.assert_array_less(np.abs(out.x.mean(0) - mean), 4.5 * np.sqrt(exact / count))
    # They forget where they started: the more passes, the more.
    correlation = [np.corrcoef(normal[:, 0], x[:, 0])[0, 1] for x in samples]
    assert correlation[0] < 0.9 and abs(correlation[1]) < 0.5 * correlation[0]


def test_evaluations_of_the_paper_and_a_last_step_to_zero():
    """2 N - 1 + sum 2 K (N_i - 1), in the paper's count of points."""
    oracle = gaussian(processes.EDM())
    solver = solvers.Restart(intervals=(solvers.RestartInterval(0.06, 0.3, 2, 2),))
    times = solvers.karras_times(oracle.process, 18)
    out = jaxdiff.sample(jax.random.key(0), oracle, (3,), 4, solver=solver, times=times)
    np.testing.assert_array_equal(out.nfe, 2 * 18 - 1 + 2 * 2 * 2)
    assert np.all(np.isfinite(out.x))


@pytest.mark.parametrize("base", [solvers.UniPC(), solvers.PNDM(), solvers.BDIA()])
@pytest.mark.parametrize("wrap", [solvers.Restart, solvers.AncestralNoise])
def test_bases_with_a_memory_are_refused(base, wrap):
    with pytest.raises(ValueError, match=f"single steps, got {type(base).__name__}"):
        jaxdiff.sample(jax.random.key(0), gaussian(processes.VP()), (3,), 1, solver=wrap(base))


def test_wrong_intervals_are_named():
    with pytest.raises(ValueError, match="`k_high` must be above 0.5, got 0.3"):
        solvers.RestartInterval(0.5, 0.3)
    with pytest.raises(ValueError, match="`num_steps` must be at least 1, got 0"):
        solvers.RestartInterval(num_steps=0)
    with pytest.raises(ValueError, match="`num_corrections` must be at least 0, got -1"):
        solvers.PredictorCorrector(num_corrections=-1)


@pytest.mark.parametrize(("process", "snr"), [("VP", 0.16), ("EDM", 0.4)])
def test_langevin_corrections_reach_the_marginal_up_to_their_bias(x64, process, snr):
    """In many dimensions the step is 2 snr^2 v^2 / V, and V = (1 + snr^2) v."""
    process, size = PROCESSES[process](), 20_000
    oracle = oracles.gaussian(process, jnp.asarray([0.5]), jnp.asarray([[0.3]]))
    t = process.time(jnp.asarray(0.4))
    marginal = process.alpha(t) ** 2 * 0.3 + process.sigma(t) ** 2

    class Many(type(oracle)):
        """The oracle, for each of many coordinates."""

        def __call__(self, x, t, cond=None, *, key=None):
            return jax.vmap(lambda value: super(Many, self).__call__(value[None], t)[0])(x)

    many = Many(*[getattr(oracle, f) for f in oracle.__dataclass_fields__])
    problem = solvers.Problem(many, None, jax.random.key(0), jnp.stack([t, t / 2]), -1)
    solver = solvers.PredictorCorrector(num_corrections=1, snr=snr)
    correct = lambda i, x: solver.langevin(problem, x, t, jax.random.fold_in(problem.key, i)).x
    x = jax.jit(lambda x: jax.lax.fori_loop(0, 200, correct, x))(jnp.full(size, 3.0))
    np.testing.assert_allclose(x.var(), marginal * (1 + snr**2), rtol=5 * np.sqrt(2 / size))
    np.testing.assert_allclose(x.mean(), process.alpha(t) * 0.5, atol=5 * np.sqrt(2 / size))


def test_no_corrections_are_the_predictor_and_others_count(x64):
    oracle, key = gaussian(processes.VP()), jax.random.key(0)
    run = lambda solver: jaxdiff.sample(key, oracle, (3,), 4, solver=solver, times=6)
    none = run(solvers.PredictorCorrector(solvers.UniPC(), num_corrections=0))
    np.testing.assert_allclose(none.x, run(solvers.UniPC()).x, rtol=1e-12)
    np.testing.assert_array_equal(run(solvers.PredictorCorrector(num_corrections=2)).nfe, 18)


@pytest.mark.parametrize("process", ["VP", "EDM"])
def test_ancestral_noise_around_ddim_is_ddim_with_eta(x64, process):
    oracle = gaussian(PROCESSES[process]())
    times = times_at(oracle.process, -3.0, 3.0, 9)
    noise = jax.random.normal(jax.random.key(1), (8, 1, 3))
    x = jnp.asarray([1.0, -0.5, 0.7])
    paths = [
        walk(solver, oracle, times, x, noise=noise)
        for solver in (solvers.AncestralNoise(solvers.DDIM(), 0.6), solvers.DDIM(0.6))
    ]
    np.testing.assert_allclose(paths[0], paths[1], rtol=1e-9)
