"""Edits, transport and shooting in the pullback metric."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import with_random_weights
from flax import nnx

from jaxdiff import NetworkDenoiser, denoise, guidance, invert, networks, predictions, processes
from jaxdiff.denoiser import edit_taps
from jaxdiff.geometry import (
    Offset,
    Spectrum,
    SubspaceIteration,
    TapFeature,
    TapResponse,
    compare_transport,
    geodesic_shooting,
    jacobian_svd,
    local_basis,
    parallel_transport,
    straight_edit,
    x_space_guidance,
)
from jaxdiff.solvers import FixedPointInversion

KEY = jax.random.key(0)
TIGHT = SubspaceIteration(tolerance=1e-10, max_iterations=300)


class Affine(eqx.Module):
    """eps_hat = B x + d, with h = W x on the way."""

    matrix: jax.Array
    offset: jax.Array
    encoder: jax.Array

    def __call__(self, x, t, cond=None, *, key=None, tap=None):
        if tap is not None:
            tap("mid", self.encoder @ x)
        return self.matrix @ x + self.offset


def affine(size=6):
    rng = np.random.default_rng(0)
    matrix, encoder = rng.normal(size=(2, size, size))
    offset = rng.normal(size=size)
    return NetworkDenoiser(Affine(*map(jnp.asarray, (matrix, offset, encoder))), processes.VP())


def sphere_map(matrix):
    """x -> A x / |A x|: onto the unit sphere."""

    def f(x):
        h = matrix @ x
        return h / jnp.linalg.norm(h)

    return f


def test_x_space_guidance_on_an_affine_network(x64):
    denoiser, x, v = affine(), jnp.linspace(-1, 1, 6), jnp.eye(6)[2]
    path = x_space_guidance(denoiser, x, 0.6, v, scale=0.2, step=1.5, num_steps=5)
    moved = 0.2 * 1.5 * denoiser.network.matrix @ v
    np.testing.assert_allclose(path, x + jnp.arange(6)[:, None] * moved, atol=1e-12)
    np.testing.assert_allclose(straight_edit(x, v, jnp.asarray([0, -2.0]))[1], x - 2 * v)
    with pytest.raises(ValueError, match=r"`direction` must have the shape of `x`, \(6,\), got"):
        x_space_guidance(denoiser, x, 0.6, v[None])
    with pytest.raises(ValueError, match="`direction` must have the shape"):
        straight_edit(x, v[:3], jnp.ones(2))


def test_local_basis_of_a_linear_encoder(x64):
    denoiser, x = affine(), jnp.zeros(6)
    values, right = np.linalg.svd(denoiser.network.encoder)[1:]
    guided = guidance.ClassifierFree(denoiser, null_cond=0, scale=2.0)
    for model in (denoiser, guided):
        basis = local_basis(KEY, model, x, 0.3, 4, cond=1, method=TIGHT)
        np.testing.assert_allclose(basis.values, values[:4], rtol=1e-10)
        np.testing.assert_allclose(np.abs(basis.right @ right[:4].T), np.eye(4), atol=1e-8)


def test_transport(x64):
    f, here, there = (
        sphere_map(jnp.diag(jnp.asarray([3.0, 2, 1, 0.5]))),
        jnp.ones(4),
        jnp.arange(4.0),
    )
    start, end = (jacobian_svd(KEY, f, x, 3, method=TIGHT) for x in (here, there))
    for power in (0.0, 1.0):
        back = jax.vmap(lambda u, p=power: parallel_transport(u, start, power=p))(start.left)
        np.testing.assert_allclose(back, start.right, atol=1e-9)
    tangent = start.left[1]
    moved = jax.jvp(f, (there,), (parallel_transport(tangent, end, power=1.0),))[1]
    projected = end.left.T @ (end.left @ tangent)
    cosine = moved @ projected / jnp.linalg.norm(moved) / jnp.linalg.norm(projected)
    np.testing.assert_allclose(cosine, 1, atol=1e-12)
    plain = parallel_transport(tangent, end)
    np.testing.assert_allclose(jnp.linalg.norm(plain), 1)
    weights = end.left @ tangent
    np.testing.assert_allclose(end.right @ plain, weights / jnp.linalg.norm(weights), atol=1e-9)


def test_carried_directions_move_as_their_jacobians_say():
    """A perceptron at two points; J v by the matrix itself."""
    rng = np.random.default_rng(0)
    outer, inner, x = (rng.normal(size=s).astype(np.float32) for s in ((7, 6), (6, 5), (2, 5)))
    matrices = [(outer * (1 - np.tanh(inner @ point) ** 2)) @ inner for point in x]
    parts = [np.linalg.svd(matrix, full_matrices=False) for matrix in matrices]
    rank, zero = 3, jnp.zeros(())
    source, target = (
        Spectrum(values[:rank], right[:rank], left.T[:rank], zero, zero, zero, zero)
        for left, values, right in parts
    )
    found = compare_transport(
        lambda x: outer @ jnp.tanh(inner @ x), jnp.asarray(x[1]), source, target, 2
    )
    assert set(found.directions) == {"own_direction", "unchanged", "transport", "pullback"}
    for k in range(2):
        u = parts[0][0][:, k]
        np.testing.assert_array_equal(found.directions["unchanged"][k], parts[0][2][k])
        for kind, v in found.directions.items():
            np.testing.assert_allclose(np.linalg.norm(v[k]), 1, rtol=1e-5)
            move = matrices[1] @ v[k]
            cosine = move @ u / np.linalg.norm(move)
            np.testing.assert_allclose(found.cosines[kind][k], cosine, rtol=1e-4, atol=1e-5)
        basis = parts[1][0][:, :rank]
        np.testing.assert_allclose(found.lengths[k], np.linalg.norm(basis.T @ u), rtol=1e-5)
    np.testing.assert_allclose(found.cosines["pullback"], found.lengths, rtol=1e-4)
    assert (found.cosines["own_direction"] > 0).all()
    for kind in ("own_direction", "transport"):  # the best in the span is the pullback
        assert (found.cosines[kind] <= found.lengths + 1e-5).all()


def test_shooting_on_a_sphere_follows_great_circles(x64):
    f, x = sphere_map(jnp.diag(jnp.asarray([3.0, 2, 1, 0.5]))), jnp.asarray([0.4, -0.3, 0.5, 1.0])
    start = jacobian_svd(KEY, f, x, 3, method=TIGHT)
    tangent = (start.left[0] - start.left[2]) / 2**0.5

    def shoot(power):
        options = {"distance": 0.1, "num_steps": 8, "power": power, "method": TIGHT}
        points, tangents, _ = geodesic_shooting(KEY, f, x, start, tangent, **options)
        h = jax.vmap(f)(points)
        plane = jnp.stack([h[0], tangent])
        return points, h - h @ plane.T @ plane, tangents - tangents @ plane.T @ plane, h @ plane.T

    points, h_outside, tangent_outside, inside = shoot(1.0)
    np.testing.assert_allclose(jnp.linalg.norm(jnp.diff(points, axis=0), axis=1), 0.1)
    np.testing.assert_allclose(h_outside, 0, atol=1e-9)
    np.testing.assert_allclose(tangent_outside, 0, atol=1e-9)
    angles = np.unwrap(np.arctan2(inside[:, 1], inside[:, 0]))
    assert np.all(np.diff(angles) > 0) and angles[-1] > 0.2  # onwards, not back
    assert jnp.abs(shoot(0.0)[1]).max() > 1e-3  # the published rule leaves the circle


def test_shooting_starts_warm():
    f, x = sphere_map(jnp.diag(jnp.linspace(3, 0.1, 20))), jnp.ones(20)
    start = jacobian_svd(KEY, f, x, 3, method=SubspaceIteration(oversample=2))
    options = {"distance": 0.01, "num_steps": 3, "method": SubspaceIteration(2, 1e-2)}
    products = geodesic_shooting(KEY, f, x, start, start.left[0], **options)[2]
    assert np.all(products[1:] < products[0] / 2)


@pytest.fixture(scope="module")
def unet():
    def build():
        return networks.UNet(
            4,
            in_channels=1,
            image_size=4,
            channel_mults=(1, 2),
            attention_resolutions=(),
            num_res_blocks=1,
            num_classes=3,
            rngs=nnx.Rngs(0),
        )

    return NetworkDenoiser(with_random_weights(build), processes.Cosine(), predictions.V())


def test_edits_of_taps_reach_through_guidance(unet):
    x, cond = jax.random.normal(KEY, (4, 4, 1)), jnp.int32(1)
    guided = guidance.ClassifierFree(unet, null_cond=3, scale=1.7)
    offset = Offset(0.3 * jnp.ones((2, 2, 8)))
    edited = edit_taps(guided, {"mid": offset})
    alone = guidance.ClassifierFree(edit_taps(unet, {"mid": offset}), null_cond=3, scale=1.7)
    answers = jax.jit(lambda *models: [model(x, 0.5, cond) for model in models])
    plain, changed, other = answers(guided, edited, alone)
    np.testing.assert_allclose(changed, other, atol=1e-6)
    assert jnp.abs(changed - plain).max() > 1e-3
    response = TapResponse(guided, x, jnp.float32(0.5), cond)
    assert response.origin.shape == (2, 2, 8)
    at = jax.jit(lambda h: response(h))
    np.testing.assert_allclose(at(response.origin), plain, atol=1e-6)
    np.testing.assert_allclose(at(offset.offset), changed, atol=1e-6)
    features = [TapFeature(model, jnp.float32(0.5), cond) for model in (edited, guided)]
    moved, still = jax.jit(lambda x: [feature(x) for feature in features])(x)
    np.testing.assert_allclose(moved, still + 0.3, atol=1e-6)


def test_inversion_returns_to_its_start(unet):
    x = 0.5 * jax.random.normal(KEY, (3, 4, 4, 1))
    cond, times = jnp.full(3, 3), jnp.linspace(0.02, 0.9, 12)
    exact = FixedPointInversion(num_iterations=30)
    noisy = invert(unet, x, cond=cond, solver=exact, times=times).x
    back = denoise(KEY, unet, noisy, cond=cond, times=times[::-1]).x
    np.testing.assert_allclose(back, x, atol=2e-4)
