"""Kernels against their formulas, embeddings against Gram matrices, and the energy distance."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.spatial.distance import cdist
from scipy.special import erf

from jaxdiff import metrics

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(7, 3)), RNG.normal(size=(5, 3)) + 0.3
R = cdist(X, Y)

KERNELS = {
    "polynomial": (metrics.Polynomial(2, 0.3, 0.7), (0.3 * X @ Y.T + 0.7) ** 2),
    "rbf": (metrics.RBF(1.3), np.exp(-(R**2) / (2 * 1.3**2))),
    "rational": (metrics.RationalQuadratic(1.3, 0.4), (1 + R**2 / (0.8 * 1.3**2)) ** -0.4),
    "multiquadric": (metrics.RationalQuadratic(0.9, 0.5), 1 / np.sqrt(1 + R**2 / 0.81)),
    "energy": (metrics.Energy(), -R),
    "energy(1.5)": (metrics.Energy(1.5), -(R**1.5)),
    "several": (
        metrics.multi_rbf(2.0, (0.5, 1.0)),
        (np.exp(-(R**2) / 2) + np.exp(-(R**2) / 8)) / 2,
    ),
    "weighted": (
        metrics.Mixture((metrics.Energy(), metrics.RBF(1.0)), (2.0, 0.5)),
        -2 * R + 0.5 * np.exp(-(R**2) / 2),
    ),
}


def arrays(*values):
    """In the precision of the test."""
    return [jnp.asarray(value) for value in values]


@pytest.mark.parametrize("name", KERNELS)
def test_gram_matrices_and_their_slopes(x64, name):
    kernel, expected = KERNELS[name]
    x, y = arrays(X, Y)
    assert_allclose(kernel(x, y), expected, rtol=1e-12)
    # Of all pairs of points that meet, too, the slope is finite, and 0 by symmetry.
    slope = jax.grad(lambda x: jnp.sum(kernel(x, x)))(x)
    step, way = 1e-6, RNG.normal(size=X.shape)
    up, down = (kernel(x + s * way, x + s * way).sum() for s in (step, -step))
    assert_allclose(jnp.sum(slope * way), (up - down) / (2 * step), rtol=1e-6)


def test_numbers_are_swept(x64):
    x, y = arrays(X, Y)
    sweep = jax.vmap(lambda power: metrics.Energy(power)(x, y))(jnp.array([0.5, 1.0]))
    assert_allclose(sweep, [-(R**0.5), -R], rtol=1e-12)
    sweep = jax.vmap(lambda alpha: metrics.RationalQuadratic(1.0, alpha)(x, y))(jnp.ones(2))
    assert_allclose(sweep[0], 1 / (1 + R**2 / 2), rtol=1e-12)


def test_the_energy_distance_of_gaussians(x64):
    """2 E|x - y| - E|x - x'| - E|y - y'|, each the mean of a folded normal law."""

    def folded(mean, variance):
        spread = np.sqrt(2 * variance / np.pi) * np.exp(-(mean**2) / (2 * variance))
        return spread + mean * erf(mean / np.sqrt(2 * variance))

    expected = 2 * folded(0.8, 1 + 0.25) - folded(0, 2) - folded(0, 0.5)
    x, y = RNG.normal(size=(6000, 6, 1)), 0.8 + 0.5 * RNG.normal(size=(6000, 9, 1))
    values = jax.jit(jax.vmap(lambda x, y: metrics.mmd2_unbiased(x, y, metrics.Energy())))(x, y)
    error = np.std(values) / len(values) ** 0.5
    assert abs(np.mean(values) - expected) < 4 * error < 0.1 * expected


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_polynomial_embeddings_are_those_of_all_pairs(x64, degree):
    kernel, (x, y) = metrics.Polynomial(degree, 0.4, 0.6), arrays(X, Y)
    embedding = metrics.mean_embedding(y, kernel)
    assert isinstance(embedding, metrics.MeanEmbedding)
    assert_allclose(embedding(x), kernel(x, y).mean(1), rtol=1e-12)
    assert_allclose(kernel.product(embedding.moments, embedding.moments), kernel(y, y).mean())
    # In unequal batches, and an MMD that takes the data for the law itself.
    streamed = metrics.mean_embedding([y[:1], y[1:4], y[4:]], kernel)
    found = metrics.mmd2_to_embedding(x, streamed)
    own = kernel(x, x)
    unbiased = (own.sum() - np.trace(own)) / (7 * 6)
    assert_allclose(found, unbiased - 2 * kernel(x, y).mean() + kernel(y, y).mean(), rtol=1e-9)
    biased = metrics.mmd2_to_embedding(x, streamed, biased=True)
    assert_allclose(biased, metrics.mmd2_biased(x, y, kernel), rtol=1e-9)


@pytest.mark.parametrize("name", ["energy", "rbf"])
def test_an_embedding_of_examples_is_their_law_under_any_kernel(x64, name):
    kernel, (x, y) = {"energy": metrics.Energy(), "rbf": metrics.RBF(1.3)}[name], arrays(X, Y)
    far = jnp.asarray(1e3)  # both kernels see differences alone
    embedding = metrics.sample_embedding(y + far, kernel, block_size=2)
    gram, own = kernel(x, y), kernel(x, x)
    assert isinstance(embedding, metrics.SampleEmbedding)
    assert_allclose(embedding.norm(), kernel(y + far, y + far).mean(), rtol=1e-9)
    assert_allclose(
        embedding.above(x + far) + kernel(y, y).mean(), gram.mean(1), rtol=1e-8, atol=1e-9
    )
    found = metrics.mmd2_to_embedding(x, metrics.sample_embedding(y, kernel))
    unbiased = (own.sum() - np.trace(own)) / (7 * 6)
    assert_allclose(found, unbiased - 2 * gram.mean() + kernel(y, y).mean(), rtol=1e-9)
    own_law = metrics.mmd2_to_embedding(y, metrics.sample_embedding(y, kernel), biased=True)
    assert abs(own_law) < 1e-12


def test_classes_are_what_pairs_of_their_examples_are_on_average(x64):
    """The paired statistic, over all choices of one real example of each sample's class."""
    x, y = arrays(X[:3], Y[:4])
    labels, own = jnp.asarray([0, 1, 0, 1]), jnp.asarray([1, 0, 1])
    kernel = metrics.RBF(1.3)
    embedding = metrics.class_embedding(y, labels, kernel, num_classes=2, block_size=3)
    assert isinstance(embedding, metrics.ClassEmbedding)
    members = {0: [0, 2], 1: [1, 3]}
    choices = itertools.product(*(members[int(c)] for c in own))
    values = [metrics.mmd2_unbiased(x, y[jnp.asarray(c)], kernel, paired=True) for c in choices]
    assert_allclose(metrics.mmd2_to_classes(x, own, embedding), np.mean(values), rtol=1e-9)
    # A class without examples is in nobody's way; a sample of it is no number.
    wider = metrics.class_embedding(y, labels * 2, kernel, num_classes=3)
    assert_allclose(metrics.mmd2_to_classes(x, own * 2, wider), np.mean(values), rtol=1e-9)
    assert np.isnan(metrics.mmd2_to_classes(x, own, wider))


def test_random_features_are_an_rbf_kernel_on_average(x64):
    x, y = arrays(X, Y)
    keys = jax.random.split(jax.random.key(0), 400)

    def one(key):
        kernel = metrics.RandomFeatures.draw(key, 3, 64, bandwidth=1.3)
        embedding = metrics.mean_embedding(y, kernel)
        gram = kernel(x, y)
        gap = metrics.mmd2_to_embedding(x, embedding, biased=True)
        return gram, embedding(x), gap

    grams, means, gaps = jax.jit(jax.vmap(one))(keys)
    assert_allclose(means, grams.mean(2), rtol=1e-9)
    error = np.std(grams, 0) / 20
    assert (abs(grams.mean(0) - KERNELS["rbf"][1]) < 4.5 * error).all() and error.max() < 0.01
    expected = metrics.mmd2_biased(x, y, metrics.RBF(1.3))
    assert abs(gaps.mean() - expected) < 4 * np.std(gaps) / 20 < 0.1 * expected


def test_embeddings_are_pytrees_that_batches_of_devices_average(x64):
    kernel = metrics.Polynomial(2)
    (y,) = arrays(Y[:4])
    shares = jax.vmap(lambda y: metrics.mean_embedding(y, kernel))(y.reshape(2, 2, 3))
    whole = metrics.mean_embedding(y, kernel)
    for a, b in zip(shares.moments, whole.moments, strict=True):
        assert_allclose(a.mean(0), b, rtol=1e-12)


def test_a_distance_of_nothing_is_nothing():
    """In float32 the diagonal of a Gram matrix, far from the origin."""
    x = jnp.asarray(X, jnp.float32) * 100
    own = np.asarray(metrics.Energy()(x, x), float) * (1 - np.eye(len(x)))
    norm = metrics.sample_embedding(x, metrics.Energy()).norm()
    assert_allclose(norm, own.mean(), rtol=1e-6)
    assert abs(metrics.mmd2_biased(x, x, metrics.Energy())) > -1e-6


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        *(
            (
                lambda e=embed, d=d: metrics.mmd2_to_embedding(X[:, :d], e(Y)),
                "the dimension of the emb",
            )
            for embed, d in (
                (lambda y: metrics.mean_embedding(y, metrics.Polynomial(2)), 1),
                (metrics.sample_embedding, 1),
                (lambda y: metrics.sample_embedding(y, metrics.Energy()), 2),
            )
        ),
        (lambda: metrics.Energy(2.0), "`power` must be above 0 and below 2"),
        (lambda: metrics.RationalQuadratic(alpha=0.0), "`alpha` must be above 0"),
        (lambda: metrics.Mixture(()), "at least one"),
        (lambda: metrics.Mixture((metrics.RBF(),), (1.0, 2.0)), "got 2 for 1"),
        (lambda: metrics.mean_embedding(Y, metrics.RBF()), "`kernel` must be a FiniteKernel"),
        (lambda: metrics.mean_embedding([]), "one batch at least"),
        (lambda: metrics.RandomFeatures.draw(jax.random.key(0), 0), "`dimension`"),
    ],
)
def test_errors(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
