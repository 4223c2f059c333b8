"""Hyperplanes against scikit-learn and symmetry; mixing time and edits in closed form."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from geometry.linear import linear_denoiser
from sklearn.svm import SVC

import jaxdiff
from jaxdiff import oracles, processes
from jaxdiff.geometry._boundary_diffusion import (
    Hyperplane,
    boundary_edit,
    fit_hyperplane,
    mixing_time,
)


def classes(count, size, seed=0, distance=1.0):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3 == 0
    x = rng.normal(size=(count, size)) + 3 + distance * labels[:, None] * rng.normal(size=size)
    return x, labels


@pytest.mark.parametrize("count, size, penalty", [(60, 4, 1.0), (60, 4, 0.01), (12, 40, 0.1)])
def test_hyperplane_is_scikit_learns(x64, count, size, penalty):
    x, labels = classes(count, size)
    plane = fit_hyperplane(jnp.asarray(x), labels, penalty=penalty)
    # A squared hinge is a hard margin in a space where every example has an axis of its own.
    kernel = x @ x.T + np.eye(count) / (2 * penalty)
    reference = SVC(kernel="precomputed", C=1e8, tol=1e-9).fit(kernel, labels)
    normal = reference.dual_coef_[0] @ x[reference.support_]
    expected = np.append(normal, reference.intercept_) / np.linalg.norm(normal)
    found = np.append(plane.normal, plane.offset)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    right = (x @ normal + reference.intercept_ > 0) == labels
    np.testing.assert_allclose(plane.accuracy, right.mean())
    assert plane.converged


def test_large_penalty_gives_the_widest_margin(x64):
    """Fewer examples than numbers: the hard margin, which hinge losses share."""
    x, labels = classes(20, 50, seed=1)
    plane = fit_hyperplane(jnp.asarray(x), labels, penalty=1e7)
    reference = SVC(kernel="linear", C=1e7, tol=1e-8).fit(x, labels)
    normal = reference.coef_[0] / np.linalg.norm(reference.coef_)
    np.testing.assert_allclose(plane.normal, normal, atol=1e-5)
    assert plane.accuracy == 1.0
    # All support vectors lie at the margin, on their side.
    margins = np.sort(np.where(labels, 1, -1) * np.asarray(jax.vmap(plane.distance)(x)))
    np.testing.assert_allclose(margins[:2], 1 / np.linalg.norm(reference.coef_), rtol=1e-5)


def symmetric(mean, count=40):
    """Examples +-m + z with z and -z, orthogonal to m, in both classes."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(count, mean.size))
    noise -= np.outer(noise @ mean.ravel(), mean.ravel()) / np.sum(mean**2)
    noise = np.concatenate([noise, -noise]).reshape(-1, *mean.shape)
    return np.concatenate([mean + noise, noise - mean]), np.arange(4 * count) < 2 * count


def test_symmetric_classes(x64):
    mean = np.array([[1.0, -2.0], [0.5, 0.3]])
    x, labels = symmetric(mean)
    shift = np.array([[10.0, 3.0], [0.0, -4.0]])
    plane = fit_hyperplane(jnp.asarray(x + shift), labels)
    np.testing.assert_allclose(plane.normal, mean / np.linalg.norm(mean), atol=1e-10)
    np.testing.assert_allclose(plane.distance(jnp.asarray(shift)), 0.0, atol=1e-9)
    turned = fit_hyperplane(jnp.asarray(x), ~labels)
    np.testing.assert_allclose(turned.normal, -mean / np.linalg.norm(mean), atol=1e-10)


def test_float32_in_many_dimensions_and_inside_jit():
    x, labels = classes(30, 2000, seed=2, distance=0.3)
    exact = SVC(kernel="linear", C=1e6, tol=1e-8).fit(x, labels).coef_[0]
    fit = jax.jit(lambda x, labels, penalty: fit_hyperplane(x, labels, penalty=penalty))
    plane = fit(jnp.asarray(x, jnp.float32), jnp.asarray(labels), 1.0)
    assert plane.normal.dtype == jnp.float32 and plane.converged and plane.accuracy == 1.0
    assert plane.normal @ exact / np.linalg.norm(exact) > 1 - 1e-4


def test_moves_along_the_normal(x64):
    plane = fit_hyperplane(*map(jnp.asarray, classes(30, 5)))
    x = jnp.linspace(-1, 1, 5)
    np.testing.assert_allclose(jnp.linalg.norm(plane.normal), 1.0, rtol=1e-12)
    np.testing.assert_allclose(plane.distance(plane.move(x, 0.7)), plane.distance(x) + 0.7)
    np.testing.assert_allclose(plane.distance(plane.place(x, -2.0)), -2.0)
    mirrored = plane.reflect(x)
    np.testing.assert_allclose(plane.distance(mirrored), -plane.distance(x))
    np.testing.assert_allclose(plane.reflect(mirrored), x, atol=1e-12)
    # Nothing but the coordinate along the normal changes.
    change = mirrored - x
    np.testing.assert_allclose(change, (plane.normal @ change) * plane.normal, atol=1e-12)


def test_reflection_exchanges_the_classes_of_a_mixture(x64):
    """Two Gaussians at +-m: at any time the exact posterior changes sides."""
    process, mean = processes.VP(), np.array([0.9, -0.4, 0.2])
    oracle = oracles.gaussian_mixture(
        process, np.stack([-mean, mean]), np.stack([0.2 * np.eye(3)] * 2), labels=[0, 1]
    )
    t = jnp.asarray(0.4)
    alpha, sigma = process.alpha(t), process.sigma(t)
    x, labels = symmetric(alpha * mean)
    plane = fit_hyperplane(jnp.asarray(x), labels)
    noisy = alpha * mean + sigma * jax.random.normal(jax.random.key(0), (5, 3))
    posterior = jax.jit(jax.vmap(lambda x: oracle.class_log_posterior(x, t)))
    np.testing.assert_allclose(
        posterior(jax.vmap(plane.reflect)(noisy)), posterior(noisy)[:, ::-1], atol=1e-9
    )


def test_mixing_time_of_a_gaussian(x64):
    """States of exactly typical radius: the time where snr E||x0||^2 / d is (1 + tol)^2 - 1."""
    process, variance, tolerance = processes.VP(), 0.4, 0.02
    times = jnp.linspace(process.t_min, process.t_max, 400)
    alpha, sigma = process.alpha(times), process.sigma(times)
    z = jax.random.normal(jax.random.key(0), (3, 1, 5, 2))
    z = z * jnp.sqrt(10 / jnp.sum(z**2, axis=(2, 3), keepdims=True))
    x = jnp.sqrt(alpha**2 * variance + sigma**2)[:, None, None] * z
    found = mixing_time(process, times, x, tolerance=tolerance)
    exact = process.time(jnp.log(((1 + tolerance) ** 2 - 1) / variance))
    assert times[found.index - 1] < exact <= times[found.index] == found.t
    assert found.settled and abs(found.t - 0.5) < 0.06
    np.testing.assert_allclose(found.radius, jnp.sqrt(1 + variance * (alpha / sigma) ** 2))
    # Of any process: the same signal-to-noise ratio.
    edm = processes.EDM()
    levels = edm.time(process.log_snr(times))
    scaled = jnp.sqrt(variance + levels**2)[:, None, None] * z
    inside = (levels > edm.t_min) & (levels < edm.t_max)
    other = mixing_time(edm, levels[inside], scaled[:, inside], tolerance=tolerance)
    np.testing.assert_allclose(edm.log_snr(other.t), process.log_snr(found.t), rtol=1e-6)


def test_mixing_time_at_the_extremes():
    process, times = processes.VP(), jnp.asarray([0.2, 0.5, 0.9])
    on_sphere = jnp.ones((2, 3, 4)) * process.sigma(times)[:, None]
    assert mixing_time(process, times, on_sphere).index == 0
    off = mixing_time(process, times, 2 * on_sphere)
    assert off.index == 2 and not off.settled
    # An excursion in between counts.
    bump = mixing_time(process, times, on_sphere * jnp.asarray([1.0, 1.5, 1.0])[:, None])
    assert bump.index == 2 and bump.settled
    with pytest.raises(ValueError, match="one state per time"):
        mixing_time(process, times, jnp.ones((3, 2, 4)))


def test_mixing_time_reads_the_path_of_an_inversion(x64):
    process = processes.VP()
    oracle = oracles.gaussian(process, jnp.zeros(3), 0.5 * jnp.eye(3))
    images = jax.random.normal(jax.random.key(0), (8, 3))
    saveat = diffrax.SaveAt(t0=True, steps=True)
    path = jaxdiff.invert(oracle, images, times=40, saveat=saveat).trajectory
    found = jax.jit(lambda path: mixing_time(process, path.t[0], path.x, tolerance=0.2))(path)
    assert found.radius.shape == (41,) and 0 < found.index < 40


def test_edits_of_states_and_activations_in_one_step(x64):
    """A linear network: x moves at the start, h in the first step alone."""
    denoiser = linear_denoiser()
    times = jnp.asarray([0.6, 0.4, 0.2, 0.05])
    x = jax.random.normal(jax.random.key(1), (2, 4))
    normal, inner = jnp.eye(4)[1], jnp.asarray([0.6, 0.0, 0.8])
    planes = [
        Hyperplane(n, jnp.zeros(()), jnp.ones(()), jnp.ones((), bool)) for n in (normal, inner)
    ]
    out = boundary_edit(
        jax.random.key(0), denoiser, x, times, planes[0], 1.5, h_boundary=planes[1], h_step=-2.0
    )
    network, process = denoiser.network, denoiser.process
    expected = np.asarray(x) + 1.5 * np.eye(4)[1]
    dh = -2.0 * inner
    for t, s in zip(times[:-1], times[1:], strict=True):
        eps = (expected @ network.encoder.T + dh) @ network.decoder.T
        clean = (expected - process.sigma(t) * eps) / process.alpha(t)
        expected, dh = process.alpha(s) * clean + process.sigma(s) * eps, 0.0
    np.testing.assert_allclose(out.x, expected, rtol=1e-12)
    assert out.nfe.tolist() == [3, 3]
    alone = boundary_edit(jax.random.key(0), denoiser, x, times, planes[0], 0.0)
    plain = jaxdiff.denoise(jax.random.key(0), denoiser, x, times=times)
    np.testing.assert_array_equal(alone.x, plain.x)


def test_bad_labels():
    x = jnp.ones((4, 3))
    with pytest.raises(ValueError, match="one entry per example"):
        fit_hyperplane(x, jnp.zeros(3))
    with pytest.raises(ValueError, match="both classes, 0 and 1"):
        fit_hyperplane(x, jnp.asarray([-1, 1, 1, -1]))
