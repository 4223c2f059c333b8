"""Classifier guidance: the gradient of a classifier of noisy examples, and such a classifier."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_callable, check_kind, check_same_process
from jaxdiff._tree import number
from jaxdiff.conditions import as_entries, check_classes, num_classes_of, take
from jaxdiff.denoiser import Denoiser, DenoiserMap, Estimate, Preconditioning, TimeLabel
from jaxdiff.guidance._scale import Scale, check_scale, scale_at
from jaxdiff.processes import GaussianProcess


class NoisyClassifier(eqx.Module):
    """log p(y | x_t = x) of a network that is told of the noise: what `ClassifierGuidance` follows.

    Train it with `losses.NoisyClassifierLoss`, whose minimiser is the exact posterior.

    Args:
        network: callable pytree `(x, label, *, key) -> logits`, one example, such as
            `networks.ConvClassifier(noise_label=True)`.
        process: the forward process, that of the denoiser to be guided.
        preconditioning: input scale and noise label.

    Reference: as of `ClassifierGuidance`.
    """

    network: Callable[..., Array]
    process: GaussianProcess
    preconditioning: Preconditioning = TimeLabel()

    def __check_init__(self):
        check_callable("network", self.network, "a classifier with a noise label")
        check_kind("process", self.process, GaussianProcess, "processes.VP()")
        check_kind("preconditioning", self.preconditioning, Preconditioning, "TimeLabel()")

    @property
    def num_classes(self) -> int | None:
        """Number of classes, if the network says so."""
        return num_classes_of(self.network)

    def logits(self, x: Array, t: Array, *, key: PRNGKeyArray | None = None) -> Array:
        """Unnormalised log p(y | x_t = x) of every class, `(num_classes,)`; no key, no dropout."""
        scale = self.preconditioning.scale(self.process, t)
        label = self.preconditioning.label(self.process, t)
        return self.network((scale * x).astype(x.dtype), label, key=key)

    def __call__(self, x: Array, t: Array, y: Array) -> Array:
        """log p(y | x_t = x), a scalar of one noisy example and its class."""
        logits = self.logits(x, t)
        check_classes(y, len(logits))
        return jax.nn.log_softmax(logits)[y]


class ClassifierGuidance(DenoiserMap):
    """D + scale (sigma^2 / alpha) grad_x log p(y | x_t): E[x0 | x_t, y] at scale 1, exactly.

    Kind 2, with data of the example: the entry "y" of its condition. One evaluation of the base,
    and one forward and backward pass of the classifier.

    Args:
        base: any denoiser.
        log_prob: `(x, t, y) -> log p(y | x_t = x)`, a scalar of one noisy example, up to what does
            not depend on x; a pytree whose weights are leaves, such as a `NoisyClassifier`, of the
            base's process, or
            `jax.tree_util.Partial(function, classifier)`.
        scale: 1 is Bayes' rule; at others the law is p(y | x_t)^scale p(x_t), unnormalised.

    Raises:
        ValueError: when called, without "y", or for a function whose value is no scalar.

    Reference: Dhariwal, Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021, arXiv
    2105.05233, algorithm 2, in x0; the shift of an ancestral step's mean by its variance times
    the gradient, algorithm 1, is equal to it to first order in the step.
    """

    base: Denoiser
    log_prob: Callable[[Array, Array, PyTree], Array]
    scale: Scale = number(1.0)

    takes: ClassVar[tuple[str, ...]] = ("y",)

    def __check_init__(self):
        check_callable("log_prob", self.log_prob, "jax.tree_util.Partial(function, classifier)")
        check_scale(self.scale)
        process = getattr(self._classifier, "process", None)
        if isinstance(process, GaussianProcess):
            check_same_process("log_prob", process, self.base.process)

    @property
    def _classifier(self) -> Any:
        """What may know its process and classes: the function, or whose method it is."""
        return getattr(self.log_prob, "__self__", self.log_prob)

    def check_cond(self, cond: PyTree) -> None:
        """See `Denoiser`; classes too, of a classifier that says how many it has."""
        super().check_cond(cond)
        if (count := num_classes_of(self._classifier)) is not None:
            check_classes(as_entries(cond).get("y"), count)

    @property
    def bounded_start(self) -> bool:
        """True: a trained classifier's slope does not vanish with alpha."""
        return True

    def estimate(
        self, x: Array, t: Array, cond: PyTree = None, *, key: PRNGKeyArray | None = None
    ) -> Estimate:
        """See `Denoiser`."""
        y, rest = take(cond, "y", by="ClassifierGuidance")
        found = self.base.estimate(x, t, rest, key=key)
        value, pull = jax.vjp(lambda x: self.log_prob(x, t, y), x)
        if jnp.shape(value) != ():
            raise ValueError(
                f"`log_prob` must return a scalar of one example, got shape {jnp.shape(value)}. "
                "Sum it, or take the entry of the class."
            )
        (slope,) = pull(jnp.ones_like(value))
        process = self.process
        factor = scale_at(self.scale, process, t) * process.sigma(t) ** 2 / process.alpha(t)
        return found.moved(process, t, found.x0 + factor * slope)
