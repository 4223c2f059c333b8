"""Exact inverses of sampling (BDIA, EDICT), and DDIM inverted by iteration."""

import itertools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PROCESSES, Counting, gaussian, mixture, times_at, walk

import jaxdiff
from jaxdiff import guidance, oracles, processes, solvers
from jaxdiff.solvers._bdia import Neighbour

KEY = jax.random.key(0)


def grid(process, to_zero, steps=12):
    if to_zero:
        return jnp.append(times_at(process, -4.0, 4.0, steps), 0.0)
    return times_at(process, -4.0, 4.0, steps + 1)


def largest(difference):
    return np.abs(difference).max()


def check_retraces(solver, oracle, times, tolerance, back_again):
    run = {"dtype": oracle.means.dtype, "saveat": diffrax.SaveAt(t0=True)}
    forth = jaxdiff.sample(KEY, oracle, (2,), 8, solver=solver, times=times, **run)
    run = {"solver": solver, "times": times[::-1]}
    back = jaxdiff.invert(oracle, forth.x, memory=forth.memory, **run)
    assert largest(back.x - forth.trajectory.x[:, 0]) < tolerance
    if back_again:
        run = {"solver": solver, "times": times, "memory": back.memory}
        again = jaxdiff.denoise(KEY, oracle, back.x, **run)
        assert largest(again.x - forth.x) < tolerance


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("name", ["VP", "EDM", "RectifiedFlow"])
def test_exact_inverses_retrace_sampling(name, double):
    with jax.enable_x64(double):
        oracle = mixture(PROCESSES[name](), jnp.float64 if double else jnp.float32)
        edict = solvers.EDICT(alternate=name != "EDM")
        for solver in (solvers.BDIA(1.0), solvers.BDIA(0.5), edict):
            growth = 1 if double else getattr(solver, "gamma", 1.0) ** -6
            for to_zero in (True, False):
                times = grid(oracle.process, to_zero)
                check_retraces(solver, oracle, times, (1e-9 if double else 1e-5) * growth, double)


def retrace(solver, oracle, times, x):
    """The states of a run of sampling, and those of retracing it, from the same end."""
    forth = walk(solver, oracle, times, x)
    memory = Neighbour(forth[-2], times[-2])
    back = walk(solver, oracle, times[::-1], forth[-1], direction=1, memory=memory)
    return forth, back[::-1]


def test_rounding_grows_by_one_over_gamma_a_step(x64):
    oracle = mixture(processes.VP())
    times = times_at(oracle.process, -4.0, 4.0, 41)

    def growth(gamma):
        forth, back = retrace(solvers.BDIA(gamma), oracle, times, jnp.asarray([1.0, -0.5]))
        return jnp.log2(jnp.abs(back - forth).max(axis=1))[::-1]

    by_step = jax.jit(jax.vmap(growth))(jnp.asarray([0.5, 0.7]))
    rates = (by_step[:, 40] - by_step[:, 15]) / 25
    np.testing.assert_allclose(rates, np.log2([1 / 0.5, 1 / 0.7]), atol=0.15)


def test_derivative_of_a_round_trip_through_sigma_zero_is_the_identity(x64):
    oracle = mixture(processes.VP())
    times = grid(oracle.process, True, steps=4)
    round_trip = lambda x: retrace(solvers.BDIA(0.5), oracle, times, x)[1][0]
    jacobian = jax.jit(jax.jacrev(round_trip))
    np.testing.assert_allclose(jacobian(jnp.asarray([1.0, -0.5])), np.eye(2), rtol=0, atol=1e-10)


def test_memory_continues_a_run(x64):
    oracle, solver = mixture(processes.VP()), solvers.BDIA(0.5)
    times = grid(oracle.process, True, steps=6)
    whole = walk(solver, oracle, times, jnp.asarray([1.0, -0.5]))
    rest = {"memory": Neighbour(whole[2:3], times[2:3]), "times": times[3:], "solver": solver}
    end = jaxdiff.denoise(KEY, oracle, whole[3:4], **rest)
    np.testing.assert_allclose(end.x[0], whole[-1], rtol=0, atol=1e-12)


def errors(solver_of, parameters, oracle, steps, direction=-1):
    times = times_at(oracle.process, -3.0, 3.0, steps + 1)[::-direction]
    x = jnp.asarray([1.0, -0.5, 0.7])
    exact = oracles.gaussian_flow_map(oracle, x, times[0], times[-1])

    @jax.jit
    @jax.vmap
    def final(parameter):
        return walk(solver_of(parameter), oracle, times, x, direction=direction)[-1]

    return np.abs(final(jnp.asarray(parameters)) - exact).max(axis=1)


def orders(*args, **options):
    coarse, fine = (errors(*args, steps, **options) for steps in (80, 160))
    return np.log2(coarse / fine), fine


@pytest.mark.parametrize("name", ["VP", "EDM"])
def test_order_of_bdia_and_its_error_constant(x64, name):
    oracle, gammas = gaussian(PROCESSES[name]()), np.asarray([1.0, 0.5, 0.25])
    measured, fine = orders(solvers.BDIA, gammas, oracle)
    np.testing.assert_allclose(measured, [2, 1, 1], atol=0.15)
    ddim = errors(lambda _: solvers.DDIM(), [0.0], oracle, 160)
    np.testing.assert_allclose(fine[1:] / ddim, ((1 - gammas) / (1 + gammas))[1:], rtol=0.1)
    inverting, _ = orders(solvers.BDIA, [1.0], oracle, direction=1)
    np.testing.assert_allclose(inverting, 2, atol=0.15)


@pytest.mark.parametrize("alternate", [True, False])
def test_order_of_edict(x64, alternate):
    oracle = gaussian(processes.VP())
    measured, _ = orders(lambda p: solvers.EDICT(p, alternate), [0.93, 1.0], oracle)
    np.testing.assert_allclose(measured, 1, atol=0.15)


def test_nfe_is_the_true_count(x64):
    counting, x = Counting(mixture(processes.VP(), jnp.float32)), jnp.ones(2, jnp.float32)
    times = grid(counting.process, False, steps=1)
    costs = {
        solvers.BDIA(): {-1: 1, 1: 1},
        solvers.EDICT(): {-1: 2, 1: 2},
        solvers.FixedPointInversion(3): {-1: 1, 1: 3},
        solvers.RNRI(4): {-1: 1, 1: 4},
    }
    for solver, direction in itertools.product(costs, (-1, 1)):
        problem = solvers.Problem(counting, None, None, times[::-direction], direction)
        step = solvers.Step(*problem.times, None, None, solver.init_memory(problem, x))
        with jax.disable_jit():
            nfe = solver.update(problem, x, step)[2]
        jax.effects_barrier()
        assert nfe == costs[solver][direction] == len(counting.calls)
        counting.calls.clear()


def step_of_inverting(solver, oracle, x, t, s):
    problem = solvers.Problem(oracle, None, None, jnp.stack([t, s]), 1)
    return solver.update(problem, x, solvers.Step(t, s, None, None, None))[0]


def gaussian_fixed_point(oracle, x, t, s):
    """The z that DDIM's step from s to t carries to x, for a diagonal covariance."""
    alpha, sigma = oracle.process.alpha, oracle.process.sigma
    mean, variance = oracle.means[0], np.diag(oracle.covariances()[0])
    shrink = (alpha(t) * alpha(s) * variance + sigma(t) * sigma(s)) / (
        alpha(s) ** 2 * variance + sigma(s) ** 2
    )
    return alpha(s) * mean + (x - alpha(t) * mean) / shrink


@pytest.mark.parametrize("name", ["VP", "EDM"])
def test_fixed_point_iteration_on_a_gaussian(x64, name):
    process = PROCESSES[name]()
    oracle = oracles.gaussian(process, [0.3, -1.0], jnp.diag(jnp.asarray([0.02, 2.0])))
    s, t = times_at(process, -1.0, 1.5, 2)
    x = jnp.asarray([0.7, 0.4])
    exact = gaussian_fixed_point(oracle, x, t, s)
    run = lambda n: step_of_inverting(solvers.FixedPointInversion(n), oracle, x, t, s)
    error = np.abs(np.stack([run(n) for n in (1, 2, 3, 4, 100)]) - exact)
    factors = error[1:4] / error[:3]
    np.testing.assert_allclose(factors, factors[:1].repeat(3, 0), rtol=1e-6)
    bound = 1 - process.sigma(t) * process.alpha(s) / (process.sigma(s) * process.alpha(t))
    assert np.all(factors < bound) and error[-1].max() < 1e-12


@pytest.mark.parametrize("name", ["VP", "EDM"])
def test_newton_is_exact_after_one_update_in_one_dimension(x64, name):
    process = PROCESSES[name]()
    oracle = oracles.gaussian(process, [0.3], [[0.2]])
    s, t = times_at(process, -1.0, 1.5, 2)
    x = jnp.asarray([0.7])
    run = lambda solver: step_of_inverting(solver, oracle, x, t, s)
    exact = gaussian_fixed_point(oracle, x, t, s)
    np.testing.assert_allclose(run(solvers.RNRI(2, 0.0)), exact, rtol=1e-12)
    assert largest(run(solvers.FixedPointInversion(2)) - exact) > 1e-3
    np.testing.assert_allclose(run(solvers.RNRI(1)), run(solvers.FixedPointInversion(1)))


def test_round_trips_of_all_under_guidance(x64):
    base, cond = mixture(processes.VP()), jnp.arange(32) % 2
    oracle = guidance.ClassifierFree(base, null_cond=2, scale=3.0)
    data = jax.vmap(base.sample_data)(jax.random.split(KEY, 32), cond)

    def error(solver, to_zero=False):
        times, options = grid(base.process, to_zero, 20), {"solver": solver, "cond": cond}
        there = jaxdiff.invert(oracle, data, times=times[::-1], **options)
        if there.memory is None:
            options["solver"] = solvers.DDIM()
        back = jaxdiff.denoise(KEY, oracle, there.x, memory=there.memory, times=times, **options)
        return np.linalg.norm(back.x - data, axis=1)

    ddim = np.median(error(solvers.DDIM()))
    fixed_point = np.median(error(solvers.FixedPointInversion(5)))
    newton, regularised = (np.median(error(solvers.RNRI(5, weight))) for weight in (0.0, 0.1))
    assert 0.1 * ddim > fixed_point > 10 * newton and ddim > 0.05
    # The prior keeps the regularised method from the exact inverse.
    assert fixed_point < regularised < 0.5 * ddim
    for solver in (solvers.FixedPointInversion(100), solvers.EDICT(), solvers.BDIA()):
        assert error(solver).max() < 1e-8
    # Inverting may start at sigma = 0.
    assert error(solvers.EDICT(), to_zero=True).max() < 1e-8
    assert error(solvers.FixedPointInversion(100), to_zero=True).max() < 1e-8
    assert np.median(error(solvers.RNRI(5, 0.0), to_zero=True)) < 1e-2


def test_a_nan_of_the_denoiser_is_not_hidden():
    oracle = oracles.gaussian(processes.VP(), [jnp.nan], [[1.0]])
    t, s = jnp.asarray(0.3), jnp.asarray(0.4)
    assert jnp.isnan(step_of_inverting(solvers.RNRI(1), oracle, jnp.ones(1), t, s)).all()


@pytest.mark.parametrize(
    ("solver", "arguments", "message"),
    [
        (solvers.BDIA, (0,), "`gamma` must be above 0 and at most 1, got 0. Take 1.0"),
        (solvers.BDIA, (float("nan"),), "`gamma` must be above 0 .* got nan"),
        (solvers.EDICT, (0.0,), "`p` must be above 0 .* got 0. Take the authors' 0.93"),
        (solvers.FixedPointInversion, (0,), "`num_iterations` must be at least 1, got 0"),
        (solvers.RNRI, (0,), "`num_iterations` must be at least 1, got 0. Use DDIM"),
        (solvers.RNRI, (3, -0.1), "`weight` must be at least 0, got -0.1. Take 0.0"),
    ],
)
def test_bad_numbers(solver, arguments, message):
    with pytest.raises(ValueError, match=message):
        solver(*arguments)


def test_starts_that_a_method_cannot_make_are_refused():
    oracle, x = mixture(processes.VP(), jnp.float32), jnp.zeros((2, 2))
    times = jnp.linspace(0.0, 1.0, 5)
    for solver in (solvers.DDIM(), solvers.BDIA(), solvers.UniPC(2)):
        with pytest.raises(ValueError, match=f"sigma > 0 with {type(solver).__name__}, got 0"):
            jaxdiff.invert(oracle, x, solver=solver, times=times)
    down = jaxdiff.denoise(jax.random.key(0), oracle, x, solver=solvers.BDIA(), times=times[::-1])
    back = lambda times: jaxdiff.invert(
        oracle, down.x, solver=solvers.BDIA(), times=times, memory=down.memory
    )
    with pytest.raises(ValueError, match=r"last step started at 0.25, got a first step to 0.1\."):
        back(jnp.linspace(0.0, 1.0, 11))
    np.testing.assert_allclose(back(times).x, x, atol=1e-5)
