import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import gaussian

import jaxdiff
from jaxdiff import losses, predictions, processes, solvers
from jaxdiff.denoiser import LearnedVarianceDenoiser
from jaxdiff.losses._iddpm import _discretised_nll


class Affine(eqx.Module):
    """Predicts x0 by the exact Gaussian denoiser plus a shift, and a constant variance."""

    oracle: jaxdiff.Denoiser
    shift: jax.Array
    variance: jax.Array

    def __call__(self, x, t, cond=None, *, key=None):
        x0 = self.oracle(x, t) + self.shift
        return jnp.concatenate([x0, jnp.broadcast_to(2 * self.variance - 1, x.shape)], -1)


def learned(oracle, variance=0.3, shift=0.0):
    network = Affine(oracle, jnp.asarray(shift), jnp.asarray(variance))
    label = jaxdiff.TimeLabel(factor=1.0)
    return LearnedVarianceDenoiser(network, oracle.process, predictions.X0(), label)


def test_with_the_small_variance_a_step_costs_half_the_snr_difference(x64):
    """KL = (SNR_s - SNR_t) / 2 * error^2, the discrete-time bound of variational diffusion."""
    process = processes.Cosine()
    x0, x, x0_hat = jax.random.normal(jax.random.key(0), (3, 5))
    t, s = jnp.asarray(0.6), jnp.asarray(0.55)
    kl = losses.reverse_step_nll(process, x0, x, t, s, x0_hat, jnp.zeros(5))
    snr = [jnp.exp(process.log_snr(time)) for time in (s, t)]
    np.testing.assert_allclose(kl, (snr[0] - snr[1]) / 2 * jnp.mean((x0 - x0_hat) ** 2), rtol=1e-9)


def test_the_best_variance_adds_the_posterior_variance(x64):
    """beta-tilde + c^2 Var(x0 | x_t): Analytic-DPM's optimum, here for N(0, 0.49 I)."""
    process, scale = processes.VP(), 0.49
    t, s = jnp.asarray(0.5), jnp.asarray(0.45)
    alpha, sigma = process.alpha(t), process.sigma(t)
    posterior_variance = 1 / (1 / scale + alpha**2 / sigma**2)
    # Errors of the exact denoiser whose mean square is exactly the posterior variance.
    error = jnp.sqrt(posterior_variance) * jnp.asarray([1.0, -1.0, 1.0, -1.0])
    beta = sigma**2 - (alpha / process.alpha(s)) ** 2 * process.sigma(s) ** 2
    tilde = beta * process.sigma(s) ** 2 / sigma**2
    best = tilde + (process.alpha(s) * beta / sigma**2) ** 2 * posterior_variance
    v = (jnp.log(best) - jnp.log(tilde)) / (jnp.log(beta) - jnp.log(tilde))
    assert 0 < v < 1
    nll = lambda v: losses.reverse_step_nll(process, error, error, t, s, 0 * error, v)
    np.testing.assert_allclose(jax.grad(nll)(v), 0, atol=1e-10)
    assert jax.hessian(nll)(v) > 0


@pytest.mark.parametrize("index", [1, 2, 30, 100])
def test_the_bound_trains_the_variance_and_never_the_mean(x64, index):
    oracle = gaussian(processes.Cosine())
    loss = losses.HybridLoss(num_steps=100)

    def parts(network):
        denoiser = eqx.tree_at(lambda d: d.network, learned(oracle), network)
        x0 = jnp.asarray([0.2, -1.0, 0.6])
        return loss.per_example(denoiser, jax.random.key(0), x0, jnp.asarray(index))

    network = learned(oracle, shift=0.1).network
    simple = jax.grad(lambda n: parts(n)[0], allow_int=True)(network)
    vlb = jax.grad(lambda n: parts(n)[1], allow_int=True)(network)
    assert simple.shift != 0 and simple.variance == 0
    assert vlb.shift == 0 and np.isfinite(vlb.variance) and vlb.variance != 0


def test_the_last_step_is_a_normalised_likelihood_of_pixels(x64):
    values = jnp.linspace(-1, 1, 256)
    mean, log_std = jnp.full(256, 0.3), jnp.full(256, jnp.log(0.2))
    probabilities = jax.vmap(lambda v, m, s: jnp.exp(-_discretised_nll(v, m, s)))(
        values, mean, log_std
    )
    np.testing.assert_allclose(probabilities.sum(), 1, rtol=1e-6)
    expected = jax.scipy.stats.norm.pdf(values[160:170], 0.3, 0.2) * (2 / 255)
    np.testing.assert_allclose(probabilities[160:170], expected, rtol=1e-3)


def test_sampling_with_a_constant_learned_variance_is_ancestral_sampling(x64):
    oracle = gaussian(processes.VP())
    run = lambda denoiser, solver: (
        jaxdiff.sample(jax.random.key(0), denoiser, (3,), 4, solver=solver, times=10).x
    )
    mine = run(learned(oracle, variance=0.3), solvers.LearnedAncestral())
    np.testing.assert_allclose(mine, run(oracle, solvers.Ancestral(0.3)), rtol=1e-9)
    with pytest.raises(TypeError, match="LearnedVarianceDenoiser"):
        run(oracle, solvers.LearnedAncestral())


def test_batch_loss_is_the_mean_of_its_examples():
    oracle = gaussian(processes.Cosine())
    loss, denoiser = losses.HybridLoss(num_steps=50, vlb_weight=0.01), learned(oracle)
    x = jnp.clip(jax.random.normal(jax.random.key(0), (6, 3)), -1, 1)
    value, metrics = jax.jit(lambda d, x: loss(d, jax.random.key(1), {"x": x}, {}))(denoiser, x)
    np.testing.assert_allclose(value, metrics["simple"] + 0.5 * metrics["vlb"], rtol=1e-5)
    assert np.isfinite(value)


def test_wrong_channels_are_named():
    denoiser = LearnedVarianceDenoiser(lambda x, t, cond, key: x, processes.VP())
    with pytest.raises(ValueError, match="twice the channels"):
        denoiser(jnp.zeros(3), jnp.asarray(0.5))
