"""The unleashing mask's loss: forgetting what is known better than it can be."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jaxdiff._checks import check_callable, check_kind
from jaxdiff.denoiser import Denoiser, check_denoiser
from jaxdiff.losses import DenoisingLoss, each_example


class Flooding(eqx.Module):
    """Denoising down to a level, and up to it from below: |l - level(t)| + level(t).

    Below the level an example is climbed on, above it descended on. Levels are those of the error
    of a model that knows the law and no single example: then what a network remembers of its
    training examples is what it forgets. A class is not forgotten so, and one level for all times
    means
    nothing: E |x0 - D(x_t)|^2 goes from 0 to the data's variance.

    For a Gaussian of variance s^2 it is s^2 sigma^2 / (alpha^2 s^2 + sigma^2) per number.

    Args:
        level: `(process, t) -> least mean squared error in x0`, a scalar.
        denoising: the loss; its weighting multiplies both.

    Raises:
        TypeError: when called, for a model that is no denoiser.

    Reference: Zhu, Li, Yao, Liu, Xu, Han, "Unleashing Mask: Explore the Intrinsic
    Out-of-Distribution Detection Capability", 2023, arXiv 2306.03715, for classifiers;
    its masks are `saliency_mask` or an adapter here. After Ishida, Yamane, Sakai, Niu, Sugiyama,
    "Do We Need Zero Training Loss After Achieving Zero Training Error?", 2020, arXiv 2002.08709.
    """

    level: Any
    denoising: DenoisingLoss = DenoisingLoss()

    def __check_init__(self):
        check_callable("level", self.level, "lambda process, t: process.sigma(t) ** 2")
        check_kind("denoising", self.denoising, DenoisingLoss, "losses.DenoisingLoss()")

    def __call__(
        self, model: Denoiser, key: PRNGKeyArray, batch: dict[str, Any], frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        """Mean loss of a batch.

        Args:
            model: the denoiser.
            key: typed key; example i draws from its fold_in with i.
            batch: `{"x": (B, *event), "cond": ...}`.
            frozen: not used.

        Returns:
            The scalar loss, and "below", the share of examples that were climbed on.
        """
        del frozen
        check_denoiser(model)
        law = self.denoising.time_law

        def one(key, u, x0, cond):
            t = law.quantile(model.process, u)
            weighted, error = self.denoising.per_example(model, key, x0, t, cond)
            level = jnp.asarray(self.level(model.process, t), error.dtype)
            # The weight of both: at no error 1 is as good as any.
            weight = jnp.where(error > 0, weighted / jnp.where(error > 0, error, 1), 0)
            weight = jax.lax.stop_gradient(weight)
            return weight * (jnp.abs(error - level) + level), error < level

        losses, below = each_example(one, key, batch)
        return losses.mean(), {"below": below.mean()}
