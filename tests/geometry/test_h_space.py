"""Directions in h-space, of a linear network in closed form, and read from a UNet."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import gaussian
from flax import nnx
from geometry.linear import linear_denoiser

import jaxdiff
from jaxdiff import processes
from jaxdiff.denoiser import NetworkDenoiser, edit_taps
from jaxdiff.geometry._features import Offset
from jaxdiff.geometry._h_space import (
    h_space_jacobian,
    h_space_pca,
    h_space_pca_per_step,
    trajectory_activations,
)
from jaxdiff.geometry._timed_edit import TimedOffset
from jaxdiff.networks import MLP, read_taps

KEY, TIMES = jax.random.key(2), np.array([1.0, 0.7, 0.4, 0.2, 0.1, 0.0])


def activations(denoiser, count):
    """h = A x along the trajectories, from the states alone."""
    saveat = diffrax.SaveAt(t0=True, steps=True)
    times = jnp.asarray(TIMES)
    path = jaxdiff.sample(KEY, denoiser, (4,), count, times=times, saveat=saveat).trajectory
    return np.asarray(path.x[:, :-1] @ denoiser.network.encoder.T)


def principal(flat):
    _, values, axes = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    return axes, values / (len(flat) - 1) ** 0.5


def test_joint_directions_are_those_of_the_whole_trajectory(x64):
    denoiser, count = linear_denoiser(), 16
    options = dict(times=jnp.asarray(TIMES), batch_size=8)
    times, found = h_space_pca(KEY, denoiser, (4,), count, 3, **options)
    h = activations(denoiser, count)
    axes, std = principal(h.reshape(count, -1))
    np.testing.assert_array_equal(times, TIMES[:-1])
    assert found.directions.shape == (3, 5, 3) and found.mean.shape == (5, 3)
    np.testing.assert_allclose(found.std, std[:3], rtol=1e-10)
    overlap = np.abs(found.directions.reshape(3, -1) @ axes[:3].T)
    np.testing.assert_allclose(overlap, np.eye(3), atol=1e-9)
    # The flow is linear in four numbers: four directions would explain everything.
    missing = std[3] ** 2 / np.sum(std**2)
    np.testing.assert_allclose(np.sum(found.explained), 1 - missing, rtol=1e-12)
    np.testing.assert_allclose(std[4:], 0.0, atol=1e-12)


def test_directions_of_every_step(x64):
    denoiser, count = linear_denoiser(), 16
    options = dict(times=jnp.asarray(TIMES), batch_size=8)
    times, found = h_space_pca_per_step(KEY, denoiser, (4,), count, 2, **options)
    h = activations(denoiser, count)
    assert found.directions.shape == (5, 2, 3) and times.shape == (5,)
    for step in range(5):
        axes, std = principal(h[:, step])
        np.testing.assert_allclose(found.std[step], std[:2], rtol=1e-10)
        np.testing.assert_allclose(found.mean[step], h[:, step].mean(0), rtol=1e-10)
        overlap = np.abs(found.directions[step] @ axes[:2].T)
        np.testing.assert_allclose(overlap, np.eye(2), atol=1e-9)
    along = np.sum(found.directions[1:] * found.directions[:-1], axis=2)
    assert np.all(along > 0)


def test_a_joint_direction_moves_samples_along_its_image(x64):
    """The sample is affine in the edit's strength, and 0 changes nothing."""
    denoiser = linear_denoiser()
    grid = jnp.asarray(TIMES)
    times, found = h_space_pca(KEY, denoiser, (4,), 16, 1, times=grid, batch_size=8)

    def final(strength):
        offsets = strength * found.std[0] * found.directions[0]
        edited = TimedOffset(denoiser, times, offsets)
        return jaxdiff.sample(KEY, edited, (4,), 2, times=grid).x

    plain = jaxdiff.sample(KEY, denoiser, (4,), 2, times=grid).x
    none, once, back = jax.vmap(final)(jnp.asarray([0.0, 1.0, -2.0]))
    np.testing.assert_allclose(none, plain, rtol=1e-12)
    move = once - plain
    np.testing.assert_allclose(move[0], move[1], rtol=1e-10)
    np.testing.assert_allclose(back, plain - 2 * move, rtol=1e-10)


def test_jacobian_directions_of_a_linear_decoder(x64):
    """x0_hat = (x - sigma B h) / alpha: the right singular vectors of the masked B."""
    denoiser, t = linear_denoiser(6, 4), jnp.asarray(0.3)
    x = jnp.linspace(-1, 1, 6)
    mask = jnp.asarray([1.0, 1, 0, 1, 1, 0])
    process = denoiser.process
    for weight in (None, mask):
        found = h_space_jacobian(KEY, denoiser, x, t, 2, weight=weight)
        rows = np.asarray(denoiser.network.decoder) * (1 if weight is None else mask[:, None])
        _, values, axes = np.linalg.svd(rows)
        factor = process.sigma(t) / process.alpha(t)
        np.testing.assert_allclose(found.values, factor * values[:2], rtol=1e-8)
        overlap = np.abs(found.right @ axes[:2].T)
        np.testing.assert_allclose(overlap, np.eye(2), atol=1e-4)
    # No unit step in h changes the masked x0_hat more than the first direction.
    moved = edit_taps(denoiser, {"mid": Offset(found.right[0])})(x, t)
    change = jnp.linalg.norm(mask * (moved - denoiser(x, t)))
    np.testing.assert_allclose(change, found.values[0], rtol=1e-8)


def test_activations_of_a_network_with_conditions():
    """What is read is the network's activation at the states of the path, batch or no batch."""
    network = MLP(2, hidden=8, num_blocks=1, num_classes=2, rngs=nnx.Rngs(0))
    denoiser = NetworkDenoiser(network, processes.VP())
    cond, times = jnp.asarray([0, 1, 1, 0]), jnp.asarray([1.0, 0.5, 0.0])
    options = dict(tap="block.0", cond=cond, times=times)
    got, h = trajectory_activations(KEY, denoiser, (2,), 4, **options)
    saveat = diffrax.SaveAt(t0=True, steps=True)
    path = jaxdiff.sample(KEY, denoiser, (2,), 4, cond=cond, times=times, saveat=saveat).trajectory

    @jax.jit
    @jax.vmap
    def read(x, cond):
        values = (read_taps(network, ["block.0"], x[n], 1000 * times[n], cond)[1] for n in (0, 1))
        return jnp.stack([value["block.0"] for value in values])

    np.testing.assert_allclose(h, read(path.x, cond), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(got, times[:-1])
    found = h_space_pca(KEY, denoiser, (2,), 4, 2, batch_size=2, **options)[1]
    axes, std = principal(np.asarray(h, np.float64).reshape(4, -1))
    np.testing.assert_allclose(found.std, std[:2], rtol=1e-3)
    overlap = np.abs(found.directions.reshape(2, -1) @ axes[:2].T)
    np.testing.assert_allclose(overlap, np.eye(2), atol=1e-3)


def test_bad_input():
    denoiser = linear_denoiser()
    for rank in (0, 5):
        with pytest.raises(ValueError, match="`rank` must lie between 1 and 4"):
            h_space_pca(KEY, denoiser, (4,), 5, rank)
    with pytest.raises(ValueError, match="size of an example, 3"):
        h_space_pca_per_step(KEY, denoiser, (4,), 8, 4, times=2)
    with pytest.raises(ValueError, match="does not have"):
        h_space_pca(KEY, denoiser, (4,), 5, 1, tap="middle", times=2)
    with pytest.raises(TypeError, match="network with taps"):
        h_space_pca(KEY, gaussian(processes.VP()), (3,), 5, 1)
    with pytest.raises(ValueError, match="leading axis"):
        h_space_pca(KEY, denoiser, (4,), 5, 1, cond=jnp.zeros(4), times=2)
