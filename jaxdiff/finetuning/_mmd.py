"""MMD fine-tuning: a few-step sampler matched to the data in a kernel embedding of features."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jaxdiff._checks import check_callable, check_count, check_kind
from jaxdiff.denoiser import Denoiser
from jaxdiff.finetuning._through_sampler import ThroughSampler
from jaxdiff.metrics import (
    ClassEmbedding,
    Embedding,
    Kernel,
    Polynomial,
    conditional_mmd2,
    mmd2_biased,
    mmd2_to_classes,
    mmd2_to_embedding,
    mmd2_unbiased,
)


class MMDLoss(ThroughSampler):
    """Squared MMD between features of samples and of data: the only loss of MMD-DDM.

    MMD^2(F(sample(model)), F(data)), differentiated through all steps of the sampler. No teacher,
    no discriminator, no denoising loss; the sampler is the same afterwards. Start from averaged
    weights, at a small rate and with clipped gradients (Adam, 5e-6, norm 0.5 for the CIFAR-10
    model of DDPM), and watch features that the loss does not see: it is KID itself, and can be
    met without better images.

    Args:
        features: `x -> (d,)` of one example, a pytree of frozen weights such as a classifier's
            `features` (`jax.tree_util.Partial`, or an `equinox.Module`).
        kernel: on features; None for KID's, or for that of `reference`.
        unbiased: the U-statistic, which may be negative; otherwise the V-statistic, which also
            pushes samples apart.
        reference: the embedding of the data set's features under the kernel (`sample_embedding`
            of some thousand, or `mean_embedding` of all), in place of those of the batch: no noise
            from the data. Of a `class_embedding` it is the data in the proportions of the batch's
            classes, so that how many samples each class has is no noise either: the labels
            `batch["cond"]`, and the unbiased statistic.
        num_classes: match within each class of the labels `batch["cond"]`, and not over all; None
            for all.
        solver: as of `ThroughSampler`.
        times: likewise.
        last_k: likewise.
        sampled: likewise.
        clip: likewise.
        micro_batch: likewise: the exact U-statistic of a batch of any size.

    Reference: Aiello, Valsesia, Magli, "Fast Inference in Denoising Diffusion Models via MMD
    Finetuning", 2023, arXiv 2301.07969, section 3. Its code clips samples with no gradient outside
    the range, has dropout on, and pairs all samples with all examples of the batch; here a sample
    is not paired with the example whose condition it has, which would bias the statistic.
    """

    features: Callable[[Array], Array] = eqx.field(kw_only=True)
    kernel: Kernel | None = eqx.field(default=None, kw_only=True)
    unbiased: bool = eqx.field(static=True, default=True, kw_only=True)
    reference: Embedding | ClassEmbedding | None = eqx.field(default=None, kw_only=True)
    num_classes: int | None = eqx.field(static=True, default=None, kw_only=True)

    def __check_init__(self):
        check_callable("features", self.features, "jax.tree_util.Partial(features, weights)")
        if self.kernel is not None:
            check_kind("kernel", self.kernel, Kernel, "metrics.Polynomial()")
        if self.reference is not None:
            if not isinstance(self.reference, ClassEmbedding):
                check_kind("reference", self.reference, Embedding, "metrics.sample_embedding(y)")
            elif not self.unbiased:
                raise ValueError(
                    "`reference` of classes goes with the unbiased statistic, got "
                    "`unbiased=False`. Take a `sample_embedding`."
                )
            if self.kernel is not None:
                raise ValueError(
                    "`reference` has a kernel of its own, got `kernel` too. Leave it out."
                )
        if self.num_classes is not None:
            check_count("num_classes", self.num_classes)
            if self.reference is not None or not self.unbiased:
                raise ValueError(
                    "`num_classes` goes with the unbiased statistic of a batch, got `reference` or "
                    "`unbiased=False` too. Leave one of them out."
                )

    def of_samples(
        self, denoiser: Denoiser, key: PRNGKeyArray, batch: dict, frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        """See `ThroughSampler`. Metrics: "mmd2", the loss itself."""
        x, cond = batch["x"], batch.get("cond")
        count, shape = len(x), x.shape[1:]

        def look(x, cond):
            del cond
            return self.features(self.seen(x))

        fake = self.draw(denoiser, key, shape, count, cond, look=look)
        if fake.ndim != 2:
            raise ValueError(
                f"`features` must return a vector for an example, got shape {fake.shape[1:]}. "
                "Flatten it."
            )
        if isinstance(self.reference, ClassEmbedding):
            loss = mmd2_to_classes(fake, self._labels(cond), self.reference)
            return loss, {"mmd2": loss}
        if self.reference is not None:
            loss = mmd2_to_embedding(fake, self.reference, biased=not self.unbiased)
            return loss, {"mmd2": loss}
        # Of data nothing is differentiated: frozen weights, frozen images.
        real = jax.lax.stop_gradient(jax.vmap(self.features)(x))
        kernel = Polynomial() if self.kernel is None else self.kernel
        if self.num_classes is not None:
            labels = self._labels(cond)
            loss, _ = conditional_mmd2(
                fake, labels, real, labels, kernel, num_classes=self.num_classes
            )
        else:
            # A sample has its condition from the real example in its place: they are not
            # independent, and have no part in the unbiased mean.
            loss = (
                mmd2_unbiased(fake, real, kernel, paired=True)
                if self.unbiased
                else mmd2_biased(fake, real, kernel)
            )
        return loss, {"mmd2": loss}

    @staticmethod
    def _labels(cond: Any) -> Array:
        """The classes of the batch."""
        plain = cond is not None and not isinstance(cond, dict)
        if not (plain and jnp.issubdtype(jnp.result_type(cond), jnp.integer)):
            raise ValueError(
                "Matching by class needs the labels of the batch, integers in `batch['cond']`, got "
                f"{type(cond).__name__}. Leave `num_classes` out, or take a `sample_embedding`."
            )
        return jnp.asarray(cond)
