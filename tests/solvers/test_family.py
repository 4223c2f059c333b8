"""Orders, weak orders and identities of the whole family, without Monte Carlo."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PROCESSES, flow, gaussian, mixture, times_at, walk

from jaxdiff import oracles, processes, solvers
from jaxdiff._tree import jit
from jaxdiff.predictions import X0, Eps
from jaxdiff.solvers._exponential import output
from jaxdiff.solvers._multistep import Memory, Multistep

FLAT = {"lower_order_final": False}
# Solver, order with exact starting values, order with its own first steps.
DETERMINISTIC = {
    "DPM-Solver-1": (solvers.DPMSolver(1), 1, 1),
    "DPM-Solver-2": (solvers.DPMSolver(2), 2, 2),
    "DPM-Solver-3": (solvers.DPMSolver(3), 3, 3),
    "DPM-Solver++2S": (solvers.DPMSolver(2, X0()), 2, 2),
    "DPM-Solver++2S, r1=0.7": (solvers.DPMSolver(2, X0(), r1=0.7), 2, 2),
    "DPM-Solver++3S": (solvers.DPMSolver(3, X0()), 3, 3),
    "DPM-Solver++2M": (solvers.DPMSolverMultistep(2, **FLAT), 2, 2),
    "DPM-Solver++2M heun": (solvers.DPMSolverMultistep(2, variant="heun", **FLAT), 2, 2),
    "DPM-Solver++3M": (solvers.DPMSolverMultistep(3, **FLAT), 2, 2),
    "DPM-Solver++3M corrected": (solvers.DPMSolverMultistep(3, X0(), "corrected", **FLAT), 3, 2),
    "DPM-Solver 2M": (solvers.DPMSolverMultistep(2, Eps(), **FLAT), 2, 2),
    "DPM-Solver 3M corrected": (solvers.DPMSolverMultistep(3, Eps(), "corrected", **FLAT), 3, 2),
    **{
        f"UniP-{p} {v}": (solvers.UniPC(p, variant=v, corrector=False, **FLAT), p, min(p, 2))
        for p, v in ((1, "bh2"), (2, "bh1"), (2, "bh2"), (3, "bh2"), (4, "bh2"))
    },
    **{
        f"UniPC-{p} {v}": (
            solvers.UniPC(p, variant=v, final_corrector=True, **FLAT),
            p + 1,
            min(p + 1, 3),
        )
        for p, v in ((1, "bh1"), (1, "bh2"), (2, "bh1"), (2, "bh2"), (3, "bh2"))
    },
    "UniPC-3 eps": (solvers.UniPC(3, Eps(), final_corrector=True, **FLAT), 4, 3),
    **{
        f"DEIS-{r} {c}": (solvers.DEIS(r, c, False), r, min(r, 2))
        for r in (1, 2, 3, 4)
        for c in ("t", "noise_level", "log_noise_level")
    },
    "SA-P3C4, tau=0": (solvers.SASolver(3, 4, 0.0, **FLAT), 4, 3),
    "SA-P3, tau=0": (solvers.SASolver(3, 0, 0.0, **FLAT), 3, 2),
    "SEEDS-2, eta=0": (solvers.SEEDS(2, 0.0), 2, 2),
    "SEEDS-3, eta=0": (solvers.SEEDS(3, 0.0), 3, 3),
    "S-PNDM": (solvers.PNDM(2), None, 2),
    "PLMS": (solvers.PNDM(4), None, 2),
    "F-PNDM": (solvers.PNDM(4, "runge_kutta"), None, 2),
}


def error(solver, oracle, steps, *, exact_start, grid=None):
    times = times_at(oracle.process, -3.0, 3.0, steps + 1) if grid is None else grid(steps)
    return _error(solver, oracle, times, exact_start)


@jit
def _error(solver, oracle, times, exact_start):
    x = jnp.asarray([1.0, -0.5, 0.7])
    exact, start, memory = flow(oracle, x, times[0], times), 0, None
    if exact_start and isinstance(solver, Multistep):
        start = solver.history - 1
        problem = solvers.Problem(oracle, None, jax.random.key(0), times, -1)
        outputs = [output(problem, solver.prediction, exact[i], times[i]) for i in range(start)]
        memory = Memory(tuple(outputs[::-1]), exact[start], jnp.zeros(()))
        if solver.plan(problem)[1] is None:
            memory = Memory(tuple(outputs[::-1]), None, None)
    final = walk(solver, oracle, times, exact[start], start=start, memory=memory)[-1]
    return jnp.abs(final - exact[-1]).max()


@functools.cache
def vp_gaussian():
    with jax.enable_x64(True):
        return gaussian(processes.VP())


def measured_order(solver, oracle, steps, **options):
    errors = [error(solver, oracle, n, **options) for n in (steps, 2 * steps)]
    return np.log2(errors[0] / errors[1])


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order(x64, name):
    solver, formal, own = DETERMINISTIC[name]
    order = own if formal is None else formal
    assert abs(measured_order(solver, vp_gaussian(), 70, exact_start=True) - order) < 0.15


@pytest.mark.parametrize(
    "name", ["DPM-Solver++3M corrected", "UniP-4 bh2", "UniPC-3 bh2", "DEIS-4 t", "SA-P3C4, tau=0"]
)
def test_own_first_steps_keep_at_least_the_documented_order(x64, name):
    solver, _, own = DETERMINISTIC[name]
    assert measured_order(solver, vp_gaussian(), 40, exact_start=False) > own - 0.15


@pytest.mark.parametrize("process", ["EDM", "RectifiedFlow", "Cosine"])
@pytest.mark.parametrize("name", ["DPM-Solver-3", "DPM-Solver++3M corrected", "UniPC-2 bh2"])
def test_order_on_other_processes(x64, name, process):
    solver, formal, _ = DETERMINISTIC[name]
    oracle = gaussian(PROCESSES[process]())
    assert abs(measured_order(solver, oracle, 80, exact_start=True) - formal) < 0.15


SDE = dict(eta=0.8, **FLAT)
# Weak order of the variance, with noise on.
STOCHASTIC = {
    "Ancestral": (solvers.Ancestral(), 1),
    "DDIM(0.5)": (solvers.DDIM(0.5), 1),
    "SDE-DPM-Solver++1": (solvers.DPMSolverMultistep(1, **SDE), 1),
    "SDE-DPM-Solver++2M": (solvers.DPMSolverMultistep(2, **SDE), 2),
    "SDE-DPM-Solver++2M heun": (solvers.DPMSolverMultistep(2, variant="heun", **SDE), 2),
    "SDE-DPM-Solver++3M": (solvers.DPMSolverMultistep(3, variant="corrected", **SDE), 2),
    "SDE-DPM-Solver 2M": (solvers.DPMSolverMultistep(2, Eps(), **SDE), 2),
    "SEEDS-1": (solvers.SEEDS(1), 1),
    "SEEDS-2": (solvers.SEEDS(2), 2),
    "SEEDS-2, r1=0.7": (solvers.SEEDS(2, r1=0.7), 2),
    "SEEDS-3": (solvers.SEEDS(3), 2),
    "SA-P1": (solvers.SASolver(1, 0, **FLAT), 1),
    "SA-P2": (solvers.SASolver(2, 0, **FLAT), 2),
    "SA-P3C4": (solvers.SASolver(3, 4, **FLAT), 2),
    "AncestralNoise, DPM-Solver++2S": (solvers.AncestralNoise(), 2),
    "AncestralNoise, DPM-Solver++3S": (solvers.AncestralNoise(solvers.DPMSolver(3, X0()), 0.5), 3),
    "EulerMaruyama": (solvers.EulerMaruyama(last_noise=True), 1),
}


@jit
def affine_moments(solver, oracle, steps):
    """Mean and variance at the end, from the exact start: x is affine in the start and the noise.

    The walk is linearised in everything random, so nothing is sampled.
    """
    process, times = oracle.process, times_at(oracle.process, -3.0, 3.0, steps + 1)
    mean, variance = oracle.means[0], oracle.moments()[1][0, 0]
    alpha, sigma = process.alpha(times[0]), process.sigma(times[0])

    def final(x, noise):
        return walk(solver, oracle, times, x, noise=noise)[-1][0]

    value, transpose = jax.vjp(final, alpha * mean, jnp.zeros((steps, 3, 1)))
    by_start, by_noise = transpose(jnp.ones(()))
    spread = by_start[0] ** 2 * (alpha**2 * variance + sigma**2) + jnp.sum(by_noise**2)
    return value, spread, times


def variance_errors(solver, oracle, sizes):
    """How far the variance at the end is from the marginal's."""
    errors = []
    for steps in sizes:
        _, variance, times = affine_moments(solver, oracle, steps)
        alpha, sigma = oracle.process.alpha(times[-1]), oracle.process.sigma(times[-1])
        exact = alpha**2 * oracle.moments()[1][0, 0] + sigma**2
        errors.append(abs(variance - exact))
    return errors


@pytest.mark.parametrize("name", STOCHASTIC)
def test_weak_order(x64, name):
    """The mean of a Gaussian is exact for any grid, except by Euler-Maruyama."""
    solver, order = STOCHASTIC[name]
    process = processes.VP()
    oracle = oracles.gaussian(process, jnp.asarray([0.4]), jnp.asarray([[0.3]]))
    errors = variance_errors(solver, oracle, (320, 640))
    assert abs(np.log2(errors[0] / errors[1]) - order) < 0.15, errors
    mean, _, times = affine_moments(solver, oracle, 12)
    exact = process.alpha(times[-1]) * 0.4
    assert (abs(mean / exact - 1) < 1e-10) != (name == "EulerMaruyama")


def states(solver, times=None, noisy=False, oracle=None):
    oracle = mixture(processes.VP()) if oracle is None else oracle
    times = times_at(oracle.process, -4.0, 3.0, 13) if times is None else times
    noise = jax.random.normal(jax.random.key(5), (len(times) - 1, 3, 2)) if noisy else None
    return walk(solver, oracle, times, jnp.asarray([0.9, -0.4]), noise=noise)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (solvers.DPMSolver(1), solvers.DDIM()),
        (solvers.DPMSolverMultistep(1), solvers.DDIM()),
        (solvers.UniPC(1, corrector=False), solvers.DDIM()),
        (solvers.DEIS(1), solvers.DDIM()),
        (solvers.DPMSolverMultistep(2, **FLAT), solvers.UniPC(2, corrector=False, **FLAT)),
        (
            solvers.DPMSolverMultistep(3, X0(), "corrected", **FLAT),
            solvers.SASolver(3, 0, 0.0, **FLAT),
        ),
        (
            solvers.DPMSolverMultistep(3, Eps(), "corrected", **FLAT),
            solvers.DEIS(3, "log_noise_level", False),
        ),
        (
            solvers.UniPC(2, variant="bh1", corrector=False, **FLAT),
            solvers.SASolver(2, 0, 0.0, few_step=True, **FLAT),
        ),
        (solvers.SEEDS(3, 0.0), solvers.DPMSolver(3, X0())),
    ],
)
def test_identities_of_the_deterministic_methods(x64, one, other):
    np.testing.assert_allclose(states(one), states(other), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            solvers.UniPC(4, Eps(), corrector=False, **FLAT),
            solvers.DEIS(4, "log_noise_level", False),
        ),
        (solvers.UniPC(3, **FLAT), solvers.SASolver(3, 4, 0.0, **FLAT)),
    ],
)
def test_unipc_is_adams_after_its_first_steps(x64, one, other):
    """The coefficients are equal once no rule has two nodes only."""
    times = times_at(processes.VP(), -4.0, 3.0, 13)
    problem = solvers.Problem(mixture(processes.VP()), None, None, times, -1)
    full = [jax.tree.map(lambda rows: rows[3:], solver.plan(problem)) for solver in (one, other)]
    for ours, theirs in zip(*map(jax.tree.leaves, full), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (solvers.Ancestral(), solvers.DDIM(1.0)),
        (solvers.Ancestral(), solvers.SEEDS(1)),
        (solvers.Ancestral(), solvers.DPMSolverMultistep(1, eta=1.0)),
        (solvers.Ancestral(), solvers.SASolver(1, 0)),
        (
            solvers.DPMSolverMultistep(2, X0(), "heun", 0.7, False),
            solvers.SASolver(2, 0, 0.7, **FLAT),
        ),
        (
            solvers.DPMSolverMultistep(3, X0(), "corrected", 0.7, False),
            solvers.SASolver(3, 0, 0.7, **FLAT),
        ),
    ],
)
def test_identities_of_the_stochastic_methods(x64, one, other):
    np.testing.assert_allclose(
        states(one, noisy=True), states(other, noisy=True), rtol=1e-9, atol=1e-12
    )


def test_ddim_with_noise_is_the_sde_step_with_a_noise_that_depends_on_the_step(x64):
    """eta of DDIM and tau of the SDE: tau^2 = -log(1 - eta^2 (1 - e^-2h)) / (2 h)."""
    times = times_at(processes.VP(), 0.0, 0.9, 2)
    h, eta = 0.45, 0.6
    tau = np.sqrt(-np.log(1 - eta**2 * -np.expm1(-2 * h)) / (2 * h))
    np.testing.assert_allclose(
        states(solvers.DDIM(eta), times, noisy=True),
        states(solvers.SASolver(1, 0, tau), times, noisy=True),
        rtol=1e-9,
    )


def test_fourth_order_pndm_is_adams_bashforth_on_a_uniform_noise_grid(x64):
    process = processes.VP()
    times = process.time(-2 * jnp.log(jnp.linspace(4.0, 0.2, 15)))
    np.testing.assert_allclose(
        states(solvers.PNDM(4, "none"), times),
        states(solvers.DEIS(4, "noise_level", False), times),
        rtol=1e-9,
    )


@pytest.mark.parametrize(
    "solver",
    [
        solvers.DPMSolverMultistep(3),
        solvers.DPMSolverMultistep(2, Eps()),
        solvers.UniPC(3),
        solvers.DEIS(3, "log_noise_level"),
        solvers.DPMSolver(3, X0()),
        solvers.DPMSolver(2, Eps()),
        solvers.SEEDS(2),
        solvers.SASolver(),
    ],
)
def test_last_step_to_zero_returns_the_denoiser(x64, solver):
    oracle = mixture(processes.VP())
    path = states(solver, jnp.asarray([0.9, 0.7, 0.5, 0.3, 0.0]), noisy=solver.stochastic)
    if isinstance(solver, (solvers.UniPC, solvers.SASolver)):
        assert np.all(np.isfinite(path))  # there the last state is corrected before the step
    else:
        np.testing.assert_allclose(path[-1], oracle(path[-2], 0.3), rtol=1e-9)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: solvers.DPMSolverMultistep(4), ValueError, "`order`.*1 to 3, got 4"),
        (lambda: solvers.UniPC(5), ValueError, "`order`.*1 to 4, got 5"),
        (lambda: solvers.UniPC(variant="b3"), ValueError, "`variant`.*bh1, bh2, got 'b3'"),
        (lambda: solvers.DEIS(variable="sigma"), ValueError, "`variable`.*log_noise_level"),
        (lambda: solvers.DPMSolver(2, r1=1.5), ValueError, "0 < r1 < r2 < 1"),
        (lambda: solvers.SASolver(1, 3), ValueError, "`corrector_order`.*0 to 2"),
        (lambda: solvers.DPMSolverMultistep(2, solvers.DDIM()), TypeError, "X0.*Eps"),
        (lambda: states(solvers.UniPC(4), jnp.asarray([0.9, 0.5])), ValueError, "at least as many"),
    ],
)
def test_bad_input_is_named(x64, make, error, match):
    with pytest.raises(error, match=match):
        make()
