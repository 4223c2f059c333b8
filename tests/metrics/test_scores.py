"""Vendi score, classifier score, two-sample test, streamed moments and errors: closed forms."""

import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose
from scipy.stats import norm

from jaxdiff import data, metrics, networks, parallel

RNG = np.random.default_rng(0)
vendi_score = jax.jit(metrics.vendi_score, static_argnames="order")
classifier_score = jax.jit(metrics.classifier_score)


def with_similarity(n, c):
    """Unit vectors whose products are all c."""
    return np.linalg.cholesky((1 - c) * np.eye(n) + c * np.ones((n, n)))


@pytest.mark.parametrize("order", [0.5, 1.0, 2.0, 3.0, np.inf])
def test_vendi_of_known_spectra(x64, order):
    """(1 + (n - 1) c) / n once and (1 - c) / n otherwise."""
    n, c = 50, 0.3
    spectrum = np.r_[(1 + (n - 1) * c) / n, np.full(n - 1, (1 - c) / n)]
    if order == 1:
        expected = np.exp(-(spectrum * np.log(spectrum)).sum())
        assert_allclose(expected, 26.898, atol=1e-3)
    elif np.isinf(order):
        expected = 1 / spectrum.max()
    else:
        expected = (spectrum**order).sum() ** (1 / (1 - order))
    scaled = with_similarity(n, c) * RNG.uniform(0.5, 2, (n, 1))  # the cosine knows no length
    assert_allclose(vendi_score(scaled, order=order), expected, rtol=1e-9)
    assert_allclose(vendi_score(np.eye(8), order=order), 8, rtol=1e-9)
    assert_allclose(vendi_score(np.ones((8, 3)), order=order), 1, rtol=1e-9)


def test_vendi_of_orders_next_to_one():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(60, 5)), jnp.float32)
    found = [float(metrics.vendi_score(x, order=1 + e)) for e in (0, 1e-7, 1e-5, -1e-4)]
    assert_allclose(found, found[0], rtol=2e-4)


def test_vendi_of_other_kernels(x64):
    x = np.array([[0.0], [1.0]])
    c = np.exp(-0.5)
    halves = np.array([1 + c, 1 - c]) / 2
    expected = np.exp(-(halves * np.log(halves)).sum())
    assert_allclose(vendi_score(x, metrics.RBF(1.0)), expected, rtol=1e-12)
    slope = jax.grad(lambda x: metrics.vendi_score(x, metrics.RBF(1.0), order=2))(jnp.asarray(x))
    assert slope[1, 0] > 0  # apart is more different


def test_classifier_score_of_known_tables(x64):
    sure = 1e3 * np.eye(4)
    assert_allclose(classifier_score(sure), 4, rtol=1e-9)
    assert_allclose(classifier_score(np.zeros((5, 4))), 1, rtol=1e-12)
    p = RNG.dirichlet(np.ones(3), 20)
    expected = np.exp((p * np.log(p / p.mean(0))).sum(1).mean())
    assert_allclose(classifier_score(np.log(p) + 7), expected, rtol=1e-10)


def test_a_classifier_tells_laws_apart_as_far_as_they_can_be_told():
    """1/2 + TV / 2 = Phi(|shift| / 2) for two normal laws; 1/2 for one."""
    x, y = jnp.asarray(RNG.normal(size=(2, 2000, 2)), jnp.float32)
    shift = jnp.asarray([0.6, 0.8])
    found = metrics.c2st(jax.random.key(0), x, y + shift, num_steps=300)
    assert abs(found.accuracy - norm.cdf(0.5)) < 4 * found.error + 0.01
    same = metrics.c2st(jax.random.key(1), x, y, num_steps=300)
    assert abs(same.accuracy - 0.5) < 4 * same.error
    assert_allclose(same.error, 0.5 / 4000**0.5)


def test_moments_of_batches_are_those_of_all(x64):
    x, y = RNG.normal(size=(60, 5)) @ RNG.normal(size=(5, 5)) + 100, RNG.normal(size=(80, 5)) + 100
    found = []
    for sample, cuts in ((x, (1, 20, 33)), (y, (40,))):
        total = None
        for batch in np.split(sample, cuts):
            moments = metrics.Moments.of(jnp.asarray(batch))
            total = moments if total is None else total.merge(moments)
        assert_allclose(total.mean, sample.mean(0), rtol=1e-12)
        assert_allclose(total.covariance, np.cov(sample.T), rtol=1e-10)
        found += [total.mean, total.covariance]
    assert_allclose(
        metrics.frechet_distance_gaussian(*found),
        metrics.frechet_distance(*map(jnp.asarray, (x, y))),
        rtol=1e-8,
    )


def test_moments_far_from_the_origin_keep_their_digits():
    x = (RNG.normal(size=(400, 3)) + 1000).astype(np.float32)
    parts = [metrics.Moments.of(jnp.asarray(part)) for part in np.split(x, 4)]
    total = parts[0].merge(parts[1]).merge(parts[2].merge(parts[3]))
    assert_allclose(total.covariance, np.cov(x.astype(float).T), atol=2e-5)


def test_bootstrap_errors_of_a_mean_and_a_distance(x64):
    x, y = jnp.asarray(RNG.normal(size=(400, 2))), jnp.asarray(RNG.normal(size=(300, 2)) + 1)

    def statistic(x, y):
        return {"mean": x.mean(0), "gap": x.mean() - y.mean()}

    found = metrics.bootstrap_error(jax.random.key(0), statistic, x, y, count=2000, batch_size=100)
    assert_allclose(found["mean"], x.std(0) / 20, rtol=0.07)
    gap = np.sqrt(np.var(x.mean(1)) / 400 + np.var(y.mean(1)) / 300)
    assert_allclose(found["gap"], gap, rtol=0.07)


def test_differences_of_pairs_have_the_error_of_what_is_not_shared(x64):
    """Two methods on one noise: what both have in common is not in the spread of the difference."""
    rng = np.random.default_rng(1)
    shared, y = rng.normal(size=400), jnp.asarray(rng.normal(size=(200, 1)))
    a, b = (jnp.asarray(shared + 0.1 * rng.normal(size=400))[:, None] for _ in range(2))

    def values(x):
        return metrics.bootstrap(
            jax.random.key(3), lambda x, y: x.mean() - y.mean(), x, y, count=2000, batch_size=100
        )

    assert values(a).shape == (2000,)
    paired = jnp.std(values(a) - values(b), ddof=1)
    assert_allclose(paired, jnp.std(a - b) / 20, rtol=0.07)
    assert paired < 0.25 * jnp.std(values(a), ddof=1)


def test_half_precision_is_computed_in_single():
    drawn = np.random.default_rng(1).normal(size=(2, 700, 3))
    halves = [jnp.asarray(z, jnp.bfloat16) for z in drawn]
    wide = [z.astype(jnp.float32) for z in halves]
    assert metrics.Moments.of(halves[0]).count == 700
    for metric in (
        metrics.mmd2_variance,
        metrics.frechet_distance,
        lambda x, y: metrics.permutation_test(jax.random.key(0), x, y, num_permutations=50)[1],
        lambda x, y: metrics.conditional_mmd2(x, LABELS, y, LABELS, num_classes=1)[0],
    ):
        assert_allclose(metric(*halves), metric(*wide), rtol=1e-6)


LABELS = jnp.zeros(700, int)


def test_the_limit_of_frechet_distances_has_no_bias(x64):
    """Of one law: d / n + d (d + 1) / (4 n), which the line takes away."""
    d, n, draws = 8, 1000, 16
    y = jnp.asarray(RNG.normal(size=(50_000, d)))
    found = [
        metrics.frechet_limit(
            jax.random.key(i), jnp.asarray(RNG.normal(size=(n, d))), y, num_counts=4
        )
        for i in range(draws)
    ]
    limits = np.array([f.distance for f in found])
    for place, count in ((0, 250), (-1, n)):
        assert all(f.counts[place] == count for f in found)
        values = np.array([f.distances[place] for f in found])
        bias = d / count + d * (d + 1) / (4 * count)
        assert abs(values.mean() - bias) < 4 * values.std() / draws**0.5 < 0.5 * bias
    assert abs(limits.mean()) < 4 * limits.std() / draws**0.5 < 0.5 * bias


@pytest.mark.usefixtures("unchecked")
def test_errors():
    x = jnp.ones((9, 2))
    with pytest.raises(ValueError, match="`x` and `y` must be as many, got 9 and 8"):
        metrics.c2st(jax.random.key(0), x, x[:8])
    with pytest.raises(ValueError, match="`folds` must be at least 2"):
        metrics.c2st(jax.random.key(0), x, x, folds=1)
    with pytest.raises(ValueError, match="`order` must be at least 0"):
        metrics.vendi_score(x, order=-1.0)
    with pytest.raises(ValueError, match="`least` must be above 0 and below 1, got 2"):
        metrics.frechet_limit(jax.random.key(0), x, x, least=2.0)
    with pytest.raises(ValueError, match="`num_steps` must be at least 1"):
        metrics.c2st(jax.random.key(0), x, x, num_steps=0)
    with pytest.raises(ValueError, match="`kernel` must be positive for every example"):
        metrics.vendi_score(x.at[3].set(0.0))
    with pytest.raises(ValueError, match="`logits` must be finite"):
        metrics.classifier_score(x * jnp.nan)


def scaled(weights, x):
    return jnp.concatenate([weights["w"] @ x, x[:1]])


@pytest.mark.parametrize("spread", [False, True])
def test_features_of_many_are_streamed_over_devices_and_kept(tmp_path, spread, monkeypatch):
    mesh = parallel.make_mesh(data=4, fsdp=2) if spread else None
    x = RNG.normal(size=(53, 3)).astype(np.float32)
    weights = {"w": RNG.normal(size=(2, 3)).astype(np.float32)}
    features = jax.tree_util.Partial(scaled, weights)
    expected = np.concatenate([x @ weights["w"].T, x[:, :1]], 1)
    options = {"batch_size": 10, "mesh": mesh, "cache": tmp_path}
    assert_allclose(metrics.features_of(features, x, **options), expected, rtol=1e-5, atol=1e-6)
    source = data.array_source(x)
    # Found again by contents, of an array or a source, in any batches; and not computed.
    monkeypatch.setattr(metrics._features, "_mapped", None)
    for examples, size in ((x, 10), (source, 10), (x, 7)):
        found = metrics.features_of(features, examples, **{**options, "batch_size": size})
        assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    others = {"w": weights["w"] + 1}
    for function, examples in (
        (jax.tree_util.Partial(scaled, others), x),
        (jax.tree_util.Partial(flat, weights), x.reshape(53, 3)),
        (features, x[:52]),
        (jax.tree_util.Partial(flat, weights), x[:52].reshape(26, 6)),
    ):
        metrics.features_of(function, examples, **options)
    assert len(list(tmp_path.iterdir())) == 5
    alike = metrics.features_of(
        jax.tree_util.Partial(flat, weights), x[:52].reshape(13, 12), **options
    )
    assert alike.shape == (13, 12)
    with pytest.raises(ValueError, match="`examples` must hold one at least"):
        metrics.features_of(features, x[:0])
    with pytest.raises(ValueError, match="`features` must return a vector"):
        metrics.features_of(lambda x: x[0], x)
    with pytest.raises(TypeError, match="`examples` must be floats, got uint8"):
        metrics.features_of(features, np.zeros((4, 3), np.uint8))
    # What a function hides would be taken for what was kept.
    weight = weights["w"][0]
    for hidden in (
        lambda x: x * weight,
        classifier().features,
        functools.partial(scaled, weights),
        jax.jit(lambda x: x * weight),
        jax.tree_util.Partial(jax.jit(lambda x: x * weight)),
        jax.tree_util.Partial(lambda weights, x: scaled(weights, x), weights),
        with_default,
        Hidden(lambda x: x * weight),
        jax.tree_util.Partial(inside, Hidden(lambda x: x * weight)),
    ):
        with pytest.raises(TypeError, match="`features` must show what it depends on"):
            metrics.features_of(hidden, x, cache=tmp_path)


def flat(weights, x):
    return x.reshape(-1)


def with_default(x, weight=2.0):
    return weight * x


def inside(module, x):
    return module(x)


class Hidden(eqx.Module):
    """A function where it is no leaf."""

    function: Callable = eqx.field(static=True)

    def __call__(self, x):
        """Its value."""
        return self.function(x)


def classifier():
    return networks.ConvClassifier(image_size=2, in_channels=1, num_classes=2, rngs=nnx.Rngs(0))
