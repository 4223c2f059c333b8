"""Products, quotients and mixtures of laws, and the Markov chains that reach them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import bimodal, mixture, quantile
from numpy.testing import assert_allclose

import jaxdiff
from jaxdiff import guidance, oracles, processes, solvers

KEY = jax.random.key(0)
T = 0.4


def line(mean, variance):
    return oracles.gaussian(processes.VP(), jnp.asarray([mean]), jnp.asarray([[variance]]))


@jax.jit
def chains(kernel, denoiser, t, x, steps):
    """Chains from x, one after the other: where they end, and how often they moved."""
    target = guidance.Target(denoiser, t)

    def one(key, x):
        start = kernel.init(key, target, x)

        def move(carry, k):
            chain, info = kernel.step(jax.random.fold_in(key, k), target, carry)
            return chain, info.accepted

        chain, accepted = jax.lax.scan(move, start, steps)
        return chain.point.x, accepted.mean()

    return jax.vmap(one)(jax.random.split(KEY, len(x)), x)


def test_kernels_without_a_metropolis_step_have_the_variance_of_their_step(x64):
    """ULA: v / (1 - e / (2 v)); a leapfrog of step e: v / (1 - e^2 / (4 v))."""
    laws, t = line(0.3, 0.5), jnp.asarray(T)
    alpha, sigma = laws.process.alpha(t), laws.process.sigma(t)
    v = float(alpha**2 * 0.5 + sigma**2)
    start = jnp.full((20000, 1), alpha * 0.3)
    for kernel, e, expected in (
        (guidance.Langevin(0.8), 0.8 * sigma**2, lambda e: v / (1 - e / (2 * v))),
        (guidance.Hamiltonian(0.9, leaps=3), 0.9 * sigma, lambda e: v / (1 - e**2 / (4 * v))),
    ):
        x, moved = chains(kernel, laws, t, start, jnp.arange(30))
        assert np.all(moved == 1)
        wanted = float(expected(e))
        assert abs(wanted / v - 1) > 0.15  # far from the law itself
        assert_allclose(np.var(x), wanted, rtol=4 * np.sqrt(2 / 20000))
        assert_allclose(np.mean(x), 0.3 * alpha, atol=4 * np.sqrt(wanted / 20000))


def test_metropolis_steps_leave_a_law_with_two_modes_as_it_is(x64):
    """With steps so large that without them it is another one."""
    laws, t = bimodal(processes.VP()), jnp.asarray(0.1)
    keys = jax.random.split(KEY, 8000)
    alpha, sigma = laws.process.alpha(t), laws.process.sigma(t)
    clean = jax.vmap(laws.sample_data)(keys)
    x = alpha * clean + sigma * jax.random.normal(jax.random.key(1), clean.shape)

    def apart(x):
        """Kolmogorov's distance from the law."""
        u = np.sort(np.asarray(jax.vmap(lambda x: quantile(laws, x, t))(x[:, 0])))
        return np.abs(u - (np.arange(len(u)) + 0.5) / len(u)).max()

    def free(kernel):
        return eqx.tree_at(lambda k: k.adjusted, kernel, False)

    for kernel in (
        guidance.Langevin(3.0, adjusted=True),
        guidance.Hamiltonian(1.4, 0.7, leaps=3, adjusted=True),
    ):
        found, moved = chains(kernel, laws, t, x, jnp.arange(20))
        assert 0.3 < moved.mean() < 0.97
        assert apart(found) < 1.63 / np.sqrt(len(x))  # one in a hundred
    rough, _ = chains(guidance.Langevin(3.0), laws, t, x, jnp.arange(20))
    assert apart(rough) > 3 * 1.63 / np.sqrt(len(x))


PAIRS = {
    "product": (((0.0, 1.0), (2.0, 0.25)), (1.0, 1.0)),
    "quotient": (((1.0, 0.3), (0.0, 2.0)), (1.0, -0.5)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_products_need_corrections(x64, name):
    """Adding scores samples another law than the product of the clean ones; chains do not."""
    laws, weights = PAIRS[name]
    composed = guidance.Product([line(*law) for law in laws], weights)
    precision = sum(w / v for w, (_, v) in zip(weights, laws, strict=True))
    mean = sum(w * m / v for w, (m, v) in zip(weights, laws, strict=True)) / precision
    count = 4000
    run = lambda solver, times: np.asarray(
        jaxdiff.sample(KEY, composed, (1,), count, solver=solver, times=times).x
    )
    plain = run(solvers.Ancestral(), 60)
    kernel = guidance.Hamiltonian(0.6, 0.5, adjusted=True)
    chained = run(guidance.Corrected(kernel=kernel, count=12), 60)
    error = np.sqrt(1 / precision / count)
    off = abs(plain.mean() - mean) / error, abs(plain.var() * precision - 1)
    assert off[0] > 20 or off[1] > 0.3
    assert abs(chained.mean() - mean) < 6 * error
    assert abs(chained.var() * precision - 1) < 0.1


def test_compositions_are_the_laws_they_name(x64):
    laws = mixture(processes.VP())
    t, x = jnp.asarray(T), jnp.asarray([0.3, -0.4])
    every = jax.jit(lambda d: (d(x, t), d.log_prob(x, t)))
    # A mixture of single components is the mixture.
    covariances = laws.covariances()
    parts = [oracles.gaussian(processes.VP(), laws.means[k], covariances[k]) for k in range(3)]
    found = every(guidance.Mixture(parts, [0.5, 0.3, 0.2]))
    assert_allclose(found[0], laws(x, t), rtol=1e-10)
    assert_allclose(found[1], laws.log_prob(x, t), rtol=1e-10)
    # Weights that add up to something else shift the density, and leave the score.
    twice = every(guidance.Mixture(parts, [1.0, 0.6, 0.4]))
    assert_allclose(twice[0], found[0], rtol=1e-10)
    assert_allclose(twice[1], found[1] + np.log(2), rtol=1e-10)
    # The score of a product is the slope of its density.
    given = [guidance.Conditioned(laws, {"label": k}) for k in (0, 1)]
    product = guidance.Product(given, [0.7, -0.2])
    score = jax.jit(jax.grad(lambda x: product.log_prob(x, t)))(x)
    process = laws.process
    expected = (x + process.sigma(t) ** 2 * score) / process.alpha(t)
    assert_allclose(every(product)[0], expected, rtol=1e-9)
    assert_allclose(guidance.Product([laws], [1.0])(x, t), laws(x, t), rtol=1e-12)
    assert_allclose(given[1](x, t), laws(x, t, jnp.asarray(1)), rtol=1e-12)


class Linear(eqx.Module):
    """A network whose energy is that of N(0, v), in one of three forms."""

    process: processes.VP
    variance: float
    form: str = eqx.field(static=True)

    def __call__(self, x, label, cond=None, *, key=None):
        alpha, sigma = self.process.alpha(label), self.process.sigma(label)
        curvature = sigma / (alpha**2 * self.variance + sigma**2)
        if self.form == "dot":
            return curvature / 2 * x
        return jnp.sqrt(curvature) * x if self.form == "norm" else (1 - jnp.sqrt(curvature)) * x


@pytest.mark.parametrize("form", ["norm", "residual", "dot"])
def test_an_energy_knows_its_density(x64, form):
    process = processes.VP()
    model = jaxdiff.EnergyDenoiser(
        Linear(process, 0.5, form), process, preconditioning=jaxdiff.TimeLabel(1.0), form=form
    )
    laws = oracles.gaussian(process, jnp.zeros(2), 0.5 * jnp.eye(2))
    t, x, other = jnp.asarray(T), jnp.asarray([0.3, -0.4]), jnp.asarray([-1.0, 0.2])
    apart = lambda d: d.log_prob(x, t) - d.log_prob(other, t)
    assert_allclose(model(x, t), laws(x, t), rtol=1e-10)
    assert_allclose(apart(model), apart(laws), rtol=1e-10)


@pytest.mark.usefixtures("unchecked")
def test_errors():
    process = processes.VP()
    laws = mixture(process, jnp.float32)
    with pytest.raises(ValueError, match="`weights` must be one number for each of `bases`, got 1"):
        guidance.Product([laws, laws], [1.0])
    with pytest.raises(ValueError, match="`weights` must be above 0, got -1"):
        guidance.Mixture([laws, laws], [1.0, -1.0])
    with pytest.raises(ValueError, match="`form` must be one of norm, residual, dot"):
        jaxdiff.EnergyDenoiser(lambda x, t, c, *, key: x, process, form="square")
    with pytest.raises(ValueError, match=r"`prediction` of an EnergyDenoiser must be Eps\(\)"):
        jaxdiff.EnergyDenoiser(lambda x, t, c, *, key: x, process, jaxdiff.predictions.X0())
    score = jaxdiff.NetworkDenoiser(Linear(process, 0.5, "norm"), process)
    adjusted = guidance.Corrected(kernel=guidance.Langevin(adjusted=True))
    with pytest.raises(TypeError, match="needs the density of x_t, which NetworkDenoiser"):
        jaxdiff.sample(KEY, score, (2,), 1, solver=adjusted, times=2)
    with pytest.raises(TypeError, match="`kernel` must be a Kernel"):
        guidance.Corrected(kernel=solvers.DDIM())
