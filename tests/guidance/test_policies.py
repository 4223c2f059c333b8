"""Guidance in fewer evaluations: weights by step, their search, and branches that are replaced."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Counting, mixture
from numpy.testing import assert_allclose, assert_array_equal

import jaxdiff
from jaxdiff import guidance, oracles, processes, solvers
from jaxdiff.guidance import GuidancePolicy, LinearAdaptiveGuidance

KEY = jax.random.key(0)
PAIR = np.array([[1.0, -0.5], [-0.4, 0.8]])
SCALE = 3.0


def pair(covariance, process=None):
    """Two Gaussians of one covariance: class 0, and 1 for none."""
    process = processes.VP() if process is None else process
    covariances = jnp.stack([jnp.asarray(covariance)] * 2)
    return oracles.gaussian_mixture(process, jnp.asarray(PAIR), covariances, labels=[0, 1])


def isotropic(variance):
    return pair(variance * np.eye(2))


def run(denoiser, count=4, steps=6, solver=solvers.DDIM()):
    cond = jnp.zeros(count, int)
    return jaxdiff.sample(KEY, denoiser, (2,), count, cond=cond, times=steps, solver=solver)


def cfg(laws, scale=SCALE):
    return guidance.ClassifierFree(laws, null_cond=1, scale=scale)


def test_policies_of_one_weight_are_guidance_and_skip_what_they_need_not(x64):
    laws = isotropic(0.25)
    for weight, each in ((1.0, 1), (0.0, 1), (SCALE, 2)):
        found = run(GuidancePolicy(laws, 1, jnp.full(6, weight)))
        assert_allclose(found.x, run(cfg(laws, weight)).x, rtol=1e-12)
        assert found.nfe.tolist() == [6 * each] * 4
    counting = Counting(laws)
    policy = GuidancePolicy(counting, 1, jnp.asarray([3.0, 1.0, 0.0, 2.0, 1.0, 1.0]))
    # A single example: a branch of two is one call.
    assert run(policy, 1).nfe[0] == 8
    jax.effects_barrier()
    assert len(counting.calls) == 6


def test_a_policy_is_the_step_by_step_choice(x64):
    """Each step by itself, with guidance of its weight, on a mixture."""
    laws = mixture(processes.VP())
    times = jnp.linspace(1.0, 0.0, 5)
    weights = jnp.asarray([2.5, 1.0, 0.0, 4.0])
    policy = GuidancePolicy(laws, 2, weights)
    cond = jnp.arange(3) % 2
    out = jaxdiff.sample(KEY, policy, (2,), 3, cond=cond, times=times)

    @jax.jit
    def step(x, weight, ends):
        guided = guidance.ClassifierFree(laws, null_cond=2, scale=weight)
        return jaxdiff.denoise(KEY, guided, x, cond=cond, times=ends).x

    x = jax.vmap(lambda i: laws.process.prior(
        jax.random.split(jax.random.fold_in(KEY, i))[0], (2,), times[0], jnp.dtype(float)
    ))(jnp.arange(3))  # fmt: skip
    for i, weight in enumerate(weights):
        x = step(x, weight, times[i : i + 2])
    assert_allclose(out.x, x, rtol=1e-9)


def shifts(variance, steps=6):
    """What each step of guidance adds to the end, in units of (scale - 1)(m_c - m_u)."""
    process = processes.VP()
    t = np.linspace(1.0, 0.0, steps + 1)
    a, b = (np.asarray(jax.vmap(f)(jnp.asarray(t))) for f in (process.alpha, process.sigma))
    spread = a**2 * variance + b**2
    # DDIM of an isotropic Gaussian: x' = c x + ..., and D moves by b^2 / spread of the mean's.
    carried = (a[1:] * a[:-1] * variance + b[1:] * b[:-1]) / spread[:-1]
    added = (a[1:] - b[1:] * a[:-1] / b[:-1]) * b[:-1] ** 2 / spread[:-1]
    return np.array([added[i] * np.prod(carried[i + 1 :]) for i in range(steps)])


@pytest.fixture(scope="module", params=[1.0, 0.25])
def searched(request):
    with jax.enable_x64(True):
        laws = isotropic(request.param)
        found = guidance.search_policy(
            KEY, laws, 1, (2,), 4, scale=SCALE, target=[8.0, 10.0], cond=jnp.zeros(4, int),
            times=6, seeds=2, num_iterations=150,
        )  # fmt: skip
        return request.param, found


def test_the_search_finds_the_best_of_all_policies(x64, searched):
    """Of all 64 with guidance or none in six steps, by the closed form, at no more evaluations."""
    variance, found = searched
    share = shifts(variance)
    binary = np.array(list(itertools.product([0, 1], repeat=6)))
    errors = (1 - binary @ share / share.sum()) ** 2
    assert found.weights.shape == (2, 2, 6) and found.losses.shape == (2, 2, 150)
    for i, target in enumerate((8, 10)):
        best = errors[binary.sum(1) + 6 <= target].min()
        for seed in range(2):
            assert found.evaluations[i, seed] <= target
            assert_allclose(found.error[i, seed], best, rtol=1e-6)
    # Late steps deliver most.
    assert share[-1] > share[0]


def test_a_found_policy_runs_as_it_was_measured(x64, searched):
    variance, found = searched
    laws = isotropic(variance)
    out = run(GuidancePolicy(laws, 1, found.weights[0, 0]))
    assert out.nfe[0] == found.evaluations[0, 0]
    guided, plain = run(cfg(laws)).x, run(laws).x
    error = np.mean((out.x - guided) ** 2) / np.mean((plain - guided) ** 2)
    assert_allclose(error, found.error[0, 0], rtol=1e-9)
    assert_allclose(found.probabilities.sum(-1), 1.0, rtol=1e-9)


def test_searches_of_other_numbers_do_not_recompile(x64):
    traces = []

    class Traced(jaxdiff.DenoiserMap):
        base: jaxdiff.Denoiser

        def __call__(self, x, t, cond=None, *, key=None):
            traces.append(1)
            return self.base(x, t, cond, key=key)

    laws = Traced(isotropic(0.25))
    go = lambda scale, target, penalty: guidance.search_policy(
        KEY, laws, 1, (2,), 2, scale=scale, target=target, cond=jnp.zeros(2, int), times=2,
        num_iterations=2, penalty=penalty,
    )  # fmt: skip
    go(3.0, 3.0, 1.0)
    count = len(traces)
    go(2.0, 4, 0.5)
    assert len(traces) == count > 0


def f_of(process, variance, t):
    a, b = process.alpha(t), process.sigma(t)
    return a * b / (a**2 * variance + b**2)


KINDS = np.array([2, 1, 1, 2, 1, 0, 0])


@pytest.fixture(scope="module")
def fitted():
    """Fits on two samples, isotropic and not, of a solver that draws and one that does not."""
    with jax.enable_x64(True):
        return {
            (name, kind): guidance.fit_linear_guidance(
                KEY, laws, 1, (2,), 8, scale=SCALE, cond=jnp.zeros(8, int), kinds=KINDS, past=1,
                solver=solver, times=7,
            )
            for name, laws in (
                ("isotropic", isotropic(0.25)),
                ("correlated", pair([[1.0, 0.3], [0.3, 0.2]])),
            )
            for kind, solver in (("drawn", solvers.Ancestral()), ("flow", solvers.DDIM()))
        }  # fmt: skip


def test_one_step_of_memory_is_exact_for_isotropic_gaussians(x64, fitted):
    """Coefficients and samples, three replaced steps; two of them one after the other."""
    found, process = fitted["isotropic", "drawn"], processes.VP()
    f = np.asarray(f_of(process, 0.25, jnp.linspace(1.0, 0.0, 8)))
    for i in (1, 2, 4):
        ratio = f[i] / f[i - 1]
        assert_allclose(found.guidance.of_cond[i], [1.0, -ratio], rtol=1e-9, atol=1e-9)
        assert_allclose(found.guidance.of_null[i], [ratio], rtol=1e-9, atol=1e-9)
    laws = isotropic(0.25)
    weights = jnp.where(KINDS > 0, SCALE, 1.0)
    for kind, solver in (("drawn", solvers.Ancestral()), ("flow", solvers.DDIM())):
        guided = fitted["isotropic", kind].guidance
        assert np.all(fitted["isotropic", kind].residual[1:5] < 1e-9)
        out = run(guided, 5, 7, solver)
        whole = run(GuidancePolicy(laws, 1, weights), 5, 7, solver)
        assert_allclose(out.x, whole.x, rtol=1e-9, atol=1e-9)
        assert (out.nfe[0], whole.nfe[0]) == (7 + 2, 7 + 5)


def test_of_another_covariance_a_rest_remains(x64, fitted):
    """Each axis has a ratio of its own, so that no number serves both."""
    for kind, solver in (("drawn", solvers.Ancestral()), ("flow", solvers.DDIM())):
        found = fitted["correlated", kind]
        assert np.all(found.residual[1:5] < 1)
        assert np.all(found.residual[np.array([1, 2, 4])] > 1e-4)
        laws = pair([[1.0, 0.3], [0.3, 0.2]])
        weights = jnp.where(KINDS > 0, SCALE, 1.0)
        out = run(found.guidance, 5, 7, solver).x
        whole = run(GuidancePolicy(laws, 1, weights), 5, 7, solver).x
        without = run(GuidancePolicy(laws, 1, jnp.where(KINDS > 1, SCALE, 1.0)), 5, 7, solver).x
        off, left_out = np.abs(out - whole).max(), np.abs(without - whole).max()
        assert 1e-4 < off < left_out / 3


def test_replaced_evaluations_are_not_made(x64, fitted):
    guided = fitted["isotropic", "flow"].guidance
    counting = Counting(guided.base)
    out = run(dataclasses.replace(guided, base=counting), 1, 7)
    jax.effects_barrier()
    # Both branches at once are one call.
    assert out.nfe[0] == 9 and len(counting.calls) == 7


def test_the_published_turns_are_the_default(x64):
    laws = isotropic(0.25)
    found = guidance.fit_linear_guidance(
        KEY, laws, 1, (2,), 6, scale=SCALE, cond=jnp.zeros(6, int), times=8
    )
    assert found.guidance.kinds.tolist() == [2, 1, 2, 1, 0, 0, 0, 0]
    assert found.guidance.of_cond.shape == (8, 3)
    assert np.all(found.residual[1:4] < 1e-8)


@pytest.mark.usefixtures("unchecked")
def test_where_nothing_is_guided_nothing_is_left(x64):
    """Of the null label as the condition both noises are one, and the residual is 0."""
    laws = mixture(processes.VP())
    found = guidance.fit_linear_guidance(
        KEY, laws, 1, (2,), 8, scale=2.0, cond=jnp.ones(8, int), times=4
    )
    assert_array_equal(found.residual, 0)


def test_errors():
    laws = isotropic(0.25)
    with pytest.raises(ValueError, match="one row per step of the grid, 5, got 4"):
        run(GuidancePolicy(laws, 1, jnp.ones(4)), steps=5)
    with pytest.raises(ValueError, match=r"one number per step, \(num_steps,\)"):
        GuidancePolicy(laws, 1, jnp.ones((2, 3)))
    with pytest.raises(TypeError, match="was called outside of one"):
        GuidancePolicy(laws, 1, jnp.ones(4))(jnp.zeros(2), jnp.asarray(0.5), 0)
    a, b = jnp.ones((3, 2)), jnp.ones((3, 1))
    with pytest.raises(ValueError, match="not begin with 1"):
        LinearAdaptiveGuidance(laws, 1, a, b, jnp.asarray([1, 2, 0]))
    with pytest.raises(ValueError, match="must have the shapes"):
        LinearAdaptiveGuidance(laws, 1, a, a, jnp.asarray([2, 1, 0]))
    with pytest.raises(ValueError, match="`kinds` must be integers"):
        LinearAdaptiveGuidance(laws, 1, a, b, jnp.ones(3))
    with pytest.raises(ValueError, match="`scale` must not be 1"):
        guidance.search_policy(KEY, laws, 1, (2,), 2, scale=1.0, target=8.0)
    with pytest.raises(ValueError, match="`kinds` must have one per step, 20"):
        guidance.fit_linear_guidance(KEY, laws, 1, (2,), 2, scale=2.0, kinds=[2, 0])
