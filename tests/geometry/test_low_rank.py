import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import oracles
from jaxdiff.geometry._grassmann import grassmann_distance
from jaxdiff.geometry._low_rank import (
    denoiser_rank,
    denoiser_rank_over_times,
    participation_ratio,
    spectral_clustering,
    subspace_affinity,
    subspace_clusters,
)
from jaxdiff.processes import VP

KEY = jax.random.key(0)
RANKS, SIZE = (2, 3, 4), 16


def mixture(ranks=RANKS):
    """Gaussians on random subspaces of these dimensions, of unit variance there."""
    rng = np.random.default_rng(0)
    factors = np.zeros((len(ranks), SIZE, max(ranks)))
    for factor, rank in zip(factors, ranks, strict=True):
        factor[:, :rank] = np.linalg.qr(rng.normal(size=(SIZE, rank)))[0]
    means = jnp.zeros((len(ranks), 4, 4))
    return oracles.low_rank_mixture(VP(), means, jnp.asarray(factors)), factors


def on_component(oracle, factors, k, rank, log_snr, seed=0):
    """A noisy example of component k, away from the origin."""
    t = oracle.process.time(jnp.asarray(log_snr))
    x0 = jnp.asarray(factors[k, :, :rank] @ np.linspace(1.5, 2.0, rank)).reshape(4, 4)
    noise = jax.random.normal(jax.random.key(seed), (4, 4))
    return oracle.process.marginal(x0, noise, t), t, x0


def dense_jacobian(oracle):
    def jacobian(x, t):
        return jax.jacfwd(lambda flat: oracle(flat.reshape(x.shape), t).ravel())(x.ravel())

    return jacobian


def test_rank_is_that_of_the_component_or_of_the_mixture(x64):
    oracle, factors = mixture()
    find = jax.jit(lambda x, t: denoiser_rank(KEY, oracle, x, t, 12))
    jacobian = jax.jit(dense_jacobian(oracle))
    for k, rank in enumerate(RANKS):
        x, t, _ = on_component(oracle, factors, k, rank, 6.0)
        found = find(x, t)
        dense = np.linalg.svd(jacobian(x, t))[1]
        np.testing.assert_allclose(found.values / found.values[0], dense[:12] / dense[0], atol=1e-8)
        assert found.rank == rank and not found.saturated
    x, t, _ = on_component(oracle, factors, 0, 2, -8.0)
    found = find(x, t)
    assert found.rank == sum(RANKS) and not found.saturated
    few = denoiser_rank(KEY, oracle, x, t, 5)
    assert few.rank == 5 and few.saturated


def test_rank_over_times_falls_as_the_component_is_known(x64):
    oracle, factors = mixture()
    x0 = on_component(oracle, factors, 1, 3, 0.0)[2]
    times = oracle.process.time(jnp.asarray([-8.0, 6.0, 8.0]))
    found = denoiser_rank_over_times(KEY, oracle, x0, times, 12)
    np.testing.assert_array_equal(found.rank, [9, 3, 3])
    assert found.values.shape == (3, 12) and not found.saturated.any()


def test_participation_ratio_agrees_with_the_dense_jacobian(x64):
    oracle, factors = mixture()
    jacobian = jax.jit(dense_jacobian(oracle))
    for log_snr in (6.0, -4.0):
        x, t, _ = on_component(oracle, factors, 2, 4, log_snr)
        dense = jacobian(x, t)
        expected = jnp.trace(dense) ** 2 / jnp.sum(dense**2)
        keys = jax.random.split(KEY, 100)
        found = jax.vmap(
            lambda key, x=x, t=t: participation_ratio(key, oracle, x, t, num_probes=40)
        )(keys)
        error = found.std() / 10
        assert error < 0.1
        np.testing.assert_allclose(found.mean(), expected, atol=4 * error + 0.05)
        if log_snr > 0:
            np.testing.assert_allclose(expected, 4, rtol=1e-6)


def test_clustering_recovers_components_and_their_subspaces(x64):
    ranks = (3, 3, 3)
    oracle, factors = mixture(ranks)
    truth = np.arange(15) % 3
    points = [on_component(oracle, factors, k, 3, 4.0, seed=i) for i, k in enumerate(truth)]
    x, t = jnp.stack([point[0] for point in points]), points[0][1]
    found = subspace_clusters(KEY, oracle, x, t, 3, 3, batch_size=5)
    labels = np.asarray(found.labels)
    names = [labels[truth == k][0] for k in range(3)]
    assert sorted(names) == [0, 1, 2]
    np.testing.assert_array_equal(labels, np.asarray(names)[truth])
    for k, name in enumerate(names):
        basis = jnp.asarray(factors[k].T).reshape(3, 4, 4)
        assert grassmann_distance(found.bases[name], basis) < 1e-3


def test_affinity_and_labels_of_planted_subspaces():
    vectors = jnp.eye(8)
    bases = jnp.stack([vectors[:2], vectors[1::-1], vectors[1:3], vectors[4:6]])
    expected = np.exp([[0, 0, -1, -2], [0, 0, -1, -2], [-1, -1, 0, -2], [-2, -2, -2, 0]])
    np.testing.assert_allclose(subspace_affinity(bases), expected, rtol=1e-6)
    groups = np.asarray([0, 1, 1, 2, 0, 2, 2, 1, 0, 0])
    noise = np.random.default_rng(0).uniform(0, 0.2, size=(10, 10))
    affinity = jnp.asarray((groups[:, None] == groups) + noise + noise.T, jnp.float32)
    labels = np.asarray(spectral_clustering(affinity, 3))
    assert len(set(zip(groups, labels, strict=True))) == 3 and len(set(labels)) == 3


def test_subspace_is_learned_from_as_many_samples_as_dimensions(x64):
    """The best low-rank denoiser of N samples, their principal subspace, at N around its rank."""
    rank, rng = 4, np.random.default_rng(1)
    factor = np.linalg.qr(rng.normal(size=(SIZE, rank)))[0]
    distances = []
    for count in (2, 3, 4, 5, 8):
        data = factor @ rng.normal(size=(rank, count))
        learned = np.linalg.svd(np.pad(data, ((0, 0), (0, 8 - count))))[0][:, :rank]
        oracle = oracles.low_rank_mixture(VP(), jnp.zeros((1, SIZE)), jnp.asarray(learned)[None])
        x = jnp.asarray(rng.normal(size=(1, SIZE)))
        found = subspace_clusters(KEY, oracle, x, jnp.asarray(0.3), rank, 1).bases[0]
        distances.append(grassmann_distance(found, jnp.asarray(factor.T)))
    assert min(distances[:2]) > 0.5 and max(distances[2:]) < 1e-6


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="clusters"):
        spectral_clustering(jnp.eye(3), 4)
    with pytest.raises(ValueError, match="num_probes"):
        participation_ratio(KEY, mixture()[0], jnp.zeros((4, 4)), 0.5, num_probes=1)
