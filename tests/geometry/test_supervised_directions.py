"""Directions between labelled classes, against dense linear algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from jaxdiff.geometry._supervised_directions import (
    disentangle,
    lda_direction,
    supervised_direction,
)


def two_classes(count, shape, seed=0):
    """Correlated Gaussians with one covariance and different means, of unequal numbers."""
    size = int(np.prod(shape))
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3 == 0
    spread = rng.normal(size=(size, size)) / size**0.5 + 0.3 * np.eye(size)
    h = rng.normal(size=(count, size)) @ spread.T + labels[:, None] * rng.normal(size=size) + 5
    return jnp.asarray(h.reshape(count, *shape)), jnp.asarray(labels), spread


def cosine(a, b):
    a, b = np.ravel(a), np.ravel(b)
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_mean_difference(x64):
    h, labels, _ = two_classes(20, (2, 3))
    direction = supervised_direction(h, labels)
    expected = np.asarray(h)[labels].mean(0) - np.asarray(h)[~labels].mean(0)
    np.testing.assert_allclose(direction, expected, rtol=1e-12)
    # Labels may be numbers, and traced.
    numbers = jax.jit(supervised_direction)(h, labels.astype(jnp.int32))
    np.testing.assert_allclose(numbers, expected, rtol=1e-12)


@pytest.mark.parametrize("count, shape", [(40, (2, 3)), (8, (4, 5))], ids=["n > d", "n < d"])
@pytest.mark.parametrize("ridge", [1e-6, 0.1])
def test_lda_is_the_dense_solution(x64, count, shape, ridge):
    h, labels, _ = two_classes(count, shape)
    flat, member = np.asarray(h).reshape(count, -1), np.asarray(labels)
    centred = [flat[group] - flat[group].mean(0) for group in (member, ~member)]
    covariance = sum(part.T @ part for part in centred) / (count - 2)
    covariance += ridge * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    expected = np.linalg.solve(covariance, flat[member].mean(0) - flat[~member].mean(0))
    direction = lda_direction(h, labels, ridge=ridge)
    # The dense solution itself has lost the digits of its condition number.
    np.testing.assert_allclose(
        direction.ravel(), expected, rtol=1e-8, atol=1e-8 * abs(expected).max()
    )


def test_lda_is_scikit_learns(x64):
    h, labels, _ = two_classes(60, (5,))
    reference = LinearDiscriminantAnalysis().fit(np.asarray(h), np.asarray(labels)).coef_[0]
    assert cosine(lda_direction(h, labels, ridge=1e-12), reference) > 1 - 1e-12


def test_lda_finds_the_optimal_separator_where_the_mean_difference_does_not(x64):
    """Many examples: the normal is C^-1 of the means' difference."""
    rng = np.random.default_rng(1)
    count, size = 20_000, 4
    spread = np.diag([5.0, 1.0, 0.3, 1.0])
    difference = np.ones(size)
    labels = np.arange(count) % 2
    h = rng.normal(size=(count, size)) @ spread + labels[:, None] * difference
    optimal = difference / np.diag(spread) ** 2
    found = lda_direction(jnp.asarray(h), labels, ridge=1e-6)
    assert cosine(found, optimal) > 1 - 1e-3
    assert cosine(supervised_direction(jnp.asarray(h), labels), optimal) < 0.7


def test_disentangled_directions_are_orthogonal_to_what_is_kept(x64):
    rng = np.random.default_rng(2)
    direction, keep = rng.normal(size=(3, 4)), rng.normal(size=(3, 3, 4))
    # Of very different lengths, nearly parallel, repeated, and zero.
    keep[1] = 1e-6 * (keep[0] + 1e-3 * keep[1])
    keep = np.concatenate([keep, 1e3 * keep[:1], np.zeros((1, 3, 4))])
    left = np.asarray(disentangle(jnp.asarray(direction), jnp.asarray(keep)))
    units = keep[:4].reshape(4, -1) / np.linalg.norm(keep[:4].reshape(4, -1), axis=1)[:, None]
    assert np.abs(units @ left.ravel()).max() < 1e-12
    best = units.T @ np.linalg.lstsq(units.T, direction.ravel())[0]
    np.testing.assert_allclose(left.ravel(), direction.ravel() - best, atol=1e-11)
    again = disentangle(jnp.asarray(left), jnp.asarray(keep))
    np.testing.assert_allclose(again, left, atol=1e-13)


def test_disentangling_at_the_extremes(x64):
    keep = jax.random.normal(jax.random.key(0), (2, 5))
    inside = disentangle(2 * keep[0] - keep[1], keep)
    np.testing.assert_allclose(inside, 0.0, atol=1e-14)
    nothing = disentangle(keep[0], jnp.zeros((1, 5)))
    np.testing.assert_array_equal(nothing, keep[0])
    # Step by step for directions along a trajectory.
    steps = jax.vmap(disentangle)(keep[:, None] + jnp.eye(2, 5)[:, None], keep[:, None, None])
    np.testing.assert_allclose(jnp.sum(steps[:, 0] * keep, 1), 0.0, atol=1e-14)


def test_an_edit_by_a_disentangled_direction_leaves_the_other_attribute(x64):
    """Two correlated linear attributes of h: one moves, the other stays exactly."""
    rng = np.random.default_rng(3)
    h = jnp.asarray(rng.normal(size=(200, 6)))
    first, second = rng.normal(size=(2, 6))
    labels = (h @ first > 0), (h @ (second + first) > 0)
    moving, other = (supervised_direction(h, label) for label in labels)
    step = disentangle(moving, other[None])
    np.testing.assert_allclose(other @ (h[0] + 3 * step), other @ h[0], atol=1e-13)
    assert first @ step > 0


def test_dtype_and_bad_input(x64):
    h, labels, _ = two_classes(9, (4,))
    h = h.astype(jnp.float32)
    for function in (supervised_direction, lda_direction):
        assert function(h, labels).dtype == jnp.float32
        with pytest.raises(ValueError, match="one entry per example"):
            function(h, labels[:5])
        with pytest.raises(ValueError, match="both classes, 0 and 1"):
            function(h, jnp.ones(9))
        with pytest.raises(ValueError, match="both classes, 0 and 1"):
            function(h, jnp.arange(9) % 3)
    with pytest.raises(ValueError, match="at least 3 examples"):
        lda_direction(h[:2], labels[:2])
    assert disentangle(h[0], h[1:3]).dtype == jnp.float32
    for keep in (h[0], h[:, :3]):
        with pytest.raises(ValueError, match="`keep` must have shape"):
            disentangle(h[0], keep)
