import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import expm, logm

from jaxdiff.geometry._global_basis import (
    _rotation_exp,
    _rotation_log,
    frechet_basis,
    matched_basis,
)

RANK, SIZE = 4, 12


def common(seed=0):
    """Orthonormal rows, with the largest entry of each positive."""
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(SIZE, SIZE)))[0][:RANK]
    largest = basis[np.arange(RANK), np.abs(basis).argmax(1)]
    return basis * np.sign(largest)[:, None]


def skew(seed, size, scale):
    matrix = np.random.default_rng(seed).normal(size=(size, size)) * scale
    return matrix - matrix.T


def turned_copies():
    """Pairs of opposite rotations within the span and of the span, with signs at random."""
    basis, copies, rng = common(), [], np.random.default_rng(3)
    full = np.linalg.qr(np.concatenate([basis, rng.normal(size=(SIZE - RANK, SIZE))]).T)[0].T
    full[:RANK] = basis
    for seed in range(3):
        within = skew(seed, RANK, 0.15)
        away = np.zeros((SIZE, SIZE))
        away[:RANK, RANK:] = rng.normal(size=(RANK, SIZE - RANK)) * 0.1
        away -= away.T
        for sign in (1, -1):
            moved = (full.T @ expm(sign * away) @ full) @ basis.T
            signs = rng.choice([-1, 1], RANK)
            copies.append(signs[:, None] * (expm(sign * within) @ moved.T))
    return basis, np.stack(copies)


def test_frechet_basis_of_turned_copies_is_the_common_basis(x64):
    basis, copies = turned_copies()
    shaped = jnp.asarray(copies).reshape(-1, RANK, 3, 4)
    found = jax.jit(lambda bases: frechet_basis(bases, tolerance=1e-12))(shaped)
    np.testing.assert_allclose(found.reshape(RANK, SIZE), basis, atol=1e-10)


def test_frechet_basis_turns_with_the_vectors(x64):
    """A rotation of all bases, within their span and as a whole, is a rotation of the result."""
    bases = jnp.asarray(turned_copies()[1])
    whole = expm(skew(9, SIZE, 0.5))
    find = jax.jit(lambda bases: frechet_basis(bases, tolerance=1e-12))
    found, expected = find(bases @ whole.T), find(bases) @ whole.T
    np.testing.assert_allclose(np.abs(found @ expected.T), np.eye(RANK), atol=1e-10)


def test_rotations_have_logarithms(x64):
    for scale in (1e-9, 0.1, 0.6):
        expected = skew(5, 5, scale)
        assert np.abs(np.linalg.eigvals(expected)).max() < np.pi
        rotation = expm(expected)
        np.testing.assert_allclose(_rotation_log(jnp.asarray(rotation)), expected, atol=1e-13)
        np.testing.assert_allclose(_rotation_exp(jnp.asarray(expected)), rotation, atol=1e-14)
    np.testing.assert_allclose(logm(rotation).real, expected, atol=1e-12)
    assert jnp.all(jnp.isfinite(_rotation_log(-jnp.eye(4))))


def test_matched_basis_finds_the_order_and_the_signs(x64):
    basis, rng = common(), np.random.default_rng(4)
    copies = []
    for _ in range(6):
        noise = expm(skew(int(rng.integers(99)), SIZE, 0.05))
        order = rng.permutation(RANK)
        copies.append(rng.choice([-1, 1], (RANK, 1)) * (basis @ noise)[order])
    copies[0] = basis
    found = jax.jit(matched_basis)(jnp.asarray(copies).reshape(6, RANK, 4, 3))
    found = np.reshape(found, (RANK, SIZE))
    np.testing.assert_allclose(found @ found.T, np.eye(RANK), atol=1e-12)
    assert np.all(np.diag(found @ basis.T) > 0.98)
    exact = [signs[:, None] * basis for signs in np.sign(rng.normal(size=(3, RANK)))]
    np.testing.assert_allclose(matched_basis(jnp.asarray(exact)), basis, atol=1e-12)


def test_float32_stays_float32(x64):
    basis, copies = turned_copies()
    bases = jnp.asarray(copies, jnp.float32)
    found, matched = jax.jit(lambda bases: (frechet_basis(bases), matched_basis(bases)))(bases)
    assert found.dtype == matched.dtype == jnp.float32
    np.testing.assert_allclose(found, basis, atol=1e-5)
    np.testing.assert_allclose(matched @ matched.T, np.eye(RANK), atol=1e-6)
