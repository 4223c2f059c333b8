"""Principal components in batches, against the decomposition of all data at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.geometry._streaming_pca import StreamingPCA


def population(count=30, shape=(2, 3), seed=0):
    """Correlated, and far from zero."""
    size = int(np.prod(shape))
    rng = np.random.default_rng(seed)
    scales = 2.0 ** -np.arange(size)
    axes = np.linalg.qr(rng.normal(size=(size, size)))[0]
    return jnp.asarray((100 + (rng.normal(size=(count, size)) * scales) @ axes).reshape(-1, *shape))


def dense(data):
    flat = np.asarray(data).reshape(len(data), -1)
    _, values, axes = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    largest = np.abs(axes).argmax(1)[:, None]
    axes = axes * np.sign(np.take_along_axis(axes, largest, 1))
    return flat.mean(0), axes, values / (len(data) - 1) ** 0.5, values**2 / np.sum(values**2)


def fit(data, rank, chunks):
    pca = StreamingPCA.init(data.shape[1:], rank, data.dtype)
    for chunk in np.split(np.arange(len(data)), np.cumsum(chunks)[:-1]):
        pca = pca.update(data[chunk])
    return pca


@pytest.mark.parametrize("chunks", [[30], [10, 10, 10], [1, 2, 3, 24], [1] * 30])
def test_all_components_are_exact_whatever_the_batches(x64, chunks):
    data = population()
    found = fit(data, 6, chunks).finish()
    mean, axes, std, explained = dense(data)
    np.testing.assert_allclose(found.mean.ravel(), mean, rtol=1e-14)
    np.testing.assert_allclose(found.directions.reshape(6, -1), axes, atol=1e-10)
    np.testing.assert_allclose(found.std, std, rtol=1e-10)
    np.testing.assert_allclose(found.explained, explained, rtol=1e-9)


def test_fewer_examples_than_numbers(x64):
    data = population(8, (5, 4))
    found = fit(data, 7, [3, 5]).finish(5)
    _, axes, std, explained = dense(data)
    np.testing.assert_allclose(found.directions.reshape(5, -1), axes[:5], atol=1e-9)
    np.testing.assert_allclose(found.std, std[:5], rtol=1e-10)
    np.testing.assert_allclose(found.explained, explained[:5], rtol=1e-9)


def test_truncation_costs_little_and_keeps_mean_and_total(x64):
    """What is dropped is below the kept; the shares are still of the whole variance."""
    data = population(60, (12,))
    pca = fit(data, 4, [6] * 10)
    found, (mean, axes, std, explained) = pca.finish(2), dense(data)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-14)
    centred = np.asarray(data) - mean
    np.testing.assert_allclose(pca.total, np.sum(centred**2), rtol=1e-12)
    np.testing.assert_allclose(found.std, std[:2], rtol=1e-3)
    np.testing.assert_allclose(found.explained, explained[:2], rtol=2e-3)
    assert np.linalg.norm(found.directions @ axes[2:].T) < 0.02
    overlap = found.directions @ found.directions.T
    np.testing.assert_allclose(overlap, np.eye(2), atol=1e-13)
    # Truncation loses variance, and never makes it up.
    assert np.all(found.std <= std[:2] * (1 + 1e-12))


def test_components_of_a_known_gaussian():
    """Float32, many batches, by a scan: within the sampling error."""
    std = jnp.asarray([3.0, 1.5, 0.5, 0.2])
    data = 10 + std * jax.random.normal(jax.random.key(0), (200, 50, 4))

    @jax.jit
    def scan(data):
        empty = StreamingPCA.init((4,), 3, jnp.float32)
        return jax.lax.scan(lambda pca, batch: (pca.update(batch), None), empty, data)[0].finish()

    found = scan(data)
    np.testing.assert_allclose(found.std, std[:3], rtol=0.03)
    np.testing.assert_allclose(found.directions, np.eye(3, 4), atol=0.02)
    np.testing.assert_allclose(found.explained, (std**2 / np.sum(std**2))[:3], rtol=0.05)
    assert int(fit(data[0], 2, [50]).count) == 50


def test_mapped_over_steps_it_is_the_same_of_each(x64):
    data = jnp.stack([population(12, (4,), seed) for seed in range(3)], axis=1)
    empty = StreamingPCA.init((4,), 4)
    empty = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), empty)
    both = jax.vmap(lambda pca, batch: pca.update(batch[:5]).update(batch[5:]), (0, 1))
    found = jax.vmap(StreamingPCA.finish)(both(empty, data))
    for step in range(3):
        alone = fit(data[:, step], 4, [5, 7]).finish()
        np.testing.assert_allclose(found.directions[step], alone.directions, atol=1e-10)
        np.testing.assert_allclose(found.std[step], alone.std, rtol=1e-10)


def test_constant_data_and_dtypes(x64):
    data = jnp.full((4, 3), 7.0, jnp.float32)
    found = fit(data, 2, [2, 2]).finish()
    np.testing.assert_array_equal(found.std, 0.0)
    np.testing.assert_array_equal(found.explained, 0.0)
    leaves = jax.tree.leaves(found)
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)
    # Activations of lower precision are accumulated in that of the state.
    half = StreamingPCA.init((3,), 2, jnp.float32).update(data.astype(jnp.bfloat16))
    assert half.mean.dtype == half.values.dtype == jnp.float32


def test_bad_input():
    for rank in (0, 7):
        with pytest.raises(ValueError, match="size of an example, 6"):
            StreamingPCA.init((2, 3), rank)
    pca = StreamingPCA.init((2, 3), 2)
    for shape in ((4, 3, 2), (2, 3)):
        with pytest.raises(ValueError, match="`batch` must have shape"):
            pca.update(jnp.ones(shape))
    with pytest.raises(ValueError, match="the 2 kept"):
        pca.finish(3)
