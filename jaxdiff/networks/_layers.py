"""Pieces that several networks share. All take one example."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from jaxdiff.taps import Tap

zeros = nnx.initializers.zeros_init()


def timestep_embedding(t: Array, size: int, max_period: float = 10_000.0) -> Array:
    """Sinusoidal embedding of a scalar: sines, then cosines, of t at geometric frequencies.

    The frequencies are max_period^(-i / (size/2 - 1)), i = 0 .. size/2 - 1: from 1 to
    1 / max_period. Computed in float32 or wider.

    Args:
        t: scalar noise label.
        size: even number of features, at least 4.
        max_period: longest period, in units of 2 pi.

    Returns:
        `(size,)`.

    Raises:
        ValueError: for an odd or smaller size, or a t that is no scalar.

    Reference: Vaswani et al., "Attention Is All You Need", 2017, arXiv 1706.03762, section
    3.5, as used by Ho, Jain, Abbeel, arXiv 2006.11239.
    """
    t = jnp.asarray(t)
    if size < 4 or size % 2 or t.shape != ():
        raise ValueError(
            f"`size` must be even and >= 4, and `t` a scalar; got {size} and shape {t.shape}. "
            "Use jax.vmap for a batch."
        )
    dtype = jnp.promote_types(t.dtype, jnp.float32)
    half = size // 2
    exponents = jnp.arange(half, dtype=dtype) / (half - 1)
    angles = t.astype(dtype) * max_period**-exponents
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])


def dropout(x: Array, rate: float, key: PRNGKeyArray | None) -> Array:
    """Inverted dropout; the identity without a key."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def fold(key: PRNGKeyArray | None, index: int) -> PRNGKeyArray | None:
    """`fold_in`, passing None on."""
    return None if key is None else jax.random.fold_in(key, index)


def attend(q: Array, k: Array, v: Array, num_heads: int, name: str, tap: Tap) -> Array:
    """Multi-head softmax attention over tokens, with taps on q, k, v and the weights.

    The map is an ordinary array, so that it can be read or replaced, and differentiates in
    both modes. The softmax is computed in float32 or wider.

    Args:
        q: `(n, d)`; k and v alike.
        k: see q.
        v: see q.
        num_heads: divides d.
        name: prefix of the taps `.q`, `.k`, `.v` and `.weights` (`(heads, n, n)`).
        tap: the call's tap.

    Returns:
        `(n, d)`.
    """
    size = q.shape[-1] // num_heads
    q, k, v = (
        tap(f"{name}.{part}", value).reshape(-1, num_heads, size)
        for part, value in (("q", q), ("k", k), ("v", v))
    )
    logits = jnp.einsum("qhd,khd->hqk", q, k) / size**0.5
    weights = jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    weights = tap(f"{name}.weights", weights.astype(v.dtype))
    return jnp.einsum("hqk,khd->qhd", weights, v).reshape(-1, num_heads * size)


class NoiseEmbedding(nnx.Module):
    """Time and class, embedded and added: Linear(SiLU(Linear(sinusoids))) + class row.

    The class `num_classes` is the null label of unconditional evaluation.

    Args:
        features: size of the sinusoidal embedding.
        size: size of the result.
        num_classes: number of classes, or None for an unconditional network.
        dtype: compute dtype.
        param_dtype: dtype of the weights.
        rngs: initialisation keys.
    """

    def __init__(
        self,
        features: int,
        size: int,
        num_classes: int | None,
        *,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.features = features
        self.num_classes = num_classes
        kinds = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.first = nnx.Linear(features, size, **kinds)
        self.second = nnx.Linear(size, size, **kinds)
        self.classes = None if num_classes is None else nnx.Embed(num_classes + 1, size, **kinds)

    def __call__(self, t: Array, cond: Array | None) -> Array:
        """Embedding `(size,)` of a scalar noise label and a scalar class."""
        h = self.second(nnx.silu(self.first(timestep_embedding(t, self.features))))
        if (cond is None) != (self.classes is None):
            expected = (
                "None: the network was built without num_classes"
                if self.classes is None
                else f"a scalar class in [0, {self.num_classes}), or {self.num_classes} for none"
            )
            raise ValueError(f"`cond` must be {expected}; got {cond}.")
        if cond is None:
            return h
        if jnp.shape(cond) != () or not jnp.issubdtype(jnp.result_type(cond), jnp.integer):
            raise ValueError(
                f"`cond` must be a scalar integer class for one example, got shape "
                f"{jnp.shape(cond)} and dtype {jnp.result_type(cond)}. Use jax.vmap for a batch."
            )
        return h + self.classes(jnp.asarray(cond))
