"""Plug and play: a classifier of clean examples, adapted to noise by an expert for each time."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.tree_util import tree_flatten_with_path, tree_map_with_path
from jaxtyping import Array, PRNGKeyArray

from jaxdiff._checks import check_callable, check_count, check_key, check_kind, check_number
from jaxdiff._tree import Number, number
from jaxdiff.conditions import check_classes, num_classes_of
from jaxdiff.finetuning import Adapter, make_adapter, merge
from jaxdiff.losses import TimeLaw, UniformTime, each_example
from jaxdiff.losses._batch import wide
from jaxdiff.parallel import path_of
from jaxdiff.processes import GaussianProcess


class Experts(eqx.Module):
    """A classifier and N small changes of it, of which the one of the time is made.

    Expert i is for times in [edges_{i-1}, edges_i): a boundary belongs to the noisier side. For
    guidance by it:

        ClassifierGuidance(denoiser, experts.log_prob)

    Where examples share a time, as on a sampler's grid, one classifier is made for all of them;
    else one for each example.

    Attributes:
        classifier: of clean examples, `x -> logits`, a pytree; what it is given is x_t as it is.
        adapters: of low rank, with a leading axis of experts.
        biases: what is added to vectors of the classifier, by path, `(N, *vector)`.
        edges: inner ends of the ranges, `(N - 1,)`, increasing.
        process: the forward process, whose time it is.
    """

    classifier: Callable[[Array], Array]
    adapters: Adapter = eqx.field(metadata={"stacked": True})
    biases: dict[str, Array]
    edges: Array
    process: GaussianProcess

    @property
    def learned(self) -> list[Array]:
        """What learns, for `Player(trainable=lambda experts: experts.learned)`."""
        return [*self.adapters.learned, *self.biases.values()]

    @property
    def num_classes(self) -> int | None:
        """Number of classes, if the classifier says so."""
        return num_classes_of(self.classifier)

    def index(self, t: Array) -> Array:
        """Which expert is for a time, from 0 to N - 1."""
        return jnp.searchsorted(self.edges, t, side="right")

    def expert(self, t: Array) -> Callable[[Array], Array]:
        """The classifier for a time."""
        i = self.index(t)
        adapter, biases = jax.tree.map(lambda leaf: leaf[i], (self.adapters, self.biases))

        def shift(path, leaf):
            name = path_of(path)
            return leaf + biases[name].astype(leaf.dtype) if name in biases else leaf

        return tree_map_with_path(shift, merge(self.classifier, adapter))

    def __call__(self, x: Array, t: Array) -> Array:
        """Logits of a noisy example at a time."""
        return self.expert(t)(x)

    def log_prob(self, x: Array, t: Array, y: Array) -> Array:
        """log p(y | x_t = x) of a class, a scalar."""
        logits = wide(self(x, t))
        check_classes(y, len(logits))
        return jax.nn.log_softmax(logits)[y]


def make_experts(
    classifier: Callable[[Array], Array],
    process: GaussianProcess,
    key: PRNGKeyArray,
    *,
    count: int = 5,
    rank: int = 16,
    alpha: float | None = 8.0,
    layers: str = "",
) -> Experts:
    """Experts that are the classifier itself, to be learned by `PlugAndPlayLoss`.

    Args:
        classifier: of clean examples, a pytree with layers of Flax or Equinox.
        process: the forward process; its time up to t_max is cut into equal ranges. For others
            replace `edges`.
        key: typed key.
        count: N.
        rank: as of `finetuning.make_adapter`.
        alpha: likewise.
        layers: likewise; of the classifier's biases all learn.

    Returns:
        The experts.

    Raises:
        ValueError: if no layer has such a path.
    """
    check_callable("classifier", classifier, "networks.ConvClassifier(...)")
    check_kind("process", process, GaussianProcess, "processes.VP()")
    check_key(key)
    check_count("count", count)

    def one(key):
        return make_adapter(classifier, key, rank=rank, alpha=alpha, layers=layers)

    adapters = jax.vmap(one)(jax.random.split(key, count))
    leaves = ((path_of(path), leaf) for path, leaf in tree_flatten_with_path(classifier)[0])
    biases = {
        name: jnp.zeros((count, *leaf.shape), leaf.dtype)
        for name, leaf in leaves
        if name.rpartition("/")[2] == "bias"
    }
    edges = process.t_max * jnp.arange(1, count) / count
    return Experts(classifier, adapters, biases, edges, process)


class PlugAndPlayLoss(eqx.Module):
    """KL(softmax(f(x0) / temperature) || softmax(f_i(x_t))), f_i the expert of t: without labels.

    The clean classifier f teaches its experts on examples that may be samples of the model. At
    temperature 1, the best answer to x_t is E[p(y | x0) | x_t] = p(y | x_t) for an f that knows
    p(y | x0), and so exact guidance as far as an expert can follow it through its range. At others
    it is the same of a sharper or softer teacher.

    For a `Player` whose model are `Experts`, and whose `trainable` is their `learned`. Every
    example has a time of its own, so that all experts learn at once.

    Args:
        temperature: of the teacher alone.
        time_law: law of the training time.

    Reference: Go, Lee, Kim, Lee, Jeong, Lee, Choi, "Towards Practical Plug-and-Play Diffusion
    Models", 2022, arXiv 2212.05973. The code there has temperature 0.25, divides by the number of
    classes, and trains one expert after the other, each from the one before.
    """

    temperature: Number = number(1.0)
    time_law: TimeLaw = UniformTime()

    def __check_init__(self):
        check_number("temperature", self.temperature, above=0.0)
        check_kind("time_law", self.time_law, TimeLaw, "losses.UniformTime()")

    def __call__(
        self, experts: Experts, key: PRNGKeyArray, batch: dict, frozen: Any
    ) -> tuple[Array, dict[str, Array]]:
        """The loss of a batch.

        Args:
            experts: those that learn.
            key: typed key.
            batch: `{"x": (B, *event)}`, clean examples.
            frozen: not used.

        Returns:
            The scalar loss, and `{"agreement": how often both answer the same class}`.
        """
        del frozen
        check_kind("experts", experts, Experts, "make_experts(classifier, process, key)")

        def one(key, u, x0, cond):
            del cond
            t = self.time_law.quantile(experts.process, u)
            teacher = wide(jax.lax.stop_gradient(experts.classifier(x0))) / self.temperature
            student = wide(experts(experts.process.noise(key, x0, t), t))
            log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
            same = jnp.argmax(teacher) == jnp.argmax(student)
            return jnp.sum(jnp.exp(log_p) * (log_p - log_q)), same

        divergences, same = each_example(one, key, batch)
        return divergences.mean(), {"agreement": same.mean()}
