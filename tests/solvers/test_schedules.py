"""Time grids: published conventions, and the optimisers of grids against exhaustive answers."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import PROCESSES, gaussian, mixture

import jaxdiff
from jaxdiff import processes, solvers
from jaxdiff.solvers._auto_diffusion import _cross, _mutate

GOLDEN = np.load(Path(__file__).with_name("golden") / "diffusers.npz")
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
# Noise levels published beside STABLE_DIFFUSION_STEPS, to their three digits.
PUBLISHED = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029]
KEY = jax.random.key(0)
close = np.testing.assert_allclose


def tabulated():
    return processes.Tabulated(np.cumprod(1 - BETAS))


def noise_levels(process, times):
    return np.asarray(process.sigma(times) / process.alpha(times))


def steps_of(*args, **kwargs):
    times = solvers.discrete_times(tabulated(), *args, **kwargs)
    return [int(step) for step in np.round(np.asarray(times[:-1]) * 1000) - 1]


def test_spacings_are_the_published_ones():
    assert steps_of(10, "trailing") == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert steps_of(7, "trailing") == [999, 856, 713, 570, 428, 285, 142]
    assert steps_of(10) == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert steps_of(10, offset=1) == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert steps_of(10, drop_last=True) == [900, 810, 720, 630, 540, 450, 360, 270, 180, 90]
    assert steps_of(10, "linspace") == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert steps_of(5, "linspace", drop_last=True) == [999, 799, 599, 400, 200]
    assert steps_of(1, "trailing") == steps_of(1, "linspace") == [999]
    assert steps_of(1000, "trailing") == list(range(999, -1, -1))


def test_grids_have_the_levels_of_the_reference_schedulers(x64):
    process, compared = tabulated(), set()
    for name in sorted({key.split("|")[0] for key in GOLDEN if "scaled_linear" in key}):
        family, *parts = name.split("/")
        spacing = next((s for s in ("trailing", "leading", "linspace") if s in parts), None)
        levels = GOLDEN[name + "|kap"]
        known = spacing and family in ("DDIM", "DPMSolverMultistep", "DEISMultistep")
        if not known or "karras=1" in parts or np.any(np.diff(levels) == 0):
            continue
        options = dict(offset=int("offset=1" in parts), t_end=0.0 if levels[-1] == 0 else 1e-3)
        options["drop_last"] = family != "DDIM" and spacing != "trailing"
        times = solvers.discrete_times(process, len(levels) - 1, spacing, **options)
        close(noise_levels(process, times), levels, rtol=1e-9, err_msg=name)
        compared.add((family == "DDIM", spacing))
    assert len(compared) == 5


@pytest.mark.usefixtures("unchecked")
def test_bad_tables_and_spacings_are_refused():
    process = tabulated()
    for match, call in [
        ("`spacing` must be", lambda: solvers.discrete_times(process, 10, "karras")),
        ("`offset` belongs", lambda: solvers.discrete_times(process, 10, "trailing", offset=1)),
        ("between 1 and the 1000", lambda: solvers.discrete_times(process, 1001)),
        ("between 1 and the 999", lambda: solvers.discrete_times(process, 1000, drop_last=True)),
        ("between 1 and", lambda: solvers.discrete_times(process, 0)),
        ("strictly decrease", lambda: solvers.discrete_times(process, 10, t_end=1e-3)),
        ("must lie inside", lambda: solvers.discrete_times(process, 1000, offset=1)),
        (r"Pass times\[::-1\]", lambda: solvers.table_times(process, [1, 5], t_end=1.0)),
        ("must lie inside", lambda: solvers.table_times(process, [5, 1], t_end=-0.1)),
        ("`shift` must be above 0", lambda: solvers.shifted_times([1.0, 0.0], 0)),
        ("one-dimensional", lambda: solvers.interpolate_times(process, 0.5, 3)),
        ("at most one", lambda: solvers.interpolate_times(process, [1.0, 1e-3, 0.0], 3)),
    ]:
        with pytest.raises(ValueError, match=match):
            call()


def test_closed_values_of_edm(x64):
    edm = processes.EDM(t_min=1.0, t_max=81.0)
    close(solvers.karras_times(edm, 3, rho=2.0), [81, 25, 1, 0], rtol=1e-12)
    for rho, middle in ((1.0, 9.0), (2.0, 3.0), (0.5, 81 ** (0.5**0.5))):
        times = solvers.polyexponential_times(edm, 3, rho=rho)
        close(times, [81, middle, 1, 0], rtol=1e-12)
    # The limit of large rho, and an end of its own where t_min is 0.
    close(solvers.polyexponential_times(edm, 9), solvers.karras_times(edm, 9, rho=1e7), rtol=1e-6)
    close(solvers.polyexponential_times(processes.VE(), 8), np.linspace(1, 0, 9), atol=1e-12)
    # tan of 45 degrees less, from 45 degrees on.
    edm = processes.EDM(t_min=1e-3, t_max=2.0)
    times = solvers.cosine_times(edm, 3, sigma_data=2.0)
    close(times, [2, 2 / 3**0.5, 2 * (2 - 3**0.5), 0], rtol=1e-12)


def test_cosine_grid_has_the_levels_of_uniform_steps_of_the_cosine_process(x64):
    cosine, vp = processes.Cosine(), processes.VP()
    close(solvers.cosine_times(cosine, 12), np.linspace(cosine.t_max, 0, 13), atol=1e-12)
    times = solvers.cosine_times(vp, 12)
    first = cosine.time(vp.log_snr(vp.t_max))
    expected = noise_levels(cosine, jnp.linspace(first, 0.0, 13))
    close(noise_levels(vp, times), expected, rtol=1e-7)


def test_shift_multiplies_the_noise_levels_of_a_rectified_flow(x64):
    flow = processes.RectifiedFlow()
    for shift in (0.3, 1.1, 3.0):
        times = jnp.linspace(1.0, 0.0, 11)
        shifted = solvers.shifted_times(times, shift)
        assert shifted[0] == 1 and shifted[-1] == 0
        ratio = noise_levels(flow, shifted[1:-1]) / noise_levels(flow, times[1:-1])
        close(ratio, shift, rtol=1e-12)


def test_published_steps_have_their_published_levels_and_interpolate_in_log_level(x64):
    process = tabulated()
    times = solvers.table_times(process, solvers.STABLE_DIFFUSION_STEPS, t_end=1e-3)
    levels = noise_levels(process, times)
    close(levels, PUBLISHED, rtol=8e-3)
    longer = solvers.interpolate_times(process, times, 20)
    assert longer[0] == times[0] and longer[-1] == times[-1] and np.all(np.diff(longer) < 0)
    expected = np.sqrt(levels[:-1] * levels[1:])
    close(noise_levels(process, longer)[1::2], expected, rtol=1e-9)
    close(longer[::2], times, rtol=1e-9)
    # Ends where log k is infinite count as t_min and t_max.
    flow = processes.RectifiedFlow(t_min=0.1, t_max=0.9)
    single = solvers.interpolate_times(flow, np.asarray([1.0, 0.5, 0.0], np.float32), 4)
    close(single, [1.0, 0.75, 0.5, 0.25, 0.0], rtol=1e-6)
    assert single.dtype == np.float32


@pytest.mark.parametrize("make", PROCESSES.values(), ids=PROCESSES.keys())
def test_grids_decrease_strictly_in_float32_with_exact_ends(make):
    process = make()
    for steps in (1, 50, 1000):
        grids = [
            solvers.cosine_times(process, steps),
            solvers.cosine_times(process, steps, sigma_data=0.5),
            solvers.polyexponential_times(process, steps),
        ]
        if steps <= 50:
            grids.append(solvers.polyexponential_times(process, steps, rho=2.0))
            grids.append(solvers.interpolate_times(process, process.times(10)[:-1], steps))
        for i, times in enumerate(np.asarray(grid) for grid in grids):
            assert times.shape == (steps + 1,) and times.dtype == np.float32
            assert np.all(np.diff(times) < 0), (i, steps)
            assert times[0] == np.float32(process.t_max) and times[-1] in (0, process.times(10)[-2])


def klub(variances, levels):
    """The bound for a Gaussian of these variances, by quadrature of its definition."""
    total, (nodes, weights) = 0.0, np.polynomial.legendre.leggauss(40)
    for high, low in itertools.pairwise(levels):
        k = np.sqrt(high * low) * (high / low) ** (nodes / 2)
        error = lambda k: np.sum(variances * k[:, None] ** 2 / (variances + k[:, None] ** 2), 1)
        integrand = (error(np.asarray([high])) - error(k)) / k**2
        total += np.log(high / low) / 2 * np.sum(weights * integrand)
    return total


def test_bound_of_a_gaussian_is_its_quadrature(x64):
    process = processes.RectifiedFlow()
    oracle = gaussian(process)
    data = jax.vmap(oracle.sample_data)(jax.random.split(jax.random.key(1), 2000))
    times = process.time(-2 * jnp.log(jnp.asarray([20.0, 2.0, 0.7, 0.3, 0.1])))
    bound = lambda data, times, **options: np.asarray(
        solvers.kl_upper_bound(KEY, oracle, data, times, **options)
    )
    values = bound(data, times)
    expected = klub(np.asarray(oracle.spectrum[0]), noise_levels(process, times))
    standard_error = values.std() / len(values) ** 0.5
    assert standard_error < 0.03 * expected
    assert abs(values.mean() - expected) < 3 * standard_error
    # An example depends neither on the others nor on chunks; ends beyond the levels are clipped.
    close(bound(data[:4], times, batch_size=2), values[:4], rtol=1e-10)
    clipped = times.at[0].set(process.t_max).at[-1].set(process.t_min)
    beyond = times.at[0].set(1.0).at[-1].set(0.0)
    np.testing.assert_array_equal(bound(data, beyond), bound(data, clipped))


def test_aligned_steps_have_the_least_bound_and_are_stationary(x64):
    process = processes.EDM(t_min=0.02, t_max=50.0)
    oracle = gaussian(process)
    data = jax.vmap(oracle.sample_data)(jax.random.split(KEY, 2000))
    found = solvers.align_your_steps(jax.random.key(2), oracle, data, 6, num_iterations=200)
    exact = lambda times: klub(np.asarray(oracle.spectrum[0]), np.asarray(times))
    assert np.all(np.diff(found.times) < 0) and found.history.shape == (200,)
    assert found.times[0] == process.t_max and found.times[-1] == process.t_min
    value = exact(found.times)
    for grid in (solvers.log_snr_times(process, 6), solvers.karras_times(process, 7)[:-1]):
        assert value < 0.8 * exact(grid)
    assert value < 0.1 * exact(jnp.linspace(50.0, 0.02, 7))
    close(found.value, value, rtol=0.1)
    for i, factor in itertools.product(range(1, 6), (0.85, 1.15)):
        assert value < exact(found.times.at[i].multiply(factor))


def test_alignment_takes_a_start_and_an_optimiser_and_refuses_bad_grids():
    oracle = gaussian(processes.EDM())
    data, labels = jnp.zeros((3, 3)), jnp.zeros(3, jnp.int32)
    still = dict(optimiser=optax.sgd(0.0), num_iterations=2, batch_size=2, cond=labels)
    start = solvers.karras_times(oracle.process, 4)
    same = solvers.align_your_steps(KEY, oracle, data, start[:-1], **still)
    close(same.times, start[:-1], rtol=1e-5)
    with pytest.raises(ValueError, match=r"(?s)at most one time.*times\[:-1\]"):
        solvers.align_your_steps(KEY, oracle, data, start)
    with pytest.raises(ValueError, match="strictly decrease"):
        solvers.kl_upper_bound(KEY, oracle, data, start[::-1])
    for call in (solvers.align_your_steps, solvers.kl_upper_bound):
        with pytest.raises(TypeError, match="typed PRNG key"):
            call(jnp.zeros(2, jnp.uint32), oracle, data, start)


def wish_metric(wish, hole, times):
    value = jnp.sum((jnp.log(-jnp.diff(times)) - wish) ** 2)
    return jnp.where(jnp.any(jnp.abs(times - hole) < 1e-3), jnp.nan, value)


def wished(wish, hole=-1.0):
    """A metric of grids that wants these log gaps, and is NaN at the time `hole`."""
    return jax.tree_util.Partial(wish_metric, jnp.asarray(wish), hole)


WISH = [-1.0, -3.0, -0.5, -2.0]


def test_search_finds_the_best_of_all_subsets():
    candidates = jnp.linspace(1.0, 0.0, 15)
    subsets = np.asarray([(0, *chosen, 14) for chosen in itertools.combinations(range(1, 14), 3)])
    hole = -1.0
    for _ in range(2):
        metric = wished(WISH, hole)
        values = np.asarray(jax.vmap(metric)(candidates[subsets]))
        best = candidates[subsets[np.nanargmin(values)]]
        found = solvers.search_times(KEY, metric, candidates, 4)
        np.testing.assert_array_equal(found.times, best)
        close(found.value, np.nanmin(values), rtol=1e-5)
        assert found.history[-1] == found.value and np.all(np.diff(found.history) <= 0)
        hole = float(best[2])  # then without the optimum
    chunks = solvers.search_times(KEY, metric, candidates, 4, batch_size=7)
    np.testing.assert_array_equal(chunks.times, found.times)
    close(chunks.history, found.history, rtol=1e-6)
    # The evenly spaced subset is among the first, and populations may be small or exhaustive.
    sizes = dict(population=3, generations=1, mutation=0, crossover=0, parents=1)
    even = solvers.search_times(KEY, wished(np.log([0.5, 0.5])), candidates, 2, **sizes)
    only = solvers.search_times(KEY, wished(WISH[:2]), candidates[::7], 2)
    for found in (even, only):
        np.testing.assert_array_equal(found.times, candidates[::7])


def test_children_are_subsets_of_the_right_size():
    genes, other = jnp.arange(20) % 3 == 0, jnp.arange(20) < 7
    for key, probability in itertools.product(jax.random.split(KEY, 10), (0.0, 0.3, 1.0)):
        mutant = _mutate(key, genes, 7, probability)
        changed = int(jnp.sum(genes & ~mutant))
        assert mutant.sum() == 7 and changed >= 1
        assert changed == {0.0: 1, 1.0: 7}.get(probability, changed)
        child = _cross(key, genes, other, 7)
        assert child.sum() == 7
        assert np.all(child[genes & other]) and not np.any(child & ~genes & ~other)


def test_new_numbers_in_a_metric_compile_nothing():
    traces = []

    def metric(wish, times):
        traces.append(None)
        return jnp.sum((times[1:-1] - wish) ** 2)

    grid = jnp.linspace(1.0, 0.0, 9)
    sizes = dict(population=6, parents=2, generations=2, mutation=2, crossover=2)
    search = lambda metric: solvers.search_times(KEY, metric, grid, 3, **sizes)
    descend = lambda metric: solvers.optimise_times(metric, grid, num_iterations=2)
    for call in (search, descend):
        first = call(jax.tree_util.Partial(metric, jnp.asarray(0.0)))
        compiled = len(traces)
        second = call(jax.tree_util.Partial(metric, jnp.asarray(1.0)))
        assert len(traces) == compiled and first.value != second.value


def test_gradient_descent_reaches_the_stationary_point():
    start = jnp.linspace(1.0, 0.0, 5)
    cost = np.asarray([1.0, 2.0, 4.0, 8.0], np.float32)
    found = solvers.optimise_times(
        lambda t: jnp.sum(cost / -jnp.diff(t)), start, num_iterations=300
    )
    # By Cauchy and Schwarz, least for gaps in proportion to the roots.
    close(-np.diff(found.times), cost**0.5 / np.sum(cost**0.5), rtol=1e-3)
    close(found.value, np.sum(cost**0.5) ** 2, rtol=1e-5)
    close(found.history[0], 60.0, rtol=1e-5)
    assert found.times[0] == 1 and found.times[-1] == 0
    assert found.value == np.min(found.history)


def test_bad_searches_are_refused():
    metric, grid = wished(WISH), jnp.linspace(1.0, 0.0, 5)
    for match, candidates, steps, options in [
        ("`num_steps` must be at least 2 and less than the 5", grid, 5, {}),
        ("`num_steps` must be at least 2", grid, 1, {}),
        ("`population` must hold", grid, 3, dict(population=49)),
        ("`population` must hold", grid, 3, dict(population=5, mutation=1, crossover=1)),
        (r"`candidates` must strictly decrease.*candidates\[::-1\]", grid[::-1], 3, {}),
    ]:
        with pytest.raises(ValueError, match=match):
            solvers.search_times(KEY, metric, candidates, steps, **options)
    with pytest.raises(ValueError, match="`times` must strictly decrease"):
        solvers.optimise_times(metric, [1.0, 0.5, 0.5, 0.0])
    with pytest.raises(TypeError, match="typed PRNG key"):
        solvers.search_times(0, metric, grid, 3)


def test_gradient_beats_evolution_at_equal_cost_and_both_the_even_grid():
    def solve(denoiser, noise, times):
        return jaxdiff.denoise(KEY, denoiser, noise, times=times).x

    def error(denoiser, noise, target, times):
        return jnp.mean(jnp.sum((solve(denoiser, noise, times) - target) ** 2, axis=-1))

    start = mixture(processes.VP(), jnp.float32), jax.random.normal(KEY, (64, 2))
    metric = jax.tree_util.Partial(error, *start, solve(*start, jnp.linspace(1.0, 0.0, 501)))
    candidates = jnp.linspace(1.0, 0.0, 61)
    searched = solvers.search_times(KEY, metric, candidates, 6)
    descended = solvers.optimise_times(metric, candidates[::10], num_iterations=500 // 3)
    assert descended.value < searched.value < 0.6 * descended.history[0]
