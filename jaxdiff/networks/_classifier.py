"""A small image classifier, whose features measure samples, and which may see noisy ones."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from jaxdiff.networks._conv import Conv
from jaxdiff.networks._layers import ConditionEmbedding, check_rate, dropout, image_shape
from jaxdiff.taps import Tap


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
            h = tap(f"conv{i}", nnx.gelu(conv(h) + shifts[i]))
            if i == 1:
                height, width, c = h.shape
                h = h.reshape(height // 2, 2, width // 2, 2, c).max((1, 3))
        h = tap("features", nnx.gelu(self.hidden(h.reshape(-1))))
        return self.last(dropout(h, self.rate, key))

    def features(self, x: Array) -> Array:
        """The feature vector of one example."""
        tap = Tap(wanted=["features"])
        self(x, tap=tap)
        return tap.values["features"]
