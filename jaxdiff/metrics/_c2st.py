"""The classifier two-sample test."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, Scalar

from jaxdiff._checks import check_count, check_key
from jaxdiff.metrics._pair import feature_pair


class TwoSampleTest(NamedTuple):
    """The share that was told right, and its standard error where both laws are one."""

    accuracy: Scalar
    error: Scalar


def c2st(
    key: PRNGKeyArray,
    x: Float[Array, "n *event"],
    y: Float[Array, "n *event"],
    *,
    folds: int = 5,
    width: int | None = None,
    num_steps: int = 1000,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-3,
) -> TwoSampleTest:
    """How often a classifier tells which of two samples an example is from: 1/2 for equal laws.

    The best possible share is 1/2 + TV / 2, with the total variation of the laws. The classifier, a
    perceptron of two hidden layers on features standardised by x, learns on all folds but one and
    is tested on that one, for each fold. A share near 1/2 may also mean that it is too weak.

    Args:
        key: typed key; draws the folds, weights and batches.
        x: (n, *event), n >= folds.
        y: (n, *event), as many.
        folds: how many.
        width: of the hidden layers; 10 times the dimension, 16 to 256, if None.
        num_steps: of Adam.
        batch_size: examples of a step.
        learning_rate: of Adam, falling to 0 as a cosine.
        weight_decay: of Adam.

    Returns:
        Share and standard error, scalars. The error is sqrt(1/4 / (2 n)), of independent tests;
        folds share training examples, so that it is a little too small.

    Raises:
        ValueError: for samples of different sizes or shapes, or too few.

    Reference: Lopez-Paz, Oquab, "Revisiting Classifier Two-Sample Tests", 2017, arXiv 1610.06545,
    section 3. Adam with weight decay here.
    """
    check_key(key)
    check_count("num_steps", num_steps)
    check_count("batch_size", batch_size)
    x, y = feature_pair(x, y, minimum=check_count("folds", folds, least=2))
    if len(x) != len(y):
        raise ValueError(f"`x` and `y` must be as many, got {len(x)} and {len(y)}. Leave some out.")
    scale = jnp.std(x, 0)
    inputs = (jnp.concatenate([x, y]) - jnp.mean(x, 0)) / jnp.where(scale > 0, scale, 1.0)
    labels = jnp.repeat(jnp.arange(2.0, dtype=x.dtype), len(x))
    d, n = x.shape[1], len(x)
    width = min(max(10 * d, 16), 256) if width is None else check_count("width", width)
    fold_key, train_key = jax.random.split(key)
    # Folds hold as many of x as of y; a remainder is trained on in every fold.
    size = n // folds
    orders = jax.vmap(lambda key: jax.random.permutation(key, n))(jax.random.split(fold_key))
    own = jnp.concatenate(
        [order[: size * folds].reshape(folds, size) + i * n for i, order in enumerate(orders)], 1
    )
    held_out = jnp.zeros((folds, 2 * n), bool).at[np.arange(folds)[:, None], own].set(True)
    optimizer = optax.adamw(
        optax.cosine_decay_schedule(learning_rate, num_steps), weight_decay=weight_decay
    )

    def one(key, held_out):
        init_key, step_key = jax.random.split(key)
        weights = _init(init_key, d, width, x.dtype)
        known = jnp.argsort(held_out)[: 2 * (n - size)]

        def loss(weights, rows):
            logits = _logit(weights, inputs[rows])
            return optax.sigmoid_binary_cross_entropy(logits, labels[rows]).mean()

        def step(carry, key):
            weights, state = carry
            rows = jax.random.choice(key, known, (batch_size,))
            updates, state = optimizer.update(jax.grad(loss)(weights, rows), state, weights)
            return (optax.apply_updates(weights, updates), state), None

        start = (weights, optimizer.init(weights))
        (weights, _), _ = jax.lax.scan(step, start, jax.random.split(step_key, num_steps))
        right = (_logit(weights, inputs) > 0) == (labels > 0)
        return jnp.sum(right & held_out)

    right = jax.jit(jax.vmap(one))(jax.random.split(train_key, folds), held_out)
    count = 2 * size * folds
    return TwoSampleTest(jnp.sum(right) / count, jnp.asarray(0.5 / count**0.5))


def _init(key: PRNGKeyArray, d: int, width: int, dtype) -> list[tuple[Array, Array]]:
    """He's initialisation."""
    sizes = [d, width, width, 1]
    keys = jax.random.split(key, 3)
    return [
        (jax.random.normal(k, (i, o), dtype) * (2 / i) ** 0.5, jnp.zeros(o, dtype))
        for k, i, o in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def _logit(weights: list[tuple[Array, Array]], x: Array) -> Array:
    for kernel, bias in weights[:-1]:
        x = jax.nn.relu(x @ kernel + bias)
    kernel, bias = weights[-1]
    return (x @ kernel + bias)[:, 0]
