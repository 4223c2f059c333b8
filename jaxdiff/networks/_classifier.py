"""A small image classifier, whose features measure samples, and which may see noisy ones."""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from jaxdiff._checks import check_callable, check_number
from jaxdiff._tree import Number, number
from jaxdiff.networks._conv import Conv
from jaxdiff.networks._layers import ConditionEmbedding, check_rate, dropout, image_shape
from jaxdiff.taps import Tap


class Softplus(eqx.Module):
    """softplus(beta z) / beta: a ReLU without its corner, off by log 2 / beta at most.

    Args:
        beta: > 0; a number that may be swept, and a leaf of the network that it is put into.

    Reference: Ma, Hu, Wang, Sun, "Elucidating The Design Space of Classifier-Guided Diffusion
    Generation", 2023, arXiv 2310.11311.
    """

    beta: Number = number(1.0)

    def __check_init__(self):
        check_number("beta", self.beta, above=0.0)

    def __call__(self, z: Array) -> Array:
        """See the class, of every number."""
        return (jax.nn.softplus(self.beta * z) / self.beta).astype(z.dtype)


def as_activation(activation: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """An activation as part of a network: pytrees with their leaves, functions as structure."""
    check_callable("activation", activation, "jax.nn.relu")
    plain = jax.tree_util.all_leaves([activation])
    return nnx.data(jax.tree_util.Partial(activation) if plain else activation)


N = TypeVar("N")


def softened(network: N, beta: Number) -> N:
    """The network with `Softplus(beta)` in place of its activation; weights stay as they are.

    For guidance, whose gradients a smooth classifier points more steadily. Calibration says which
    beta: see `metrics.calibration_error`.

    Args:
        network: one with an `activation`, such as `ConvClassifier`.
        beta: as of `Softplus`.

    Raises:
        TypeError: for a network without one.
    """
    if not hasattr(network, "activation"):
        raise TypeError(
            f"`network` must have an `activation`, got {type(network).__name__}. Build it with "
            "Softplus(beta), say."
        )
    leaves, structure = jax.tree.flatten(network)
    changed = jax.tree.unflatten(structure, leaves)
    changed.activation = as_activation(Softplus(beta))
    return changed


class ConvClassifier(nnx.Module):
    """Two convolutions, pooling, two more, and a hidden layer, whose output are the features.

    Taps: "conv0" to "conv3", of which the first two are before pooling; "features".

    Args:
        image_size: height and width of the example, one number or two, divisible by 2.
        in_channels: channels of the example.
        num_classes: number of classes.
        channels: width of the first two convolutions; the next have twice as many.
        features: size of the feature vector.
        dropout: dropout rate on the features.
        activation: of every number; a function, or a pytree such as `Softplus(3.0)`.
        noise_label: whether it is told of the noise in its examples: the embedding of the label is
            added to every convolution's channels.
        param_dtype: dtype of the weights.
        rngs: initialisation keys.

    Raises:
        ValueError: if `image_size` is odd.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        in_channels: int,
        num_classes: int,
        channels: int = 32,
        features: int = 64,
        dropout: float = 0.3,
        activation: Callable[[Array], Array] = nnx.gelu,
        noise_label: bool = False,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.shape = image_shape(image_size, in_channels)
        height, width, _ = self.shape
        if height % 2 or width % 2:
            raise ValueError(f"`image_size` must be divisible by 2, got {image_size}.")
        check_rate(dropout)
        kinds = {"param_dtype": param_dtype, "rngs": rngs}
        self.rate, self.num_classes = dropout, num_classes
        self.activation = as_activation(activation)
        widths = [in_channels, channels, channels, 2 * channels, 2 * channels]
        self.convs = nnx.List(
            Conv(a, b, (3, 3), **kinds) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        size = (height // 2) * (width // 2) * widths[-1]
        self.hidden = nnx.Linear(size, features, **kinds)
        self.last = nnx.Linear(features, num_classes, **kinds)
        size = 2 * channels
        self.embedding: Any = ConditionEmbedding(size, size, **kinds) if noise_label else None
        self.shifts = nnx.List(
            nnx.Linear(size, width, **kinds) for width in (widths[1:] if noise_label else ())
        )

    def __call__(
        self,
        x: Array,
        t: Array | None = None,
        *,
        key: PRNGKeyArray | None = None,
        tap: Tap | None = None,
    ) -> Array:
        """Logits `(num_classes,)` of one example `(H, W, C)`; no key, no dropout.

        Raises:
            ValueError: if x has another shape, or for a noise label t that is missing, or that a
                network made without one is given.
        """
        if x.shape != self.shape:
            raise ValueError(
                f"`x` must be one example of shape {self.shape}, got {x.shape}. "
                "Use jax.vmap for a batch."
            )
        if (t is None) != (self.embedding is None):
            wanted = "left out" if t is not None else "the noise label of the example"
            raise ValueError(
                f"`t` must be {wanted} for a classifier made with noise_label="
                f"{self.embedding is not None}, got {t}."
            )
        tap = Tap() if tap is None else tap
        shifts: list[Any] = [0.0] * len(self.convs)
        if t is not None:
            emb = nnx.silu(self.embedding(t, None)[0]).astype(x.dtype)
            shifts = [shift(emb) for shift in self.shifts]
        h = x
        for i, conv in enumerate(self.convs):
            h = tap(f"conv{i}", self.activation(conv(h) + shifts[i]))
            if i == 1:
                height, width, c = h.shape
                h = h.reshape(height // 2, 2, width // 2, 2, c).max((1, 3))
        h = tap("features", self.activation(self.hidden(h.reshape(-1))))
        return self.last(dropout(h, self.rate, key))

    def features(self, x: Array) -> Array:
        """The feature vector of one example."""
        tap = Tap(wanted=["features"])
        self(x, tap=tap)
        return tap.values["features"]
