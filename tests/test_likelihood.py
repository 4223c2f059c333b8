import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import gaussian, mixture
from jax.scipy.stats import norm

from jaxdiff import oracles, processes, solvers
from jaxdiff.denoiser import Denoiser, DenoiserMap
from jaxdiff.likelihood import bits_per_dim, dequantize, log_likelihood
from jaxdiff.traces import ExactTrace, Hutchinson, HutchPlusPlus

TIGHT = diffrax.PIDController(rtol=1e-7, atol=1e-7)
# alpha at t_max is so small that the prior is the exact marginal.
FLOW = lambda: processes.RectifiedFlow(t_max=1.0 - 1e-9)


def data(oracle, count=6):
    return jax.vmap(oracle.sample_data)(jax.random.split(jax.random.key(3), count))


def truth(oracle, x, t, cond=None):
    return jax.vmap(lambda x, cond: oracle.log_prob(x, t, cond))(x, cond)


def with_exact_prior(oracle, out, cond=None):
    """The log-likelihood, with the exact marginal at t_max in place of the Gaussian prior."""
    t_max = oracle.process.t_max
    axes = tuple(range(1, out.latent.ndim))
    prior = norm.logpdf(out.latent, scale=oracle.process.sigma(t_max)).sum(axes)
    return out.log_prob - prior + truth(oracle, out.latent, t_max, cond)


@pytest.mark.parametrize(
    "process",
    [
        processes.VP,
        processes.EDM,
        processes.RectifiedFlow,
    ],
)
def test_density_of_a_mixture(x64, process):
    oracle = mixture(process())
    x = data(oracle)
    out = log_likelihood(oracle, x, stepsize_controller=TIGHT)
    np.testing.assert_allclose(
        with_exact_prior(oracle, out), truth(oracle, x, oracle.process.t_min), atol=1e-5
    )
    np.testing.assert_array_equal(out.standard_error, 0.0)
    assert bool((out.result == diffrax.RESULTS.successful).all())


@pytest.mark.parametrize("process", [processes.VP, processes.EDM, FLOW])
def test_density_and_latent_of_a_gaussian(x64, process):
    oracle = gaussian(process())
    t_min, t_max = oracle.process.t_min, oracle.process.t_max
    x = data(oracle)
    out = log_likelihood(oracle, x, trace=ExactTrace(chunk=2), stepsize_controller=TIGHT)
    np.testing.assert_allclose(with_exact_prior(oracle, out), truth(oracle, x, t_min), atol=1e-5)
    latent = jax.vmap(lambda x: oracles.gaussian_flow_map(oracle, x, t_min, t_max))(x)
    np.testing.assert_allclose(out.latent, latent, rtol=1e-5, atol=1e-5)


def test_density_is_the_same_in_the_plain_variables(x64):
    oracle = mixture(processes.VP(t_min=1e-3))
    process, x = oracle.process, data(oracle, 3)

    def field(t, state, args):
        del args

        def drift(x):
            x0 = oracle(x, t)
            score = (process.alpha(t) * x0 - x) / process.sigma(t) ** 2
            return process.drift(t) * x - 0.5 * process.diffusion(t) ** 2 * score

        return drift(state[0]), jnp.trace(jax.jacfwd(drift)(state[0]))

    def one(x):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Dopri5(),
            process.t_min,
            process.t_max,
            None,
            (x, jnp.zeros(())),
            stepsize_controller=TIGHT,
        )
        latent = solution.ys[0][0]
        return norm.logpdf(latent, scale=process.sigma(process.t_max)).sum() + solution.ys[1][0]

    out = log_likelihood(oracle, x, stepsize_controller=TIGHT)
    np.testing.assert_allclose(out.log_prob, jax.vmap(one)(x), atol=1e-5)


def test_density_under_a_condition_and_the_null_condition(x64):
    # With nothing left at t_max the prior is exact, and the density needs no correction.
    oracle = mixture(FLOW())
    cond = jnp.asarray([0, 1, 0, 1, 2, 2])
    x = data(oracle)
    out = log_likelihood(oracle, x, cond=cond, stepsize_controller=TIGHT)
    expected = truth(oracle, x, oracle.process.t_min, cond)
    np.testing.assert_allclose(out.log_prob, expected, atol=1e-5)
    assert np.abs(expected - truth(oracle, x, oracle.process.t_min)).max() > 0.1


def test_fixed_grids_converge_at_the_order_of_the_solver(x64):
    oracle = mixture(processes.VP(t_min=1e-3))
    x = data(oracle)

    def error(steps):
        times = solvers.log_snr_times(oracle.process, steps)[::-1]
        options = {"solver": diffrax.Heun(), "stepsize_controller": None}
        out = log_likelihood(oracle, x, times=times, **options)
        return np.abs(with_exact_prior(oracle, out) - truth(oracle, x, 1e-3)).max()

    coarse, fine = error(50), error(100)
    assert fine < 0.05
    assert abs(np.log2(coarse / fine) - 2) < 0.35


def test_events_of_any_shape_and_chunks_of_any_size(x64):
    flat = gaussian(processes.VP(t_min=1e-2), size=4)
    image = eqx.tree_at(lambda o: o.means, flat, flat.means.reshape(1, 2, 2, 1))
    x = data(flat, 3)
    options = {"times": 10, "stepsize_controller": None}
    whole = log_likelihood(flat, x, **options).log_prob
    out = log_likelihood(image, x.reshape(3, 2, 2, 1), trace=ExactTrace(3), **options)
    assert out.latent.shape == (3, 2, 2, 1)
    np.testing.assert_allclose(out.log_prob, whole, rtol=1e-10)


# Two-sided 97.5 % quantile of Student's t with 31 degrees of freedom.
QUANTILE = 2.040
FIXED = {"times": 12, "solver": diffrax.Heun(), "stepsize_controller": None}


@pytest.mark.parametrize(
    "trace", [Hutchinson(32), Hutchinson(32, "gaussian"), HutchPlusPlus(96)], ids=str
)
def test_error_bars_cover_and_estimates_are_unbiased(x64, trace):
    # On a fixed grid the probes are the only difference from the exact trace. More dimensions
    # than the 32 that Hutch++ resolves exactly.
    size = 8 if isinstance(trace, Hutchinson) else 48
    oracle = gaussian(processes.VP(t_min=1e-2), size)
    x = jnp.broadcast_to(data(oracle, 1), (200, size))
    exact = log_likelihood(oracle, x[:1], **FIXED)
    out = log_likelihood(oracle, x, key=jax.random.key(0), trace=trace, **FIXED)
    np.testing.assert_allclose(out.latent, jnp.broadcast_to(exact.latent, x.shape), rtol=1e-9)
    error = out.log_prob - exact.log_prob
    covered = int((np.abs(error) < QUANTILE * out.standard_error).sum())
    # 190 are expected, with a standard deviation of 3.1.
    assert 180 <= covered <= 199
    assert np.abs(error.mean()) < 4 * error.std() / np.sqrt(200)
    np.testing.assert_allclose(out.standard_error.mean(), error.std(), rtol=0.2)


def estimates(trace, matrix, keys):
    def one(key):
        w = jnp.ones(matrix.shape[0])
        value, trace_of = trace(lambda w: matrix @ w, w, trace.probes(key, w))
        return value, trace_of.mean()

    return jax.jit(jax.vmap(one))(keys)


def test_trace_estimators_on_matrices(x64):
    keys = jax.random.split(jax.random.key(0), 400)
    matrix = jax.random.normal(jax.random.key(1), (20, 20))
    symmetric = (matrix + matrix.T) / 2
    off_diagonal = symmetric - jnp.diag(jnp.diag(symmetric))
    for trace, variance in (
        (ExactTrace(), 0.0),
        (Hutchinson(2), (off_diagonal**2).sum()),
        (Hutchinson(2, "gaussian"), (symmetric**2).sum()),
        (HutchPlusPlus(12), None),
    ):
        values, found = estimates(trace, matrix, keys)
        np.testing.assert_allclose(values, jnp.broadcast_to(matrix.sum(1), values.shape))
        assert np.abs(found.mean() - jnp.trace(matrix)) <= 4 * found.std() / 20 + 1e-12
        if variance is not None:
            np.testing.assert_allclose(found.var(), variance, rtol=0.25, atol=1e-20)


def test_rademacher_probes_are_exact_for_a_diagonal_jacobian(x64):
    matrix = jnp.diag(jnp.arange(9.0))
    found = estimates(Hutchinson(1), matrix, jax.random.split(jax.random.key(0), 5))[1]
    np.testing.assert_allclose(found, 36.0)
    oracle = oracles.gaussian(processes.EDM(), jnp.zeros(3), jnp.diag(jnp.asarray([0.1, 1, 4])))
    x, key = data(oracle), jax.random.key(0)
    exact = log_likelihood(oracle, x, **FIXED)
    out = log_likelihood(oracle, x, key=key, trace=Hutchinson(1), **FIXED)
    np.testing.assert_allclose(out.log_prob, exact.log_prob, rtol=1e-10)
    # One probe has no error bar.
    assert bool(jnp.isnan(out.standard_error).all())


def test_hutch_plus_plus_is_exact_for_low_rank_and_better_for_decaying_spectra(x64):
    keys = jax.random.split(jax.random.key(0), 200)
    basis = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (30, 30)))[0]
    low_rank = basis[:, :3] @ jnp.diag(jnp.asarray([3.0, 2.0, -1.0])) @ basis[:, 3:6].T
    low_rank += basis[:, :1] @ basis[:, :1].T
    found = estimates(HutchPlusPlus(12), low_rank, keys)[1]
    np.testing.assert_allclose(found, jnp.trace(low_rank), rtol=1e-10)
    decaying = basis @ jnp.diag(1.0 / jnp.arange(1, 31) ** 2) @ basis.T
    plus = estimates(HutchPlusPlus(12), decaying, keys)[1]
    plain = estimates(Hutchinson(12), decaying, keys)[1]
    assert plus.var() < plain.var() / 10


def test_gradients_are_the_score_and_that_of_the_parameters(x64):
    oracle = mixture(FLOW())
    x, t_min = data(oracle), oracle.process.t_min

    def found(x, shift):
        shifted = eqx.tree_at(lambda o: o.means, oracle, oracle.means + shift)
        return log_likelihood(shifted, x, stepsize_controller=TIGHT).log_prob.sum()

    def expected(x, shift):
        shifted = eqx.tree_at(lambda o: o.means, oracle, oracle.means + shift)
        return truth(shifted, x, t_min).sum()

    shift = jnp.asarray([0.2, -0.1])
    for ours, theirs in zip(
        jax.grad(found, (0, 1))(x, shift), jax.grad(expected, (0, 1))(x, shift), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_gradients_through_probes_are_unbiased(x64):
    matrix = jax.random.normal(jax.random.key(0), (8, 8)) / 3
    # Of a low rank the value is exact, while the sketch is singular and its basis arbitrary.
    low_rank = matrix[:, :1] @ matrix[:1]
    w, keys = jnp.linspace(-1.0, 1.0, 8), jax.random.split(jax.random.key(1), 400)

    def gradients(trace, weights):
        def divergence(w, key):
            return trace(lambda w: jnp.tanh(weights @ w), w, trace.probes(key, w))[1].mean()

        return jax.jit(jax.vmap(jax.grad(divergence), (None, 0)))(w, keys)

    for trace, weights in (
        (Hutchinson(2), matrix),
        (HutchPlusPlus(6), matrix),
        (HutchPlusPlus(6), low_rank),
    ):
        found, exact = gradients(trace, weights), gradients(ExactTrace(3), weights)[0]
        assert np.all(np.abs(found.mean(0) - exact) < 4 * found.std(0) / np.sqrt(400))


def test_example_i_does_not_depend_on_the_batch(x64):
    oracle = mixture(processes.VP())
    x, key = data(oracle, 7), jax.random.key(0)
    cond = jnp.arange(7) % 3
    options = {"cond": cond, "key": key, "trace": Hutchinson(2), **FIXED}
    whole = log_likelihood(oracle, x, **options)
    assert float(whole.standard_error.max()) > 0
    for batch_size in (1, 3):
        out = log_likelihood(oracle, x, batch_size=batch_size, **options)
        np.testing.assert_allclose(out.log_prob, whole.log_prob, rtol=1e-9)
        np.testing.assert_array_equal(out.nfe, whole.nfe)


class Counting(DenoiserMap):
    """Counts its evaluations on the host, and its traces."""

    base: Denoiser
    calls: list = eqx.field(static=True, default_factory=list)
    traces: list = eqx.field(static=True, default_factory=list)

    def __hash__(self):
        return id(self)

    def __call__(self, x, t, cond=None, *, key=None):
        self.traces.append(1)
        jax.debug.callback(lambda _: self.calls.append(1), t, ordered=False)
        return self.base(x, t, cond, key=key)


@pytest.mark.parametrize(
    "options",
    [
        {"solver": diffrax.Heun(), "times": 6, "stepsize_controller": None},
        {"solver": diffrax.Tsit5()},
        {"solver": diffrax.Bosh3(), "trace": Hutchinson(3), "key": jax.random.key(0)},
    ],
)
def test_reported_evaluations_are_the_true_ones(options):
    counting = Counting(gaussian(processes.VP(t_min=1e-3)))
    out = log_likelihood(counting, data(counting.base, 1), **options)
    jax.effects_barrier()
    assert int(out.nfe[0]) == len(counting.calls)


def test_nothing_recompiles_when_numbers_change():
    traces, calls = [], []
    oracle = gaussian(processes.VP())

    def run(scale, tolerance, seed):
        base = eqx.tree_at(lambda o: o.means, oracle, oracle.means * scale)
        return log_likelihood(
            eqx.tree_at(lambda c: c.base, counting, base),
            scale * data(oracle),
            key=jax.random.key(seed),
            trace=Hutchinson(2),
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
        ).log_prob

    counting = Counting(oracle, calls, traces)
    first = run(1.0, 1e-3, 0)
    count = len(traces)
    assert count > 0
    for scale, tolerance, seed in ((1.0, 1e-3, 0), (2, 1e-3, 1), (0.5, 1e-4, 2)):
        last = run(scale, tolerance, seed)
    assert len(traces) == count
    assert not np.allclose(first, last)


def test_single_precision_is_good_enough_for_bits():
    oracle = mixture(processes.VP(), jnp.float32)
    x = data(oracle)
    out = log_likelihood(oracle, x)
    assert out.log_prob.dtype == out.latent.dtype == jnp.float32
    expected = truth(oracle, x, oracle.process.t_min)
    np.testing.assert_allclose(with_exact_prior(oracle, out), expected, atol=2e-3)


def test_a_failed_solve_is_marked():
    oracle = gaussian(processes.VP())
    controller = diffrax.PIDController(rtol=1e-12, atol=1e-12, dtmin=1e-3, force_dtmin=False)
    out = log_likelihood(oracle, data(oracle), stepsize_controller=controller)
    assert bool((out.result != diffrax.RESULTS.successful).all())
    assert bool(jnp.isnan(out.log_prob).all())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"trace": Hutchinson(2)}, ValueError, r"`key` must be given.*jax.random.key"),
        (
            {"trace": Hutchinson(2), "key": jax.random.PRNGKey(0)},
            TypeError,
            r"`key` must be a typed PRNG key.*jax.random.key",
        ),
        ({"solver": diffrax.Kvaerno3()}, TypeError, r"stock explicit.*Kvaerno3.*Tsit5"),
        ({"solver": solvers.DDIM()}, TypeError, r"stock explicit.*DDIM.*Tsit5"),
        ({"x": jnp.asarray([[np.nan, 0.0]])}, ValueError, r"`x` must be finite, got 1 of 2"),
        ({"cond": jnp.zeros(3, jnp.int32)}, ValueError, r"`cond`.*leading axis"),
        ({"stepsize_controller": None}, ValueError, r"`times` must be given.*times=100"),
        ({"times": 10}, ValueError, r"two times.*stepsize_controller=None"),
        ({"times": jnp.asarray([1.0, 0.5])}, ValueError, r"strictly increase.*times\[::-1\]"),
        ({"times": jnp.asarray([0.0, 1.0])}, ValueError, "sigma > 0"),
    ],
)
def test_bad_input_is_named(options, error, match):
    oracle = mixture(processes.VP(), jnp.float32)
    with pytest.raises(error, match=match):
        log_likelihood(oracle, **{"x": jnp.zeros((2, 2)), **options})


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ExactTrace(chunk=0), "`chunk` must be at least 1"),
        (lambda: Hutchinson(0), "`num_probes` must be at least 1, got 0"),
        (lambda: Hutchinson(1, "uniform"), "`distribution` must be.*'uniform'"),
        (lambda: HutchPlusPlus(0), "positive multiple of 3, got 0"),
        (lambda: HutchPlusPlus(4), "positive multiple of 3, got 4"),
    ],
)
def test_bad_estimators_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_bits_per_dim():
    # A uniform density over the whole range carries no information: log2(levels) bits.
    np.testing.assert_allclose(bits_per_dim(-12 * np.log(2.0), 12), 8.0, rtol=1e-6)
    np.testing.assert_allclose(bits_per_dim(0.0, 12, low=0.0), 8.0, rtol=1e-6)
    np.testing.assert_allclose(bits_per_dim(0.0, 12), 7.0, rtol=1e-6)
    np.testing.assert_allclose(bits_per_dim(0.0, 3, levels=4, low=0.0), 2.0, rtol=1e-6)
    # One nat per dimension less likely costs 1 / ln 2 bits.
    np.testing.assert_allclose(
        bits_per_dim(jnp.asarray([-5.0, 0.0]), 5), [7 + 1 / np.log(2), 7], rtol=1e-6
    )


@pytest.mark.parametrize(("levels", "low", "high"), [(256, -1.0, 1.0), (4, 0.0, 1.0)])
def test_dequantised_levels_fill_their_bins_and_nothing_else(x64, levels, low, high):
    values = jnp.linspace(low, high, levels)
    x = jnp.broadcast_to(values, (2000, levels))
    options = {"levels": levels, "low": low, "high": high}
    out = dequantize(jax.random.key(0), x, **options)
    width = (high - low) / levels
    edges = low + width * np.arange(levels + 1)
    offset = (np.asarray(out) - edges[:-1]) / width
    assert offset.min() >= 0 and offset.max() < 1
    np.testing.assert_allclose(offset.mean(), 0.5, atol=0.01 if levels > 4 else 0.03)
    np.testing.assert_allclose(offset.var(), 1 / 12, rtol=0.05)
    assert np.all(edges[:-1] <= values + 1e-12) and np.all(values <= edges[1:] + 1e-12)
    with pytest.raises(TypeError, match="typed PRNG key"):
        dequantize(jax.random.PRNGKey(0), x)


def test_dequantised_bits_bound_the_entropy_from_above(x64):
    probabilities = jnp.asarray([0.1, 0.2, 0.4, 0.3])
    entropy = -float((probabilities * jnp.log2(probabilities)).sum())
    draw, noise = jax.random.split(jax.random.key(0))
    level = jax.random.choice(draw, 4, (4000, 1), p=probabilities)
    x = dequantize(noise, -1 + level * (2 / 3), levels=4)
    # The model that would be exact, and one Gaussian for each level.
    density = jnp.log(probabilities[level[:, 0]] / 0.5)
    tight = bits_per_dim(density, 1, levels=4).mean()
    np.testing.assert_allclose(tight, entropy, atol=0.05)
    centres = (-0.75 + 0.5 * jnp.arange(4.0))[:, None]
    oracle = oracles.gaussian_mixture(
        processes.VP(), centres, jnp.full((4, 1, 1), 0.25**2), weights=probabilities
    )
    out = log_likelihood(oracle, x, times=20, solver=diffrax.Heun(), stepsize_controller=None)
    bits = bits_per_dim(out.log_prob, 1, levels=4).mean()
    assert entropy < bits < entropy + 0.6
