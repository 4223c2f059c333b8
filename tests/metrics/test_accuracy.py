import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxdiff.metrics import accuracy


def test_counts_the_right_ones():
    logits = jnp.array([[2.0, 1, 0], [0, 3, 1], [0, 1, 2], [5, 4, 3]])
    value, error = accuracy(logits, jnp.array([0, 1, 0, 0]))
    assert value == 0.75
    assert_allclose(error, 0.21650635, rtol=1e-6)  # sqrt(3) / 8
    assert value.dtype == error.dtype == jnp.float32


def test_the_error_is_the_spread_of_the_estimate():
    # 2,000 evaluations of 50 examples that are right with probability 0.8.
    right = np.random.default_rng(0).random((2000, 50)) < 0.8
    logits = jnp.asarray(np.stack([right, ~right], -1), jnp.float32)
    labels = jnp.zeros((2000, 50), jnp.int32)
    values, errors = jax.vmap(accuracy)(logits, labels)
    assert_allclose(jnp.sqrt(jnp.mean(errors**2)), jnp.std(values), rtol=0.06)
    assert_allclose(jnp.mean(values), 0.8, atol=4 * 0.4 / 100_000**0.5)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (jnp.zeros((4, 3)), jnp.zeros(5, int), r"\(4, 3\) and \(5,\)"),
        (jnp.zeros((4, 3)), jnp.zeros((4, 1), int), r"\(4, 3\) and \(4, 1\)"),
        (jnp.zeros(4), jnp.zeros(4, int), r"\(4,\) and \(4,\)"),
        (jnp.zeros((0, 3)), jnp.zeros(0, int), r"n > 0"),
        (jnp.zeros((4, 3)), jnp.zeros(4), r"must be integers, got dtype float32"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_errors(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        accuracy(logits, labels)
