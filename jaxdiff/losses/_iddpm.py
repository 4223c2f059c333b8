"""The hybrid loss that learns the variance of reverse steps."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_count, check_number
from jaxdiff._tree import Number, as_float_array, number
from jaxdiff.denoiser import Denoiser, check_denoiser
from jaxdiff.losses._batch import drop_cond, each_example, wide
from jaxdiff.processes import GaussianProcess


def _posterior(process: GaussianProcess, t: Array, s: Array) -> tuple[Array, Array, Array, Array]:
    """Of q(x_s | x_t, x0): weights of x_t and x0 in the mean, log beta-tilde and log beta."""
    alpha_t, alpha_s = process.alpha(t), process.alpha(s)
    square_t, square_s = process.sigma(t) ** 2, process.sigma(s) ** 2
    ratio = alpha_t / alpha_s
    beta = square_t - ratio**2 * square_s
    tilde = beta * square_s / square_t
    return ratio * square_s / square_t, alpha_s * beta / square_t, jnp.log(tilde), jnp.log(beta)


def reverse_step_nll(
    process: GaussianProcess,
    x0: Array,
    x: Array,
    t: Array,
    s: Array,
    x0_hat: Array,
    variance: Array,
) -> Array:
    """KL(q(x_s | x_t, x0) || p(x_s | x_t)) of one example, in nats per dimension.

    p is Gaussian around the mean that x0_hat implies, with the log-variance
    v log beta + (1 - v) log beta-tilde.

    Args:
        process: the forward process.
        x0: clean example, `(*event)`.
        x: noisy example at t.
        t: scalar time.
        s: scalar target time, 0 < s < t.
        x0_hat: the denoiser's answer.
        variance: v, `(*event)`.

    Returns:
        A scalar.

    Reference: Nichol, Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021,
    arXiv 2102.09672, equations 6 and 15.
    """
    _, on_x0, log_tilde, log_beta = _posterior(process, t, s)
    log_variance = variance * log_beta + (1 - variance) * log_tilde
    square = (on_x0 * (x0 - x0_hat)) ** 2
    return 0.5 * jnp.mean(
        log_variance
        - log_tilde
        - 1
        + jnp.exp(log_tilde - log_variance)
        + square * jnp.exp(-log_variance)
    )


def _discretised_nll(x0: Array, mean: Array, log_std: Array) -> Array:
    """-log P(x0) under a Gaussian rounded to 256 levels in [-1, 1], in nats per dimension."""
    half, scale = 1 / 255, jnp.exp(-log_std)
    below, above = log_ndtr((x0 + half - mean) * scale), log_ndtr((mean - x0 + half) * scale)
    # A bin's mass is the same on either side of the mean; on the left it does not cancel.
    left = -jnp.abs(x0 - mean)
    upper, lower = log_ndtr((left + half) * scale), log_ndtr((left - half) * scale)
    gap = jnp.minimum(lower - upper, -jnp.finfo(x0.dtype).eps)
    inside = upper + jnp.log(-jnp.expm1(gap))
    # The first and last bins are open.
    return -jnp.mean(jnp.where(x0 < -0.999, below, jnp.where(x0 > 0.999, above, inside)))


class HybridLoss(eqx.Module):
    """L_simple + vlb_weight * T * L_vlb: noise regression, and a bound that trains the variance.

    L_simple is the mean squared error in eps; L_vlb, in bits per dimension, is that of the step
    from t = i T_max / T to the one before, or the discretised likelihood of 8-bit images for the
    last. No gradient of L_vlb reaches the mean.

    Args:
        num_steps: T, the steps of the discrete process whose variances are learned.
        vlb_weight: 0.001 in the paper.
        null_cond: the condition that means "none"; None trains without label dropout.
        label_dropout: probability of training without the label.

    Reference: Nichol, Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021,
    arXiv 2102.09672, equation 16. Time is stratified over the batch instead of sampled by
    importance.
    """

    num_steps: int = eqx.field(static=True, default=1000)
    vlb_weight: Number = number(0.001)
    null_cond: PyTree = None
    label_dropout: Number = number(0.1)

    def __check_init__(self):
        check_count("num_steps", self.num_steps, least=2)
        check_number("vlb_weight", self.vlb_weight, least=0.0)
        check_number("label_dropout", self.label_dropout, least=0.0, most=1.0)

    def per_example(
        self,
        denoiser: Denoiser,
        key: PRNGKeyArray,
        x0: Array,
        index: Array,
        cond: PyTree = None,
    ) -> tuple[Array, Array]:
        """L_simple and L_vlb (bits per dimension) of one example at step `index` in 1 .. T."""
        process = denoiser.process
        drop_key, noise_key, denoiser_key = jax.random.split(key, 3)
        cond = drop_cond(drop_key, cond, self.null_cond, self.label_dropout)
        spacing = process.t_max / self.num_steps
        t = as_float_array(index) * spacing
        # The last step, to 0, has no beta-tilde; as in the paper it takes that of the one before.
        s = (as_float_array(jnp.maximum(index, 2)) - 1) * spacing
        x = process.noise(noise_key, x0, t)
        found = denoiser.estimate(x, t, cond, key=denoiser_key)
        if found.variance is None:
            raise TypeError(
                "`HybridLoss` trains a learned variance, which the denoiser does not have: got "
                f"{type(denoiser).__name__}. Use a LearnedVarianceDenoiser, or DenoisingLoss."
            )
        x0, x, x0_hat, variance = map(wide, (x0, x, found.x0, found.variance))
        simple = jnp.exp(process.log_snr(t)) * jnp.mean((x0 - x0_hat) ** 2)

        mean = jax.lax.stop_gradient(x0_hat)
        before = jnp.maximum(t, 2 * spacing)
        kl = reverse_step_nll(process, x0, x, before, s, mean, variance)
        _, _, log_tilde, _ = _posterior(process, before, s)
        log_variance = variance * 2 * jnp.log(process.sigma(t)) + (1 - variance) * log_tilde
        likelihood = _discretised_nll(x0, mean, 0.5 * log_variance)
        return simple, jnp.where(index > 1, kl, likelihood) / math.log(2)

    def __call__(
        self, denoiser: Denoiser, key: PRNGKeyArray, batch: dict, frozen: dict
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch, as `DenoisingLoss`; metrics "simple" and "vlb"."""
        check_denoiser(denoiser)
        denoiser.check_cond(self.null_cond)

        def one(key, u, x0, cond):
            index = 1 + jnp.minimum((u * self.num_steps).astype(jnp.int32), self.num_steps - 1)
            return self.per_example(denoiser, key, x0, index, cond)

        simple, vlb = jax.tree.map(jnp.mean, each_example(one, key, batch))
        loss = simple + self.vlb_weight * self.num_steps * vlb
        return loss, {"simple": simple, "vlb": vlb}
