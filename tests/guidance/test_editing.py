"""Real images: noise and back, inversion, known parts; other sizes; blends of conditions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import mixture
from numpy.testing import assert_allclose
from scipy.stats import norm

import jaxdiff
from jaxdiff import geometry, guidance, oracles, processes, solvers

KEY = jax.random.key(0)


def test_noise_and_back_is_a_step_of_a_chain_towards_the_model(x64):
    """N(0, 1) from y = 2 at alpha = 0.6: means 0.36^k 2, variances 1 - 0.36^2k; 1.2 by the flow."""
    process = processes.VP()
    prior = oracles.gaussian(process, jnp.zeros(1), jnp.eye(1))
    times = jnp.linspace(process.time(2 * np.log(0.6 / 0.8)), 0.0, 101)
    y, count = jnp.full((6000, 1), 2.0), 6000
    # Of unit variance, the reverse step's is beta.
    stochastic = solvers.Ancestral(variance=1.0)
    for repeats in (1, 2, 3):
        out = guidance.sdedit(
            KEY, prior, y, times=times, repeats=repeats, solver=stochastic, batch_size=3000
        )
        mean, variance = 2 * 0.36**repeats, 1 - 0.36 ** (2 * repeats)
        assert_allclose(np.mean(out.x), mean, atol=4 / np.sqrt(count))
        assert_allclose(np.var(out.x), variance, atol=6 / np.sqrt(count))
        assert np.all(out.nfe == 100 * repeats)
    flow = guidance.sdedit(KEY, prior, y, times=times, solver=solvers.DDIM())
    assert_allclose(np.mean(flow.x), 1.2, atol=0.05)
    assert_allclose(np.var(flow.x), 0.64, atol=0.05)


def test_what_is_masked_is_kept(x64):
    laws = mixture(processes.VP())
    y = jax.random.normal(KEY, (4, 2))
    run = lambda mask, **options: (
        guidance.sdedit(
            KEY,
            laws,
            y,
            times=jnp.linspace(0.7, 0.0, 6),
            mask=mask,
            cond=jnp.arange(4) % 2,
            **options,
        ).x
    )
    half = run(jnp.asarray([1.0, 0.0]), repeats=2)
    assert_allclose(half[:, 0], y[:, 0], rtol=1e-12)
    assert np.abs(half[:, 1] - y[:, 1]).min() > 1e-3
    assert_allclose(run(jnp.ones(())), y, rtol=1e-12)
    # Nothing kept, nothing changed: a wrapper that does nothing but draw.
    rest = run(jnp.zeros((4, 2)), solver=solvers.DDIM())
    plain = run(None, solver=solvers.DDIM())
    assert_allclose(rest, plain, rtol=1e-9)


def test_inversion_and_back_under_another_condition(x64):
    """The flow of one Gaussian to noise, and that of another from there."""
    process = processes.VP()
    means = jnp.asarray([[-1.0, 0.5], [1.0, 0.3]])
    covariances = jnp.asarray([[[0.5, 0.2], [0.2, 0.4]], [[0.3, -0.1], [-0.1, 0.2]]])
    both = oracles.gaussian_mixture(process, means, covariances, labels=[0, 1])
    x = means[0] + jax.random.normal(KEY, (3, 2))
    start, end = process.t_min, 1.0
    times = jnp.linspace(start, end, 81)
    source, target = jnp.zeros(3, int), jnp.ones(3, int)
    out = guidance.edit_by_inversion(both, x, source, target, times=times, solver=solvers.EDMHeun())
    one, other = (oracles.gaussian(process, m, c) for m, c in zip(means, covariances, strict=True))

    def exact(x):
        noise = oracles.gaussian_flow_map(one, x, jnp.asarray(start), jnp.asarray(end))
        return oracles.gaussian_flow_map(other, noise, jnp.asarray(end), jnp.asarray(start))

    assert_allclose(out.x, jax.vmap(exact)(x), atol=3e-3)
    assert np.all(out.nfe == 2 * 80 * 2)
    same = guidance.edit_by_inversion(
        both, x, source, source, times=jnp.linspace(0.01, 0.9, 11), solver=solvers.EDICT()
    )
    assert_allclose(same.x, x, rtol=1e-9)
    # UniPC's corrector must not go on from the way there.
    grid = solvers.log_snr_times(process, 60)[::-1]
    back = guidance.edit_by_inversion(both, x, source, source, times=grid, solver=solvers.UniPC(2))
    assert_allclose(back.x, x, atol=5e-3)


def energy(x0, y):
    return (x0[0] - y) ** 2


ENERGY = jax.tree_util.Partial(energy)


def test_steered_diffusion_is_what_it_is_made_of(x64):
    laws = mixture(processes.VP())
    y = jnp.asarray([0.3, -0.5, 1.0])
    run = lambda denoiser, solver, cond={"y": y}: (
        jaxdiff.sample(KEY, denoiser, (2,), 3, solver=solver, cond=cond, times=6).x
    )
    once = run(*guidance.steered(laws, ENERGY, rho=0.2, count=1))
    expected = run(laws, guidance.FreeDoM(solvers.Ancestral(), energy=ENERGY, rho=0.2))
    assert_allclose(once, expected, rtol=1e-9)
    still = run(*guidance.steered(laws, ENERGY, rho=0.0, count=1))
    assert_allclose(still, run(laws, solvers.Ancestral(), None), rtol=1e-9)
    near = lambda x: float(np.mean((np.asarray(x)[:, 0] - np.asarray(y)) ** 2))
    often = run(*guidance.steered(laws, ENERGY, rho=0.2, count=5))
    assert near(often) < near(once) < near(still)
    first = jax.tree_util.Partial(lambda x: x * jnp.asarray([1.0, 0.0], x.dtype))
    known = jnp.stack([y, 0 * y], 1)
    parts = run(
        *guidance.steered(laws, ENERGY, rho=0.2, count=1, part=first), {"y": y, "known": known}
    )
    assert_allclose(parts[:, 0], y, atol=0.2)


class Ignorant(jaxdiff.Denoiser):
    """A model of large images that knows nothing of them."""

    process: processes.VP

    def __call__(self, x, t, cond=None, *, key=None):
        return 0.1 * x


def test_a_model_of_small_images_guides_large_ones_exactly(x64):
    """Of images that are small ones magnified, block means of x_t know everything."""
    process, shape = processes.VP(), (2, 2, 1)
    root = jax.random.normal(KEY, (4, 4)) / 2
    mean, covariance = jnp.linspace(-1, 1, 4).reshape(shape), root @ root.T
    small = oracles.gaussian(process, mean, covariance)
    magnify = lambda z: jnp.repeat(jnp.repeat(z, 2, 0), 2, 1)
    up = jax.vmap(magnify, -1, -1)(jnp.eye(4).reshape(2, 2, 4))[..., :].reshape(16, 4)
    large = oracles.gaussian(process, magnify(mean), up @ covariance @ up.T)
    x, t = jax.random.normal(jax.random.key(1), (4, 4, 1)), jnp.asarray(0.5)
    model = guidance.UpsampleGuidance(Ignorant(process), small)
    found = jax.jit(lambda model, x, t: model(x, t))(model, x, t)
    assert_allclose(geometry.downsample(found, 2), geometry.downsample(large(x, t), 2), rtol=1e-9)
    # In eps, as it was published, with what the rule leaves alone.
    tau = process.time(process.log_snr(t) + 2 * np.log(2))
    alpha, sigma = process.alpha(t), process.sigma(t)
    p = alpha**2 + sigma**2 / 4
    pooled = geometry.downsample(x, 2)
    eps_of = lambda x, t, x0: (x - process.alpha(t) * x0) / process.sigma(t)
    state = pooled / jnp.sqrt(p)
    coarse = eps_of(state, tau, small(state, tau))
    eps = eps_of(x, t, 0.1 * x)
    eps = eps + magnify(coarse / 2 - geometry.downsample(eps, 2))
    assert_allclose(found, (x - sigma * eps) / alpha, rtol=1e-9)
    for alone in ({"scale": 0.0}, {"t_low": 0.6}):
        assert_allclose(guidance.UpsampleGuidance(Ignorant(process), small, **alone)(x, t), 0.1 * x)


def test_conditions_have_their_resolutions(x64):
    process = processes.VP()
    power = jnp.asarray([4.0, 0.5, 0.01])
    groups = jnp.asarray([[1.0, 0.5, 0.0], [0.0, 0.5, 1.0]])
    shares = guidance.ResolutionShares(power, groups, scale=3.0)
    t = jnp.asarray([0.05, 0.4, 0.95])
    found = jnp.stack([shares(process, value) for value in t])
    assert_allclose(found.sum(1), 3.0, rtol=1e-12)
    assert np.all(np.diff(found[:, 0]) > 0)  # what is coarse is made in noise
    snr = jnp.exp(process.log_snr(t))[:, None] * power
    rate = snr / (1 + snr) ** 2
    assert_allclose(found, 3 * (rate / rate.sum(1, keepdims=True)) @ groups.T, rtol=1e-9)
    laws = mixture(process)
    cond = {"label": jnp.asarray(0), "concepts": jnp.asarray([0, 1])}
    x = jnp.asarray([0.3, -0.2])
    timed = guidance.Composable(laws, null_cond=2, count=2, scale=shares)
    fixed = guidance.Composable(laws, null_cond=2, count=2)
    assert_allclose(
        timed(x, t[1], {**cond, "weights": jnp.ones(2)}),
        fixed(x, t[1], {**cond, "weights": found[1]}),
        rtol=1e-12,
    )
    # The density of a composition has its score.
    whole = {**cond, "weights": jnp.asarray([0.7, 0.2])}
    score = jax.grad(lambda x: fixed.log_prob(x, t[1], whole))(x)
    expected = (x + process.sigma(t[1]) ** 2 * score) / process.alpha(t[1])
    assert_allclose(fixed(x, t[1], whole), expected, rtol=1e-9)


def alike(x0, concept):
    """To the mean of a class."""
    means = jnp.asarray([[-1.5, 0.5], [0.8, 0.0]])
    return 25 * jnp.exp(-jnp.sum((x0 - means[concept]) ** 2) / 8)


def test_options_choose_the_condition_that_is_lacking(x64):
    price = guidance.call_price(jnp.asarray([30.0, 0.3]), 0.25, 0.4, jnp.asarray([0.0, 0.5]))
    later = 0.25 * np.exp(-0.4)
    d1 = (np.log(0.3 / 0.25) + 0.4 + 0.125) / 0.5
    expected = [30 - later, 0.3 * norm.cdf(d1) - later * norm.cdf(d1 - 0.5)]
    assert_allclose(price, expected, rtol=1e-9)

    laws = mixture(processes.VP())
    run = lambda denoiser, cond: jaxdiff.sample(KEY, denoiser, (2,), 64, cond=cond, times=20).x
    blend = guidance.BlackScholesBlending(laws, jax.tree_util.Partial(alike))
    both = {"label": jnp.full(64, 2), "concepts": jnp.tile(jnp.arange(2), (64, 1))}
    gap = lambda x: np.abs(
        jax.vmap(alike, (0, None))(x, 0) - jax.vmap(alike, (0, None))(x, 1)
    ).mean()
    blended = run(blend, both)
    alone = [run(laws, jnp.full(64, label)) for label in (0, 1, 2)]
    assert gap(blended) < 0.5 * min(map(gap, alone))
    # With one concept, that; but in the first step.
    one = {**both, "concepts": jnp.ones((64, 1), int)}
    assert_allclose(run(blend, {**one, "label": jnp.ones(64, int)}), alone[1], rtol=1e-9)


def test_numbers_of_steps_are_customary_grids(x64):
    laws, y = mixture(processes.VP()), jnp.asarray([[0.3, -0.2], [1.0, 0.5]])
    label = jnp.asarray([0, 1])
    run = lambda times: guidance.sdedit(KEY, laws, y, times=times, mask=jnp.asarray([1.0, 0.0])).x
    assert_allclose(run(10), run(laws.process.times(10)), rtol=1e-12)
    back = lambda times: guidance.edit_by_inversion(laws, y, label, 1 - label, times=times).x
    grid = laws.process.times(10, laws.process.t_min)[::-1]
    assert_allclose(back(10), back(grid), rtol=1e-12)


@pytest.mark.usefixtures("unchecked")
def test_errors():
    laws = mixture(processes.VP(), jnp.float32)
    with pytest.raises(ValueError, match="`mask` must be of the shape of y"):
        guidance.sdedit(KEY, laws, np.ones((2, 2)), times=[0.5, 0.0], mask=np.ones((3, 2, 2)))
    with pytest.raises(ValueError, match="`cond` must have the entries 'y', 'mask' for Pasted"):
        jaxdiff.sample(KEY, laws, (2,), 2, solver=guidance.Pasted(), times=2)
    with pytest.raises(ValueError, match="`solver` must be deterministic to invert"):
        guidance.edit_by_inversion(
            laws, np.ones((2, 2)), None, None, times=[0.1, 0.5], solver=solvers.Ancestral()
        )
    with pytest.raises(ValueError, match=r"`x` must be an image \(H, W, C\), got shape \(2,\)"):
        guidance.UpsampleGuidance(laws, laws)(jnp.zeros(2), jnp.asarray(0.5))
    with pytest.raises(ValueError, match="`groups` must have a row for each condition"):
        guidance.ResolutionShares(jnp.ones(3), jnp.ones((2, 4)))
