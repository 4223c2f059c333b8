"""Denoising score matching, and flow matching with it."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.denoiser import Denoiser, check_denoiser
from jaxdiff.losses._batch import drop_cond, each_example, wide
from jaxdiff.losses._time_laws import TimeLaw, UniformTime
from jaxdiff.losses._weightings import Uniform, Weighting


def denoising_error(
    denoiser: Denoiser, key: PRNGKeyArray, x0: Array, t: Array, cond: PyTree = None
) -> Array:
    """Mean squared error of x0_hat for one example, noised to time t.

    mean over the event of (x0 - D(alpha x0 + sigma eps, t, cond))^2.

    Args:
        denoiser: the denoiser.
        key: typed key; draws eps and the denoiser's own randomness (dropout).
        x0: clean example, `(*event)`.
        t: scalar time.
        cond: its condition.

    Returns:
        A scalar, in float32 at least.
    """
    noise_key, denoiser_key = jax.random.split(key)
    x = denoiser.process.noise(noise_key, x0, t)
    x0_hat = denoiser(x, t, cond, key=denoiser_key)
    return jnp.mean(wide(x0 - x0_hat) ** 2)


class DenoisingLoss(eqx.Module):
    """Weighted denoising score matching over a batch.

    loss = mean_i w(t_i) * denoising_error_i, t_i ~ time_law, stratified over the batch. With
    the weighting `Uniform(Velocity())` it is conditional flow matching.

    Args:
        weighting: factor on the error in x0.
        time_law: law of the training time.
        null_cond: the condition that means "none", of the network's entries; None trains without
            label dropout.
        label_dropout: probability with which a condition is replaced by `null_cond`, for
            classifier-free guidance.

    Reference: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020,
    arXiv 2006.11239, algorithm 1; Vincent, "A Connection Between Score Matching and Denoising
    Autoencoders", 2011; label dropout from Ho, Salimans, "Classifier-Free Diffusion Guidance",
    2022, arXiv 2207.12598, algorithm 1.
    """

    weighting: Weighting = Uniform()
    time_law: TimeLaw = UniformTime()
    null_cond: PyTree = None
    label_dropout: Number = number(0.1)

    def __check_init__(self):
        check_kind("weighting", self.weighting, Weighting, "losses.MinSNR()")
        check_kind("time_law", self.time_law, TimeLaw, "losses.UniformTime()")
        check_number("label_dropout", self.label_dropout, least=0.0, most=1.0)

    def per_example(
        self, denoiser: Denoiser, key: PRNGKeyArray, x0: Array, t: Array, cond: PyTree = None
    ) -> tuple[Array, Array]:
        """Weighted loss and plain error of one example at a given time.

        Args:
            denoiser: the denoiser.
            key: this example's key.
            x0: clean example, `(*event)`.
            t: scalar time.
            cond: its condition.

        Returns:
            w(t) * error and error, scalars.
        """
        drop_key, error_key = jax.random.split(key)
        cond = drop_cond(drop_key, cond, self.null_cond, self.label_dropout)
        error = denoising_error(denoiser, error_key, x0, t, cond)
        density = self.time_law.density(denoiser.process, t)
        return self.weighting(denoiser.process, t, density) * error, error

    def __call__(
        self, denoiser: Denoiser, key: PRNGKeyArray, batch: dict, frozen: dict
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            denoiser: the denoiser that learns.
            key: typed key; example i draws from its fold_in with i.
            batch: `{"x": (B, *event), "cond": pytree with leading axis B}`; "cond" may be
                absent.
            frozen: other models; not used.

        Returns:
            The scalar loss, and `{"x0_mse": mean error}`.
        """
        check_denoiser(denoiser)
        denoiser.check_cond(self.null_cond)

        def one(key, u, x0, cond):
            t = self.time_law.quantile(denoiser.process, u)
            return self.per_example(denoiser, key, x0, t, cond)

        losses, errors = each_example(one, key, batch)
        return losses.mean(), {"x0_mse": errors.mean()}
