"""Adaptation to a few images, keeping the source's variety: DomainStudio."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxdiff._checks import check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.denoiser import Denoiser, check_denoiser
from jaxdiff.losses import TimeLaw, Uniform, UniformTime, Weighting
from jaxdiff.losses._batch import check_batch, each_example, wide


class DomainStudioLoss(eqx.Module):
    """Denoising of a few images, and distances between estimates kept as the source has them.

    With D_i the adapted estimate of x0 for example i, S_i that of the frozen source for the same
    noisy example, and p_i = softmax_{j != i} cos(D_i, D_j), q_i likewise of S:

        denoising + relative mean_i KL(q_i || p_i) + the same of details H(D), H(S)
                  + detail mean |H(D_i) - H(x_i)|^2

    where H are the three bands of detail of one level of Haar's wavelets. All examples of a batch
    have one time: a cosine between different noise levels would speak of them.

    Args:
        relative: weight of the distances between estimates.
        relative_detail: weight of those between their details.
        detail: weight of the details' own error.
        weighting: of the denoising error.
        time_law: law of the batch's time.

    The frozen source is the constant "source".

    Reference: Zhu, Ma, Chen, Yuan, "DomainStudio: Fine-Tuning Diffusion Models for Domain-Driven
    Image Generation using Limited Data", 2023, arXiv 2211.03264, eqs. 5 to 9. Its code means
    the KL over pairs, has different times in a batch, and adds the three bands to one, which is
    blind to where in a block of 2 x 2 the detail is; the default weights are its 4, 4 and 1 for a
    batch of 3 in the normalisation here.
    """

    relative: Number = number(2.0)
    relative_detail: Number = number(2.0)
    detail: Number = number(1.0)
    weighting: Weighting = Uniform()
    time_law: TimeLaw = UniformTime()

    def __check_init__(self):
        for name in ("relative", "relative_detail", "detail"):
            check_number(name, getattr(self, name), least=0.0)
        check_kind("weighting", self.weighting, Weighting, "losses.Uniform()")
        check_kind("time_law", self.time_law, TimeLaw, "losses.UniformTime()")

    def __call__(
        self, denoiser: Denoiser, key: PRNGKeyArray, batch: dict, frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        """The loss of a batch of images.

        Args:
            denoiser: the model that learns.
            key: typed key.
            batch: `{"x": (B, H, W, C), "cond": ...}`, B >= 3, H and W even.
            frozen: has the "source".

        Returns:
            The scalar loss, and its parts: "x0_mse", "relative", "relative_detail", "detail".

        Raises:
            ValueError: without a source; for fewer than 3 examples, among which there is
                nothing to be kept.
        """
        check_batch(batch)
        if "source" not in frozen:
            raise ValueError(
                "`frozen` must have the model that is adapted as the constant 'source', got "
                f"{sorted(frozen)}. Pass `constants={'source': model}` to the step."
            )
        source = frozen["source"]
        for model in (denoiser, source):
            check_denoiser(model)
        if len(batch["x"]) < 3:
            raise ValueError(
                f"`batch` must have 3 examples at least, with distances to be kept, "
                f"got {len(batch['x'])}."
            )
        time_key, example_key = jax.random.split(key)
        t = self.time_law.quantile(denoiser.process, jax.random.uniform(time_key))
        density = self.time_law.density(denoiser.process, t)

        def one(key, _, x0, cond):
            noise_key, own_key = jax.random.split(key)
            x = denoiser.process.noise(noise_key, x0, t)
            theirs = jax.lax.stop_gradient(source(x, t, cond, key=own_key))
            return denoiser(x, t, cond, key=own_key), theirs

        ours, theirs = each_example(one, example_key, batch)
        x = batch["x"]
        error = jnp.mean(wide(x - ours) ** 2)
        details = [jax.vmap(haar_details)(wide(images)) for images in (ours, theirs, x)]
        parts = {
            "x0_mse": error,
            "relative": _relative(wide(ours), wide(theirs)),
            "relative_detail": _relative(*details[:2]),
            "detail": jnp.mean((details[0] - details[2]) ** 2),
        }
        loss = self.weighting(denoiser.process, t, density) * error
        for name in ("relative", "relative_detail", "detail"):
            loss += getattr(self, name) * parts[name]
        return loss, parts


def haar_details(x: Float[Array, "height width channels"]) -> Float[Array, "3 h w channels"]:
    """The three bands of detail of one level of Haar's wavelets, an orthonormal transform.

    Args:
        x: `(H, W, C)`, H and W even.

    Returns:
        `(3, H/2, W/2, C)`: horizontal, vertical and diagonal differences of blocks of 2 x 2, over
        2.

    Raises:
        ValueError: for an odd size.
    """
    height, width, _ = x.shape
    if height % 2 or width % 2:
        raise ValueError(f"`x` must have an even height and width, got {x.shape}.")
    a, b, c, d = x[::2, ::2], x[::2, 1::2], x[1::2, ::2], x[1::2, 1::2]
    return jnp.stack([a - b + c - d, a + b - c - d, a - b - c + d]) / 2


def _relative(ours: Array, theirs: Array) -> Array:
    """mean_i KL(q_i || p_i), of softmaxes of the cosines to all others."""
    count = len(ours)

    def log_shares(x):
        x = x.reshape(count, -1)
        x = x / jnp.sqrt(jnp.sum(x**2, 1, keepdims=True) + jnp.finfo(x.dtype).tiny)
        cosines = jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST)
        others = jnp.where(jnp.eye(count, dtype=bool), -jnp.inf, cosines)
        return jax.nn.log_softmax(others, 1)

    log_p, log_q = log_shares(ours), log_shares(theirs)
    apart = ~jnp.eye(count, dtype=bool)
    log_p, log_q = jnp.where(apart, log_p, 0), jnp.where(apart, log_q, 0)
    terms = jnp.where(apart, jnp.exp(log_q) * (log_q - log_p), 0)
    return jnp.mean(jnp.sum(terms, 1))
