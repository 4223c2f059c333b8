import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import gaussian, mixture

from jaxdiff import losses, processes
from jaxdiff.denoiser import Denoiser


class Perturbed(Denoiser):
    """The exact denoiser moved along a fixed smooth direction."""

    oracle: Denoiser
    amount: jax.Array

    @property
    def process(self):
        return self.oracle.process

    def __call__(self, x, t, cond=None, *, key=None):
        direction = jnp.stack([jnp.sin(x[0]) + t, jnp.cos(x[1]) * x[0]])
        return self.oracle(x, t, cond) + self.amount * direction


def test_minimum_is_at_the_oracle(x64):
    """The gradient vanishes there within its standard error, and the loss curves upwards."""
    oracle = mixture(processes.VP())
    loss = losses.DenoisingLoss(losses.MinSNR(), null_cond=2, label_dropout=0.3)
    x0 = jax.vmap(oracle.sample_data, in_axes=(0, 0))(
        jax.random.split(jax.random.key(0), 4000), jnp.tile(jnp.asarray([0, 1]), 2000)
    )
    cond = jnp.tile(jnp.asarray([0, 1]), 2000)
    t = jax.random.uniform(jax.random.key(1), (4000,), minval=0.01)
    keys = jax.random.split(jax.random.key(2), 4000)

    def per_example(amount):
        denoiser = Perturbed(oracle, amount)
        return jax.vmap(lambda *a: loss.per_example(denoiser, *a)[0])(keys, x0, t, cond)

    slopes = jax.jvp(per_example, (0.0,), (1.0,))[1]
    assert abs(slopes.mean()) < 4 * slopes.std() / np.sqrt(4000)
    values = [per_example(a).mean() for a in (-0.3, 0.0, 0.3)]
    assert values[1] < values[0] and values[1] < values[2]


def test_label_dropout_replaces_conditions_at_its_rate():
    class Recorder(Denoiser):
        process = processes.VP()

        def __call__(self, x, t, cond=None, *, key=None):
            return jnp.full_like(x, cond)

    def null_fraction(rate):
        loss = losses.DenoisingLoss(null_cond=9, label_dropout=rate)
        keys = jax.random.split(jax.random.key(0), 4000)

        def dropped(key):
            error = loss.per_example(Recorder(), key, jnp.zeros(1), jnp.asarray(0.5), 1)[1]
            return error > 2

        return np.mean(jax.vmap(dropped)(keys))

    assert null_fraction(0.0) == 0 and null_fraction(1.0) == 1
    assert abs(null_fraction(0.1) - 0.1) < 4 * np.sqrt(0.09 / 4000)


def test_batch_loss_is_the_mean_of_the_examples_and_needs_no_labels():
    oracle = mixture(processes.VP(), jnp.float32)
    x = jax.random.normal(jax.random.key(0), (8, 2))
    loss = losses.DenoisingLoss()
    value, metrics = loss(oracle, jax.random.key(1), {"x": x}, {})
    time_key, example_key = jax.random.split(jax.random.key(1))
    t = losses.UniformTime().quantile(oracle.process, losses.stratified_uniform(time_key, 8))
    by_hand = [
        loss.per_example(oracle, jax.random.fold_in(example_key, i), x[i], t[i]) for i in range(8)
    ]
    np.testing.assert_allclose(value, np.mean([v[0] for v in by_hand]), rtol=1e-5)
    np.testing.assert_allclose(metrics["x0_mse"], np.mean([v[1] for v in by_hand]), rtol=1e-5)


def test_no_nan_at_the_ends_of_time():
    for process in (processes.VP(), processes.RectifiedFlow(), processes.Cosine()):
        oracle = mixture(process, jnp.float32)
        for t in (process.t_min, process.t_max):
            for weighting in (losses.Uniform(), losses.MinSNR(), losses.ELBO(), losses.P2()):
                value, gradient = jax.value_and_grad(
                    lambda x, o=oracle, t=t, w=weighting: losses.DenoisingLoss(w).per_example(
                        o, jax.random.key(0), x, jnp.float32(t)
                    )[0]
                )(jnp.ones(2))
                assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_variational_bound_of_the_exact_denoiser_is_the_entropy(x64):
    """Quadrature over t, and exact expectations over data and noise: no Monte Carlo error."""
    oracle = gaussian(processes.VP(beta_max=40.0))
    process = oracle.process
    covariance = oracle.covariances()[0]
    entropy = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * np.asarray(covariance))[1]
    # E ||x0 - x0_hat||^2 of the exact denoiser: the trace of the posterior covariance.
    eigenvalues = np.linalg.eigvalsh(covariance)
    u = (np.arange(400_000) + 0.5) / 400_000
    t = jnp.exp(np.log(process.t_min) * (1 - u) + np.log(process.t_max) * u)
    snr = jnp.exp(process.log_snr(t))[:, None]
    error = (eigenvalues / (1 + snr * eigenvalues)).sum(1)
    log_slope = np.log(process.t_max / process.t_min)
    weight = jax.vmap(lambda t: losses.ELBO()(process, t, 1.0))(t)
    diffusion = jnp.mean(weight * error * t * log_slope)
    mean_square = np.trace(covariance) + np.sum(oracle.means[0] ** 2)
    prior = losses.prior_kl(process, jnp.sqrt(jnp.full(3, mean_square / 3)))
    reconstruction = losses.gaussian_reconstruction(process, jax.random.key(0), jnp.zeros(3))
    np.testing.assert_allclose(prior + reconstruction + diffusion, entropy, atol=2e-3)

    x0 = jax.vmap(oracle.sample_data)(jax.random.split(jax.random.key(0), 20_000))
    u = losses.stratified_uniform(jax.random.key(1), 20_000)
    keys = jax.random.split(jax.random.key(2), 20_000)
    deviations = {}
    for law in (losses.UniformLogSNR(), losses.LogNormal(0.0, 2.0), losses.UniformTime()):
        estimates = jax.jit(
            jax.vmap(lambda *args: losses.variational_bound(oracle, *args, time_law=law))  # noqa: B023
        )(keys, x0, u)
        if not isinstance(law, losses.LogNormal):  # which leaves out what lies beyond its ends
            error = 4 * estimates.std() / np.sqrt(20_000)
            assert abs(estimates.mean() - entropy) < error
        deviations[type(law)] = estimates.std()
    # By default an estimate is of the size of the truth, and not a hundred times that.
    default = jax.jit(jax.vmap(lambda *args: losses.variational_bound(oracle, *args)))(keys, x0, u)
    np.testing.assert_allclose(default.std(), deviations[losses.UniformLogSNR], rtol=1e-9)
    assert default.std() < 0.15 * deviations[losses.UniformTime]


LAWS = (
    losses.UniformTime(),
    losses.UniformLogSNR(),
    losses.LogNormal(),
    losses.LogitNormal(),
)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_examples_of_low_precision_have_times_of_full_precision(dtype):
    """With every law; the loss is that of the same examples in float32, up to rounding."""
    oracle = mixture(processes.VP(), jnp.float32)
    x = jax.random.normal(jax.random.key(3), (512, 2)).astype(dtype)
    seen = []

    class Recorder(Denoiser):
        base: Denoiser

        @property
        def process(self):
            return self.base.process

        def __call__(self, x, t, cond=None, *, key=None):
            seen.append((x.dtype, t.dtype))
            return self.base(x, t, cond)

    for law in LAWS:
        loss = losses.DenoisingLoss(losses.MinSNR(), law)
        low, high = (
            loss(Recorder(oracle), jax.random.key(1), {"x": x.astype(d)}, {})[0]
            for d in (dtype, jnp.float32)
        )
        assert low.dtype == jnp.float32 and np.isfinite(low)
        np.testing.assert_allclose(low, high, rtol=0.3)  # other noise
    assert set(seen) == {(jnp.dtype(d), jnp.dtype("float32")) for d in (dtype, jnp.float32)}


def test_two_losses_with_one_key_see_the_same_times_and_noise():
    oracle = mixture(processes.VP(), jnp.float32)
    batch = {"x": jax.random.normal(jax.random.key(3), (16, 2))}
    draws = [
        losses.each_example(
            lambda key, u, x0, cond: (u, oracle.process.noise(key, x0, 0.5)), key, batch
        )
        for key in (jax.random.key(0), jax.random.key(0), jax.random.key(1))
    ]
    for same, other in zip(draws[0], draws[1], strict=True):
        np.testing.assert_array_equal(same, other)
    assert not np.allclose(draws[0][0], draws[2][0])


def test_discrete_reconstruction_is_a_normalised_likelihood():
    process = eqx.tree_at(lambda p: p.t_min, processes.VP(), 0.05)
    values = jnp.linspace(-1, 1, 8)
    t = jnp.float32(process.t_min)
    noise = jax.random.normal(jax.random.key(0), (1,))
    for true in values[:3]:
        noisy = process.marginal(true, noise, t)
        likelihood = jnp.exp(-0.5 * ((noisy - process.alpha(t) * values) / process.sigma(t)) ** 2)
        expected = -jnp.log(likelihood[jnp.argmin(jnp.abs(values - true))] / likelihood.sum())
        mine = losses.discrete_reconstruction(process, jax.random.key(0), true[None], levels=8)
        np.testing.assert_allclose(mine, expected, rtol=1e-3, atol=1e-5)
