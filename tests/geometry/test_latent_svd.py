"""Singular values of latents: exchanges of parts, and what pure noise looks like."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.geometry._latent_svd import (
    channel_singular_values,
    channel_svd,
    noise_edges,
    svd_swap,
)


def latents(shape=(6, 4, 3)):
    return jax.random.normal(jax.random.key(0), (2, *shape))


@pytest.mark.parametrize("shape", [(6, 4, 3), (4, 6, 1), (5, 5, 2)])
def test_decomposition_is_numpys(x64, shape):
    x = latents(shape)[0]
    parts = channel_svd(x)
    np.testing.assert_allclose(parts.compose(), x, atol=1e-13)
    for c in range(shape[2]):
        values = np.linalg.svd(np.asarray(x[..., c]), compute_uv=False)
        np.testing.assert_allclose(parts.values[c], values, rtol=1e-12)
        overlap = parts.left[c].T @ parts.left[c]
        np.testing.assert_allclose(overlap, np.eye(len(values)), atol=1e-13)
    trajectory = jnp.stack([x, 2 * x, -x])
    values = channel_singular_values(trajectory)
    np.testing.assert_allclose(values[1], 2 * parts.values, rtol=1e-12)
    np.testing.assert_allclose(values[2], parts.values, rtol=1e-12)


@pytest.mark.parametrize("parts", ["U", "S", "V", "US", "SV", "USV"])
@pytest.mark.parametrize("k", [None, 2])
def test_exchange_with_itself_changes_nothing(x64, parts, k):
    x = latents()[0]
    np.testing.assert_allclose(svd_swap(x, x, parts, k), x, atol=1e-13)


def test_exchanged_parts_are_those_of_the_other(x64):
    x, y = latents()
    np.testing.assert_allclose(svd_swap(x, y, "USV"), y, atol=1e-13)
    leading = svd_swap(x, y, "S", 2)
    values = channel_singular_values(leading)
    mine, other = channel_singular_values(x), channel_singular_values(y)
    mixed = np.sort(np.concatenate([other[:, :2], mine[:, 2:]], 1))[:, ::-1]
    np.testing.assert_allclose(values, mixed, rtol=1e-12)
    # All three parts of the top k: the truncation of y, and the remainder of x.
    change = svd_swap(x, y, "USV", 1) - x
    for c in range(3):
        (ux, sx, vx), (uy, sy, vy) = (np.linalg.svd(np.asarray(z[..., c])) for z in (x, y))
        top = sy[0] * np.outer(uy[:, 0], vy[0]) - sx[0] * np.outer(ux[:, 0], vx[0])
        np.testing.assert_allclose(change[..., c], top, atol=1e-13)


def test_rank_one_exchange_and_its_sign(x64):
    """u_x s_x v_x^T and a pair of y that agrees with it, or of which both vectors are turned."""
    a, b = jnp.asarray([0.6, 0.8, 0.0]), jnp.asarray([0.8, 0.0, 0.6])
    c, d = jnp.asarray([1.0, 0.0]), jnp.asarray([0.8, 0.6])
    x, y = 3 * jnp.outer(a, c)[..., None], 5 * jnp.outer(b, d)[..., None]
    np.testing.assert_allclose(svd_swap(x, y, "U", 1)[..., 0], 3 * jnp.outer(b, c), atol=1e-13)
    np.testing.assert_allclose(svd_swap(x, y, "V", 1)[..., 0], 3 * jnp.outer(a, d), atol=1e-13)
    np.testing.assert_allclose(svd_swap(x, y, "S", 1)[..., 0], 5 * jnp.outer(a, c), atol=1e-13)
    # -x has the other signs in one factor; the exchange keeps to x's own sign.
    np.testing.assert_allclose(svd_swap(-x, y, "S", 1), -svd_swap(x, y, "S", 1), atol=1e-13)


def test_noise_fills_the_space_between_the_edges_and_signal_stands_out():
    height, width, std = 256, 64, 0.7
    noise = std * jax.random.normal(jax.random.key(1), (height, width, 4))
    low, high = noise_edges(height, width, std)
    values = channel_singular_values(noise)
    # Fluctuations at the edges are of the relative order n^(-2/3).
    assert abs(values.max() / high - 1) < 0.03 and abs(values.min() / low - 1) < 0.06
    # A planted direction of strength theta > (H W)^(1/4) shows up at a known place.
    theta = 30.0
    u, v = jnp.ones(height) / height**0.5, jnp.ones(width) / width**0.5
    planted = noise + std * theta * jnp.outer(u, v)[..., None]
    top = std * np.sqrt((height + theta**2) * (width + theta**2)) / theta
    largest = channel_singular_values(planted)[:, 0]
    np.testing.assert_allclose(largest, top, rtol=0.05)
    assert largest.min() > high


def test_dtype_and_bad_input(x64):
    x = latents().astype(jnp.float32)
    assert svd_swap(x[0], x[1], "UV", 2).dtype == jnp.float32
    assert noise_edges(4, 9, jnp.float32(1))[0].dtype == jnp.float32
    for parts in ("", "UX", "u"):
        with pytest.raises(ValueError, match="letters U, S and V"):
            svd_swap(x[0], x[1], parts)
    for k in (0, 5):
        with pytest.raises(ValueError, match="between 1 and min"):
            svd_swap(x[0], x[1], "U", k)
    with pytest.raises(ValueError, match="shape of `x`"):
        svd_swap(x[0], x[1, :5], "U")
    with pytest.raises(ValueError, match=r"one latent \(H, W, C\)"):
        channel_svd(x)
