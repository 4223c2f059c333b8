"""Gradients of what is wanted of x0: exact where their covariance is, and one frame of all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import gaussian, mixture
from numpy.testing import assert_allclose

import jaxdiff
from jaxdiff import guidance, oracles, processes, solvers
from jaxdiff.stepwise import at_step

KEY = jax.random.key(0)
MATRIX = np.array([[1.0, -0.5, 0.3]])
NOISE = 0.4


def towards(x0, y):
    """log N(y; A x0, NOISE^2)."""
    return -jnp.sum((y - jnp.asarray(MATRIX) @ x0) ** 2) / (2 * NOISE**2)


def near(x0, y):
    return -jnp.linalg.norm(y - jnp.asarray(MATRIX) @ x0)


def operator(x0):
    return jnp.asarray(MATRIX) @ x0


LOG_PROB = jax.tree_util.Partial(towards)
Y = np.array([0.7])


def run(denoiser, solver=solvers.DDIM(), times=6, count=3):
    y = jnp.linspace(0.2, 1.0, count)[:, None]
    return jaxdiff.sample(KEY, denoiser, (3,), count, cond={"y": y}, solver=solver, times=times).x


def h_of(process, t, s):
    return 0.5 * (process.log_snr(s) - process.log_snr(t))


def through(scale):
    """rho of the frame, for a shift of the denoiser by scale sigma^2 / alpha times the slope."""
    return lambda process, t, s, length: (
        scale * process.sigma(t) ** 2 * -jnp.expm1(-h_of(process, t, s))
    )


def whole(scale):
    """rho of the frame, for a shift of x itself."""
    return lambda process, t, s, length: scale * process.alpha(t) / process.alpha(s)


@pytest.mark.parametrize("process", [processes.VP(), processes.Cosine()])
def test_the_frame_contains_the_others(x64, process):
    laws = gaussian(process)
    frame = lambda log_prob=LOG_PROB, **options: run(
        laws, guidance.TrainingFree(log_prob=log_prob, **{"rho": None} | options)
    )
    assert_allclose(
        run(laws, guidance.DPS(operator=jax.tree_util.Partial(operator), scale=0.1)),
        frame(jax.tree_util.Partial(near), rho=whole(0.1)),
        rtol=1e-6,
    )
    assert_allclose(
        run(
            laws,
            guidance.FreeDoM(energy=jax.tree_util.Partial(lambda x0, y: -towards(x0, y)), rho=0.02),
        ),
        frame(rho=whole(0.02)),
        rtol=1e-6,
    )
    assert_allclose(
        run(guidance.ManifoldPreserving(laws, LOG_PROB, 0.05)),
        frame(mu=0.05, iterations=1),
        rtol=1e-6,
    )
    assert_allclose(
        run(guidance.Universal(laws, LOG_PROB, 0.5, rate=0.02, iterations=3)),
        frame(rho=through(0.5), mu=0.02, iterations=3, keep_eps=False),
        rtol=1e-6,
    )
    plain = jaxdiff.sample(KEY, laws, (3,), 3, times=6).x
    assert_allclose(run(guidance.Universal(laws, LOG_PROB, 0.0)), plain, rtol=1e-9)
    assert_allclose(frame(), plain, rtol=1e-12)


def test_smoothed_losses_are_one_of_the_frame(x64):
    """With the draws of both made the same: none, of width 0."""
    laws = gaussian(processes.VP())
    found = run(guidance.LossGuidance(laws, LOG_PROB, 0.5, draws=2, width=0.0))
    frame = guidance.TrainingFree(log_prob=LOG_PROB, rho=through(0.5))
    assert_allclose(found, run(laws, frame), rtol=1e-6)


@pytest.mark.parametrize("variance", [1.0, 0.3])
def test_losses_are_exact_where_their_covariance_is(x64, variance):
    """Isotropic data of unit variance are what `width` 1 stands for; of another it is off."""
    process, t = processes.VP(), jnp.asarray(0.5)
    laws = oracles.gaussian(process, jnp.zeros(3), variance * jnp.eye(3))
    exact = laws.condition(jnp.asarray(MATRIX), jnp.asarray(Y), NOISE)
    x, y = jnp.asarray([0.3, -0.2, 0.9]), {"y": jnp.asarray(Y)}
    guided = guidance.LossGuidance(laws, LOG_PROB, draws=200_000)
    found = jax.jit(lambda x: at_step(guided, jaxdiff.Step(t, t / 2, KEY))(x, t, y))(x)
    alpha, sigma = process.alpha(t), process.sigma(t)
    kept = alpha * variance / (alpha**2 * variance + sigma**2)  # the Jacobian
    square = sigma**2 / (alpha**2 + sigma**2)
    total = square * MATRIX @ MATRIX.T + NOISE**2
    push = kept * MATRIX.T @ np.linalg.solve(total, Y - MATRIX @ laws(x, t))
    expected = laws(x, t) + sigma**2 / alpha * push
    assert_allclose(found, expected, atol=0.01)
    off = np.abs(expected - exact(x, t)).max()
    assert off < 1e-12 if variance == 1.0 else off > 0.02


def test_without_a_covariance_a_measurement_is_trusted_too_much(x64):
    """`Universal` forward is Bayes' rule with the posterior's covariance left out."""
    process, t = processes.VP(), jnp.asarray(0.6)
    laws = gaussian(process)
    x, y = jnp.asarray([0.3, -0.2, 0.9]), jnp.asarray(Y)
    jacobian = np.asarray(jax.jacfwd(lambda x: laws(x, t))(x))
    found = guidance.Universal(laws, LOG_PROB)(x, t, {"y": y})
    factor = process.sigma(t) ** 2 / process.alpha(t)
    pull = lambda total: (
        factor * jacobian.T @ MATRIX.T @ np.linalg.solve(total, Y - MATRIX @ laws(x, t))
    )
    noise = NOISE**2 * np.eye(1)
    assert_allclose(found, laws(x, t) + pull(noise), rtol=1e-9)
    exact = laws.condition(jnp.asarray(MATRIX), y, NOISE)
    spread = MATRIX @ (factor * jacobian) @ MATRIX.T
    assert_allclose(exact(x, t), laws(x, t) + pull(noise + spread), rtol=1e-9)


def test_manifold_preserving_is_dps_where_the_jacobian_is_a_number(x64):
    process, t = processes.VP(), jnp.asarray(0.6)
    laws = oracles.gaussian(process, jnp.zeros(3), 0.5 * jnp.eye(3))
    x, y = jnp.asarray([0.3, -0.2, 0.9]), {"y": jnp.asarray(Y)}
    moved = guidance.ManifoldPreserving(laws, LOG_PROB, 1.0)(x, t, y) - laws(x, t)
    other = guidance.Universal(laws, LOG_PROB)(x, t, y) - laws(x, t)
    assert_allclose(moved / other, (moved / other)[0], rtol=1e-9)


def test_strengths_are_swept_in_one_program(x64):
    laws, y = gaussian(processes.VP()), jnp.ones((2, 1))
    traces = []

    class Traced(jaxdiff.DenoiserMap):
        base: jaxdiff.Denoiser

        def __call__(self, x, t, cond=None, *, key=None):
            traces.append(1)
            return self.base(x, t, cond, key=key)

    def at(rho):
        solver = guidance.TrainingFree(log_prob=LOG_PROB, rho=rho, mu=0.02, iterations=1)
        return jaxdiff.sample(KEY, Traced(laws), (3,), 2, cond={"y": y}, solver=solver, times=4)

    alone = [at(rho) for rho in (0.02, 0.05)]
    count = len(traces)
    at(0)
    assert len(traces) == count and alone[0].nfe[0] == 4
    swept = jax.vmap(at)(jnp.asarray([0.02, 0.05]))
    for one, found in zip(alone, swept.x, strict=True):
        assert_allclose(found, one.x, rtol=1e-9)


def test_recurrence_leaves_an_exact_sampler_as_it_is(x64):
    """Of steps so many that DDIM is nearly exact; the cost is counted."""
    laws = oracles.gaussian(processes.VP(), jnp.zeros(2), 0.5 * jnp.eye(2))
    solver = guidance.Recurrence(count=3, t_low=0.3, t_high=0.8)
    times = jnp.linspace(1.0, 0.0, 161)
    out = jaxdiff.sample(KEY, laws, (2,), 4000, solver=solver, times=times)
    inside = ((times[:-1] >= 0.3) & (times[:-1] <= 0.8)).sum()
    assert out.nfe[0] == 160 + 2 * inside
    assert_allclose(np.cov(np.asarray(out.x).T), 0.5 * np.eye(2), atol=0.05)
    plain = jaxdiff.sample(KEY, laws, (2,), 4000, times=times)
    assert not np.allclose(out.x, plain.x, atol=0.1)
    once = jaxdiff.sample(KEY, laws, (2,), 3, solver=guidance.Recurrence(count=1), times=5)
    np.testing.assert_array_equal(once.x, jaxdiff.sample(KEY, laws, (2,), 3, times=5).x)


@pytest.mark.usefixtures("unchecked")
def test_errors():
    laws = mixture(processes.VP(), jnp.float32)
    vector = jax.tree_util.Partial(lambda x0, y: x0)
    scalar = jax.tree_util.Partial(lambda x0, y: jnp.sum(x0 * y))
    cond = {"y": jnp.ones((1, 2))}
    go = lambda denoiser, solver=solvers.DDIM(), cond=cond: jaxdiff.sample(
        KEY, denoiser, (2,), 1, cond=cond, solver=solver, times=2
    )
    for denoiser, solver in (
        (guidance.Universal(laws, vector), solvers.DDIM()),
        (guidance.ManifoldPreserving(laws, vector), solvers.DDIM()),
        (laws, guidance.TrainingFree(log_prob=vector)),
    ):
        with pytest.raises(ValueError, match="`log_prob` must return a floating scalar"):
            go(denoiser, solver)
    with pytest.raises(ValueError, match="the entries 'y'"):
        go(laws, guidance.TrainingFree(log_prob=scalar), None)
    with pytest.raises(ValueError, match="`y` must have the shape of what `operator` returns"):
        go(laws, guidance.DPS(operator=jax.tree_util.Partial(lambda x0: x0[:1])))
    with pytest.raises(ValueError, match="must be a solver of single steps"):
        guidance.Recurrence(solvers.DPMSolverMultistep(2))
    with pytest.raises(ValueError, match="`count` must be at least 1"):
        guidance.Recurrence(count=0)
    with pytest.raises(TypeError, match="must be an ExplicitSolver"):
        go(laws, guidance.FreeDoM(solvers.EDICT(), energy=scalar))
