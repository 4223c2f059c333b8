"""Precision, recall, density, coverage and copies: by hand, by their laws, and known values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.spatial.distance import cdist

from jaxdiff import metrics

RNG = np.random.default_rng(0)
precision_recall = jax.jit(metrics.precision_recall, static_argnames=("k", "block_size"))
density_coverage = jax.jit(metrics.density_coverage, static_argnames=("k", "block_size"))


def radii(x, k):
    return np.sort(cdist(x, x), 1)[:, k]  # its own distance of 0 comes first


@pytest.mark.parametrize("k", [1, 3])
def test_by_their_definitions(x64, k):
    y, x = RNG.normal(size=(30, 3)), RNG.normal(size=(25, 3)) + 0.7
    between = cdist(y, x)
    precision = (between <= radii(x, k)).any(1).mean()
    recall = (between <= radii(y, k)[:, None]).any(0).mean()
    inside = between < radii(x, k)
    for block_size in (None, 7):
        found = precision_recall(y, x, k=k, block_size=block_size)
        assert_allclose(found, (precision, recall), rtol=1e-12)
        found = density_coverage(y, x, k=k, block_size=block_size)
        assert_allclose(found, (inside.sum() / (k * 30), inside.any(0).mean()), rtol=1e-12)
    assert 0 < precision < 1 and 0 < recall < 1


def test_equal_laws_have_density_one_and_the_stated_coverage(x64):
    """E density = 1, E coverage = 1 - prod (n - j) / (2 n - j), in two dimensions and in eight."""
    for d in (2, 8):
        x, y = RNG.normal(size=(2, 300, 40, d))
        found = jax.jit(jax.vmap(lambda y, x: metrics.density_coverage(y, x, k=3)))(y, x)
        expected = 1 - np.prod([(40 - j) / (80 - j) for j in (1, 2, 3)])
        for values, truth in zip(found, (1.0, expected), strict=True):
            assert abs(values.mean() - truth) < 4 * values.std() / 300**0.5


def test_a_lost_mode_is_seen_by_recall_and_coverage_alone(x64):
    x = RNG.normal(size=(1000, 2))
    near = 0.05 * RNG.normal(size=(1000, 2))
    assert precision_recall(near, x).precision > 0.99 and precision_recall(near, x).recall < 0.05
    assert density_coverage(near, x).density > 0.5 and density_coverage(near, x).coverage < 0.08
    # Values of one law, of a thousand examples each, as the field has them.
    y = RNG.normal(size=(1000, 2))
    assert_allclose(precision_recall(y, x, k=5), (0.997, 0.996), atol=0.006)
    assert_allclose(precision_recall(*RNG.normal(size=(2, 1000, 32))), (0.69, 0.69), atol=0.06)


def test_chance_alone_looks_like_copies_in_few_dimensions(x64):
    """(d1 / d2)^d is uniform: ratio^d of the samples; and true copies are all found."""
    for d in (1, 2):
        y, x = jnp.asarray(RNG.normal(size=(2, 4000, d)))
        share = float(metrics.copied_share(y, x, block_size=500))
        chance = (1 / 3) ** d
        assert abs(share - chance) < 4 * np.sqrt(chance * (1 - chance) / 4000) + 0.01
    x = jnp.asarray(RNG.normal(size=(50, 6)))
    assert metrics.copied_share(x + 1e-4 * RNG.normal(size=x.shape), x) == 1.0
    assert metrics.copied_share(x[:20], x[:20] + 0.0, ratio=0.5) == 1.0


def test_clusters_that_are_far_apart_keep_their_neighbours():
    """In float32, of a spread of 0.1 at +-1000, what float64 says."""
    rng = np.random.default_rng(1)
    side = np.sign(rng.normal(size=(2, 60, 1)))
    x, y = 1000 * side + np.float32(0.1) * rng.normal(size=(2, 60, 4)).astype(np.float32)
    x, y = (z.astype(np.float32) for z in (x, y))
    apart = ((y[:, None].astype(float) - x.astype(float)) ** 2).sum(-1)
    own = ((x[:, None].astype(float) - x.astype(float)) ** 2).sum(-1)
    radii = np.sort(own + np.diag(np.full(60, np.inf)), 1)[:, 4]
    found = metrics.density_coverage(jnp.asarray(y), jnp.asarray(x))
    assert_allclose(found.density, (apart < radii).sum(1).mean() / 5, rtol=1e-6)
    assert_allclose(found.coverage, (apart.min(0) < radii).mean(), rtol=1e-6)
    assert (
        metrics.density_coverage(jnp.asarray(y[:3]), jnp.asarray(x)).density > 0
    )  # of fewer samples than neighbours


@pytest.mark.usefixtures("unchecked")
def test_errors():
    x = jnp.ones((4, 2))
    with pytest.raises(ValueError, match="`reference` must hold at least 6 samples"):
        metrics.density_coverage(jnp.ones((9, 2)), x)
    with pytest.raises(ValueError, match="`training` must hold at least 2"):
        metrics.copied_share(x, x[:1])
    with pytest.raises(ValueError, match="`ratio` must be above 0 and below 1"):
        metrics.copied_share(x, x, ratio=1.0)
    with pytest.raises(ValueError, match="events of one shape"):
        metrics.copied_share(x, x[:, :1])
