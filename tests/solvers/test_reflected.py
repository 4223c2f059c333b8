"""Reflected diffusion against exact kernels, flows and laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import mixture

import jaxdiff
from jaxdiff import processes, solvers
from jaxdiff.denoiser import Denoiser
from jaxdiff.processes import Process
from jaxdiff.solvers import _reflected
from jaxdiff.solvers._reflected import (
    Reflected,
    reflect,
    reflected_kernel_score,
    reflected_log_kernel,
    reflected_marginal,
)


class CosineOracle(Denoiser):
    """The exact denoiser of a reflected process whose data have a density known by its cosines.

    p_k(z) = 1 + 2 sum_n a_n exp(-n^2 pi^2 k^2 / 2) cos(n pi z) on [0, 1]^d, coordinates
    independent, and on [low, high]^d by scaling.
    """

    process: Process
    coefficients: jax.Array
    low: float = 0.0
    high: float = 1.0

    def _terms(self, level):
        n = jnp.pi * jnp.arange(1, len(self.coefficients) + 1)
        return n, 2 * self.coefficients * jnp.exp(-0.5 * (n * level / (self.high - self.low)) ** 2)

    def density(self, y, level):
        n, weights = self._terms(level)
        z = (jnp.asarray(y) - self.low) / (self.high - self.low)
        return (1 + jnp.cos(n * z[..., None]) @ weights) / (self.high - self.low)

    def cdf(self, y, level):
        n, weights = self._terms(level)
        z = (jnp.asarray(y) - self.low) / (self.high - self.low)
        return z + jnp.sin(n * z[..., None]) @ (weights / n)

    def score(self, y, level):
        n, weights = self._terms(level)
        width = self.high - self.low
        z = (y - self.low) / width
        slope = -jnp.sin(n * z[..., None]) @ (weights * n) / width**2
        return slope / self.density(y, level)

    def __call__(self, x, t, cond=None, *, key=None):
        alpha = self.process.alpha(t)
        y, level = x / alpha, self.process.sigma(t) / alpha
        return (y + level**2 * self.score(y, level)).astype(x.dtype)


def truncated_mixture(process, low=0.0, high=1.0, dtype=jnp.float32):
    """Two Gaussians cut off at the faces of [0, 1], where their density is not small."""
    z = (np.arange(4000) + 0.5) / 4000
    density = np.exp(-(((z - 0.05) / 0.15) ** 2) / 2) + 0.7 * np.exp(-(((z - 0.7) / 0.1) ** 2) / 2)
    n = np.arange(1, 33)
    coefficients = np.cos(np.pi * n[:, None] * z) @ density / density.sum()
    return CosineOracle(process, jnp.asarray(coefficients, dtype), low, high)


def test_reflection_folds_and_leaves_the_inside_alone():
    x = jnp.asarray([-0.25, 1.25, 2.25, -2.5, 3.75, 0.3, 0.0, 1.0])
    np.testing.assert_allclose(reflect(x, 0.0, 1.0), [0.25, 0.75, 0.25, 0.5, 0.25, 0.3, 0, 1])
    inside = jax.random.uniform(jax.random.key(0), (1000,), minval=-0.7, maxval=0.1)
    np.testing.assert_array_equal(reflect(inside, -0.7, 0.1), inside)
    far = reflect(1e3 * jax.random.normal(jax.random.key(1), (10_000,)), -0.7, 0.1)
    assert far.min() >= np.float32(-0.7) and far.max() <= np.float32(0.1)
    slope = jax.vmap(jax.grad(lambda x: reflect(x, 0.0, 1.0)))(x[:6])
    np.testing.assert_array_equal(slope, [-1, -1, 1, -1, -1, 1])


def test_image_and_eigenfunction_sums_agree_where_both_converge(x64):
    """In value and in all derivatives, that in k at the very crossover included."""
    grid = jnp.linspace(0.0, 1.0, 21)
    y, x0 = (axis.reshape(-1) for axis in jnp.meshgrid(grid, grid))

    @jax.jit
    def both(k):
        def value_and_derivatives(fn):
            point = (y, x0, jnp.full_like(y, k))
            return fn(*point), *jax.grad(lambda *p: fn(*p).sum(), argnums=(0, 1, 2))(*point)

        images = value_and_derivatives(_reflected._log_images)
        library = value_and_derivatives(lambda *p: reflected_log_kernel(*p, 0.0, 1.0))
        return images, value_and_derivatives(_reflected._log_series), library

    for level in (0.3, 0.4, 0.5, 0.6, 0.75):
        images, series, library = both(jnp.asarray(level))
        for a, b, c in zip(images, series, library, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)
            np.testing.assert_allclose(c, b, rtol=1e-10, atol=1e-10)


def test_the_kernel_is_normalised_symmetric_and_a_semigroup(x64):
    low, high, count = -1.0, 2.0, 3000
    y = low + (jnp.arange(count) + 0.5) * (high - low) / count
    kernel = jax.jit(
        lambda y, x0, k: jnp.exp(reflected_log_kernel(y, x0, jnp.asarray(k), low, high))
    )
    for level in (0.05, 1.0, 1.49, 1.51, 30.0):
        np.testing.assert_allclose(
            kernel(y, jnp.asarray(-0.9), level).mean() * (high - low), 1, rtol=1e-9
        )
    a, b = jnp.asarray(-0.9), jnp.asarray(1.7)
    np.testing.assert_allclose(kernel(a, b, 0.7), kernel(b, a, 0.7), rtol=1e-12)
    # Noise of k1 and then of k2 is noise of sqrt(k1^2 + k2^2), across the crossover.
    twice = (kernel(y, a, 1.2) * kernel(b, y, 1.6)).mean() * (high - low)
    np.testing.assert_allclose(twice, kernel(b, a, 2.0), rtol=1e-9)
    np.testing.assert_allclose(kernel(a, b, 30.0), 1 / 3, rtol=1e-9)


def test_the_kernel_is_the_density_of_folded_noise():
    """Cell frequencies of reflect(x0 + k n), for small and large noise, in standard errors."""
    count, edges = 200_000, np.linspace(-1, 1, 21)
    x0, process = jnp.asarray(-0.8), processes.VP()
    fine = jnp.linspace(-1, 1, 2001)[:-1] + 5e-4
    for level in (0.3, 1.3):
        t = process.time(-2 * jnp.log(jnp.asarray(level)))
        eps = jax.random.normal(jax.random.key(2), (count,))
        y = reflected_marginal(process, x0, eps, t) / process.alpha(t)
        density = jnp.exp(reflected_log_kernel(fine, x0, jnp.asarray(level)))
        expected = np.asarray(density, np.float64).reshape(20, 100).mean(1) / 10
        frequency = np.histogram(y, edges)[0] / count
        error = np.sqrt(expected * (1 - expected) / count)
        assert np.abs((frequency - expected) / error).max() < 4


LEVELS = (1e-3, 0.05, 0.3, 0.99, 1.01, 5.0, 100.0)


def test_the_score_is_zero_at_the_faces(x64):
    faces, x0 = jnp.asarray([-1.0, 1.0]), jnp.asarray([-1.0, -0.3, 0.9, 1.0])
    score = jax.jit(
        lambda k: reflected_kernel_score(faces, x0[:, None, None], k[:, None])
    )  # every face, x0 and level
    k = jnp.asarray(LEVELS)
    np.testing.assert_allclose(k[:, None] ** 2 * score(k), 0, atol=1e-9)


def test_scores_and_their_derivatives_are_finite_in_single_precision():
    y, x0 = jnp.linspace(-1.0, 1.0, 101), jnp.asarray([-1.0, -0.3, 0.9])[:, None, None]
    k = jnp.asarray(LEVELS)[:, None]

    @jax.jit
    def derivatives(y, k):
        fn = lambda y: reflected_kernel_score(y, x0, k)
        score, slope = jax.jvp(fn, (y,), (jnp.ones_like(y),))
        return score, slope, jax.grad(lambda k: reflected_log_kernel(y, x0, k).sum())(k)

    for value in derivatives(y, k):
        assert np.all(np.isfinite(value))
    # Far from the faces it is Gaussian's; in the tails, too, where the density underflows.
    k = jnp.asarray(0.01)
    score = reflected_kernel_score(jnp.asarray(0.8), jnp.asarray(0.0), k)
    np.testing.assert_allclose(score, -0.8 / k**2, rtol=1e-5)


def test_the_exact_denoiser_is_a_mixture_of_kernels(x64):
    """The test's cosines against the library's kernel summed over discretised data."""
    oracle = truncated_mixture(processes.VP(), -1.0, 1.0, jnp.float64)
    atoms = -1 + 2 * (jnp.arange(2000) + 0.5) / 2000
    weights = oracle.density(atoms, 0.0)
    assert weights.min() > 0
    y = jnp.linspace(-1.0, 1.0, 9)

    @jax.jit
    def both(level):
        def log_density(y):
            log_kernel = reflected_log_kernel(y, atoms, level)
            return jax.nn.logsumexp(log_kernel, b=weights)

        t = oracle.process.time(-2 * jnp.log(level))
        mine = jax.vmap(lambda x: oracle(x[None], t))(oracle.process.alpha(t) * y)[:, 0]
        return mine, y + level**2 * jax.vmap(jax.grad(log_density))(y)

    for level in (0.1, 0.6, 1.4):
        np.testing.assert_allclose(*both(jnp.asarray(level)), atol=1e-9)


@pytest.mark.parametrize("process", ["VE", "VP"])
def test_reverse_euler_maruyama_with_reflection_has_the_law_of_the_data(process):
    """Histograms at a small last noise level, and nothing outside the box."""
    process = processes.EDM(t_max=3.0) if process == "VE" else processes.VP()
    low, high = (0.0, 1.0) if isinstance(process, processes.EDM) else (-1.0, 1.0)
    oracle = truncated_mixture(process, low, high)
    width, count = high - low, 10_000
    levels = width * jnp.geomspace(1.5, 0.03, 150)
    times = process.time(-2 * jnp.log(levels))
    solver = Reflected(solvers.Ancestral(1.0), low, high)
    x = jaxdiff.sample(
        jax.random.key(4), oracle, (2,), count, solver=solver, times=times, batch_size=5000
    ).x
    y = np.asarray(x / process.alpha(times[-1]))
    # Where alpha is not 1, multiplying and dividing by it may round.
    slack = 0 if isinstance(process, processes.EDM) else 1e-6
    assert y.min() >= low - slack and y.max() <= high + slack
    edges = np.linspace(low, high, 21)
    expected = np.diff(np.asarray(oracle.cdf(edges, levels[-1]), np.float64))
    error = np.sqrt(expected * (1 - expected) / count)
    for coordinate in range(2):
        frequency = np.histogram(np.clip(y[:, coordinate], low, high), edges)[0] / count
        assert np.abs((frequency - expected) / error).max() < 4
    assert abs(np.corrcoef(y.T)[0, 1]) < 4 / np.sqrt(count)


def test_without_reflection_samples_leave_the_box():
    oracle = truncated_mixture(processes.EDM(t_max=3.0))
    levels = jnp.geomspace(1.5, 0.03, 50)
    start = jax.random.uniform(jax.random.key(5), (5000, 1))
    solver = solvers.Ancestral(1.0)
    x = jaxdiff.denoise(jax.random.key(6), oracle, start, solver=solver, times=levels).x
    assert np.mean((x < 0) | (x > 1)) > 0.1


def test_a_step_of_uniform_data_is_exact_at_any_size():
    """Zero score: two huge steps leave the uniform law as it is, and the prior becomes it."""
    oracle = CosineOracle(processes.EDM(t_max=3.0), jnp.zeros(1))
    count = 50_000
    times = jnp.asarray([2.0, 0.7, 0.05])
    solver = Reflected(solvers.Ancestral(1.0), 0.0, 1.0)
    x = jaxdiff.sample(jax.random.key(7), oracle, (1,), count, solver=solver, times=times).x
    frequency = np.histogram(x, np.linspace(0, 1, 21))[0] / count
    assert np.abs(frequency - 0.05).max() < 4 * np.sqrt(0.05 * 0.95 / count)


FLOWS = {
    "DDIM": (solvers.DDIM(), 1),
    "DPM++2M": (solvers.DPMSolverMultistep(), 2),
}


@pytest.mark.parametrize("name", FLOWS)
def test_the_probability_flow_keeps_its_order_and_carries_quantiles(x64, name):
    """In one dimension the flow preserves the distribution function: F_s(y_s) = F_t(y_t)."""
    base, order = FLOWS[name]
    process = processes.VP()
    oracle = truncated_mixture(process, -1.0, 1.0, jnp.float64)
    start = jnp.linspace(-1.0, 1.0, 41)[:, None]
    ends = jnp.asarray([2.0, 0.1])
    errors = []
    for steps in (40, 80):
        levels = jnp.geomspace(*ends, steps + 1)
        times = process.time(-2 * jnp.log(levels))
        x = jaxdiff.denoise(
            jax.random.key(0),
            oracle,
            process.alpha(times[0]) * start,
            solver=Reflected(base),
            times=times,
        ).x
        y = x[:, 0] / process.alpha(times[-1])
        assert y.min() >= -1 - 1e-12 and y.max() <= 1 + 1e-12
        errors.append(np.abs(oracle.cdf(y, ends[1]) - oracle.cdf(start[:, 0], ends[0])).max())
    assert errors[1] < 0.02
    assert abs(np.log2(errors[0] / errors[1]) - order) < 0.35


def test_a_box_that_is_never_left_changes_nothing():
    """Plans, memory, noise and cost are the base's."""
    oracle, base = mixture(processes.VP(), jnp.float32), solvers.SASolver()
    run = lambda solver: jaxdiff.sample(
        jax.random.key(8), oracle, (2,), 16, solver=solver, times=10
    )
    plain, boxed = run(base), run(Reflected(base, -1e4, 1e4))
    np.testing.assert_array_equal(boxed.x, plain.x)
    np.testing.assert_array_equal(boxed.nfe, plain.nfe)
    assert Reflected(base).stochastic and not Reflected(solvers.DDIM()).stochastic


def test_faces_in_the_wrong_order_are_named():
    with pytest.raises(ValueError, match=r"`high` must be above 1, got -1"):
        Reflected(solvers.DDIM(), 1, -1)
