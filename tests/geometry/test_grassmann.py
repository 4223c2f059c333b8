import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm, subspace_angles

from jaxdiff.geometry._grassmann import (
    chordal_distance,
    extrinsic_mean,
    grassmann_distance,
    grassmann_exp,
    grassmann_log,
    karcher_mean,
    pairwise_distances,
    principal_angles,
    random_distance,
)

SHAPE = (2, 3, 4)


def frame(seed, count=24):
    """Orthonormal rows of SHAPE."""
    matrix = np.random.default_rng(seed).normal(size=(24, 24))
    return np.linalg.qr(matrix)[0][:count].reshape(count, *SHAPE)


def planted(angles, seed=0):
    """Two bases whose vectors pair up in disjoint planes, at these angles."""
    vectors, angles = frame(seed), np.asarray(angles)[:, None, None, None]
    r = len(angles)
    return vectors[:r], np.cos(angles) * vectors[:r] + np.sin(angles) * vectors[r : 2 * r]


def turned(basis, seed):
    """The same span in other vectors."""
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(basis),) * 2))[0]
    return np.tensordot(rotation, basis, 1)


def test_planted_angles_are_recovered_whatever_the_vectors(x64):
    angles = [0.0, 1e-9, 1e-3, 0.5, np.pi / 2 - 1e-9, np.pi / 2]
    a, b = planted(angles)
    found = principal_angles(jnp.asarray(turned(a, 1)), jnp.asarray(turned(b, 2)))
    np.testing.assert_allclose(found, angles, rtol=0, atol=1e-14)
    np.testing.assert_allclose(
        principal_angles(jnp.asarray(a[:3]), jnp.asarray(b)), [0, 1e-9, 1e-3], atol=1e-14
    )


def test_small_angles_survive_float32():
    angles = np.asarray([1e-5, 1e-4, 1e-2, 1.0])
    a, b = (jnp.asarray(turned(basis, 3), jnp.float32) for basis in planted(angles))
    found = principal_angles(a, b)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, angles, rtol=1e-2)
    # The usual arc cosine of the cosines loses them.
    cosines = np.linalg.svd(np.reshape(a, (4, -1)) @ np.reshape(b, (4, -1)).T, compute_uv=False)
    assert np.abs(np.arccos(np.minimum(cosines, 1))[0] / 1e-5 - 1) > 0.5


def test_distances_of_many_subspaces(x64):
    bases = np.stack([turned(frame(0)[i : i + 3], i) for i in (0, 0, 1, 2)] + [frame(5, 3)])
    distances = jax.jit(pairwise_distances)(jnp.asarray(bases))
    np.testing.assert_array_equal(distances, distances.T)
    # A shift by one vector turns one direction by a right angle.
    right = np.pi / 2
    expected = [[0, 0, right, right * np.sqrt(2)], [0, 0, right, right * np.sqrt(2)]]
    np.testing.assert_allclose(distances[:2, :4], expected, atol=1e-13)
    flat = bases.reshape(5, 3, -1)
    reference = np.linalg.norm(subspace_angles(flat[3].T, flat[4].T))
    np.testing.assert_allclose(distances[3, 4], reference, rtol=1e-12)
    projectors = np.einsum("nri,nrj->nij", flat, flat)
    chordal = pairwise_distances(jnp.asarray(bases), distance=chordal_distance, batch_size=None)
    expected = np.linalg.norm(projectors[:, None] - projectors, axis=(2, 3)) / np.sqrt(2)
    np.testing.assert_allclose(chordal, expected, atol=1e-12)


def test_random_lines_have_the_angles_of_the_sphere(x64):
    """On [0, pi/2] the angle of two lines in n dimensions has a density as sin(theta)^(n - 2)."""
    theta = np.linspace(0, np.pi / 2, 20001)
    for size in (2, 3, 8):
        density = np.sin(theta) ** (size - 2)
        mean = np.average(theta, weights=density)
        deviation = np.sqrt(np.average((theta - mean) ** 2, weights=density))
        found = random_distance(jax.random.key(size), 1, size, num_subspaces=200)
        np.testing.assert_allclose(found, (mean, deviation), atol=0.02)
    # In many dimensions all angles are nearly right.
    mean, _ = random_distance(jax.random.key(0), 3, 2000)
    np.testing.assert_allclose(mean, 3**0.5 * np.pi / 2, rtol=0.03)


def test_exp_and_log_are_inverse_and_geodesics_have_their_length(x64):
    base, target = (jnp.asarray(turned(basis, 7)) for basis in planted([1e-8, 0.3, 1.2, 1.2]))
    tangent = grassmann_log(base, target)
    np.testing.assert_allclose(jnp.einsum("iabc,jabc->ij", tangent, base), 0, atol=1e-14)
    np.testing.assert_allclose(
        jnp.linalg.norm(tangent), grassmann_distance(base, target), rtol=1e-13
    )
    reached = grassmann_exp(base, tangent)
    np.testing.assert_allclose(jnp.einsum("iabc,jabc->ij", reached, reached), np.eye(4), atol=1e-14)
    np.testing.assert_allclose(grassmann_distance(reached, target), 0, atol=1e-13)
    for time in (0.25, 0.5):
        way = grassmann_distance(base, grassmann_exp(base, time * tangent))
        np.testing.assert_allclose(way, time * grassmann_distance(base, target), rtol=1e-12)
    np.testing.assert_allclose(grassmann_log(base, reached), tangent, atol=1e-13)
    # The geodesic is a rotation of the whole space, by exp of a skew-symmetric matrix.
    flat, delta = np.reshape(base, (4, -1)), np.reshape(tangent, (4, -1))
    rotation = expm(delta.T @ flat - flat.T @ delta)
    np.testing.assert_allclose(np.reshape(reached, (4, -1)), flat @ rotation.T, atol=1e-13)


def test_log_and_exp_of_nothing_are_nothing():
    base = jnp.asarray(frame(0, 3), jnp.float32)
    np.testing.assert_allclose(grassmann_log(base, base), 0, atol=1e-6)
    np.testing.assert_allclose(grassmann_exp(base, jnp.zeros_like(base)), base, atol=1e-6)


def test_karcher_mean_of_opposite_rotations_is_the_centre(x64):
    centre, angles = frame(0, 3), np.asarray([0.1, 0.4, 0.6])
    bases = np.stack([planted(sign * angles)[1] for sign in (1, -1)])
    bases = np.stack([turned(basis, i) for i, basis in enumerate(bases)])
    mean = jax.jit(karcher_mean)(jnp.asarray(bases))
    assert mean.converged and mean.iterations <= 3
    np.testing.assert_allclose(grassmann_distance(mean.basis, jnp.asarray(centre)), 0, atol=1e-12)
    np.testing.assert_allclose(mean.variance, np.sum(angles**2), rtol=1e-12)


def test_karcher_mean_is_on_the_geodesic_and_balances_the_logs(x64):
    """Two points and a weight: the point that divides the geodesic. Many: the logs cancel."""
    base, target = (jnp.asarray(basis) for basis in planted([0.2, 0.5, 0.9]))
    weights = jnp.asarray([3.0, 1.0])
    mean = karcher_mean(jnp.stack([base, target]), weights=weights, tolerance=1e-12)
    expected = grassmann_exp(base, 0.25 * grassmann_log(base, target))
    np.testing.assert_allclose(grassmann_distance(mean.basis, expected), 0, atol=1e-11)
    noise = np.random.default_rng(1).normal(size=(6, 3, *SHAPE)) * 0.1
    rows = (frame(2, 3) + noise).reshape(6, 3, -1)
    bases = jnp.asarray(np.linalg.qr(rows.transpose(0, 2, 1))[0].transpose(0, 2, 1)).reshape(
        6, 3, *SHAPE
    )
    mean = karcher_mean(bases, tolerance=1e-12)
    assert mean.converged
    logs = jax.vmap(grassmann_log, (None, 0))(mean.basis, bases)
    np.testing.assert_allclose(jnp.mean(logs, 0), 0, atol=1e-12)
    np.testing.assert_allclose(
        mean.variance, np.mean([float(grassmann_distance(mean.basis, b)) ** 2 for b in bases])
    )


def test_extrinsic_mean_is_the_top_of_the_mean_projector(x64):
    bases = np.stack([frame(i, 3) for i in range(4)])
    weights = np.asarray([1.0, 2.0, 0.0, 0.5])
    flat = bases.reshape(4, 3, -1)
    projector = np.einsum("n,nri,nrj->ij", weights, flat, flat)
    top = np.linalg.eigh(projector)[1][:, ::-1][:, :3].T
    mean = extrinsic_mean(jnp.asarray(bases), weights=jnp.asarray(weights))
    np.testing.assert_allclose(np.abs(mean.reshape(3, -1) @ top.T), np.eye(3), atol=1e-12)


@pytest.mark.usefixtures("unchecked")
def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        principal_angles(jnp.zeros((2, 3)), jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match="one shape"):
        grassmann_log(jnp.zeros((2, 3)), jnp.zeros((1, 3)))
    with pytest.raises(ValueError, match="leading axis"):
        karcher_mean(jnp.zeros((2, 3)))
