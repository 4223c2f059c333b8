"""Directions in h-space: principal components of activations, and of one image's Jacobian."""

import operator
from collections.abc import Iterator

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_cond, check_count
from jaxdiff._tree import jit
from jaxdiff.denoiser import Denoiser, find_network
from jaxdiff.geometry._features import TapFeature, TapResponse
from jaxdiff.geometry._ritz import GolubKahanLanczos, SpectralMethod
from jaxdiff.geometry._spectrum import Spectrum, jacobian_svd
from jaxdiff.geometry._streaming_pca import PrincipalDirections, StreamingPCA
from jaxdiff.sampling import sample
from jaxdiff.solvers._base import DiffusionSolver
from jaxdiff.solvers._ddim import DDIM


class _ReadTap(eqx.Module):
    """For `SaveAt`: the activation at a state. A module, so that equal ones do not recompile."""

    tap: str = eqx.field(static=True)

    def __call__(self, t, x, problem):
        return TapFeature(problem.denoiser, t, problem.cond, self.tap)(x)


def trajectory_activations(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    shape: tuple[int, ...],
    num_samples: int,
    *,
    tap: str = "mid",
    cond: PyTree = None,
    solver: DiffusionSolver = DDIM(),
    times: int | Array = 50,
    first_index: int = 0,
) -> tuple[Array, Array]:
    """Sample, and read an activation wherever a step starts.

    Costs one more evaluation of the network per step than sampling does.

    Args:
        key: typed PRNG key, as in `sample`.
        denoiser: a network's denoiser, or guidance and other maps of one.
        shape: shape of one example, `(*event)`.
        num_samples: how many.
        tap: which activation; "mid" is the h-space of a UNet.
        cond: pytree with a leading axis of `num_samples`, or None.
        solver: a solver of this library.
        times: as in `sample`, one grid for all.
        first_index: as in `sample`.

    Returns:
        The times `(num_steps,)`, decreasing, and the activations `(num_samples, num_steps, *h)`.

    Raises:
        TypeError: if there is no network inside, or as `sample`.
        ValueError: if the network has no such tap, or as `sample`.
    """
    find_network(denoiser)
    saveat = diffrax.SaveAt(t0=True, steps=True, fn=_ReadTap(tap))
    trajectory = sample(
        key, denoiser, shape, num_samples, cond=cond, solver=solver, times=times,
        first_index=first_index, saveat=saveat,
    ).trajectory  # fmt: skip
    assert trajectory is not None
    # The last state is the sample, where no step starts.
    return trajectory.t[0, :-1], trajectory.x[:, :-1]


def h_space_pca(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    shape: tuple[int, ...],
    num_samples: int,
    rank: int,
    *,
    tap: str = "mid",
    cond: PyTree = None,
    solver: DiffusionSolver = DDIM(),
    times: int | Array = 50,
    batch_size: int = 64,
    oversample: int = 8,
) -> tuple[Array, PrincipalDirections]:
    """Principal directions of h-space, joint: an example is the activations of all steps together.

    As in the paper, where h-space is the concatenation over time: one direction says how to move h
    at every step, and steps at which activations vary more weigh more. To edit by a standard
    deviations,

        TimedOffset(denoiser, times, a * found.std[i] * found.directions[i])

    A fit on data: batches are sampled and forgotten, so that memory does not grow with their
    number.

    Args:
        key: typed PRNG key; example i draws from `fold_in(key, i)`, whatever the batch size.
        denoiser: a network's denoiser, or guidance and other maps of one.
        shape: shape of one example, `(*event)`.
        num_samples: size of the population.
        rank: r, how many directions.
        tap: which activation; "mid" is the h-space of a UNet.
        cond: pytree with a leading axis of `num_samples`, or None.
        solver: a solver of this library.
        times: as in `sample`, one grid for all.
        batch_size: examples sampled at a time.
        oversample: directions kept beyond the rank, as far as there are, while batches are merged.

    Returns:
        The times of the steps `(num_steps,)`, and directions `(r, num_steps, *h)`.

    Raises:
        TypeError: as `trajectory_activations`.
        ValueError: if `rank` exceeds what the population can have, or as `trajectory_activations`.

    Reference: Haas, Huberman-Spiegelglas, Mulayoff, Grasshof, Brandt, Michaeli, "Discovering
    Interpretable Directions in the Semantic Latent Space of Diffusion Models", 2023,
    arXiv 2303.11073.
    """
    options = dict(tap=tap, solver=solver, times=times)
    batches = _activations(key, denoiser, shape, num_samples, cond, batch_size, options)
    grid, found = _fit(((t, h[:, None]) for t, h in batches), num_samples, rank, oversample)
    return grid, jax.tree.map(lambda leaf: leaf[0], found)


def h_space_pca_per_step(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    shape: tuple[int, ...],
    num_samples: int,
    rank: int,
    *,
    tap: str = "mid",
    cond: PyTree = None,
    solver: DiffusionSolver = DDIM(),
    times: int | Array = 50,
    batch_size: int = 64,
    oversample: int = 8,
) -> tuple[Array, PrincipalDirections]:
    """Principal directions of h-space, of every step by itself.

    Signs are canonical at the first step, and agree from each step to the next. Otherwise as
    `h_space_pca`.

    Args:
        key: as in `h_space_pca`.
        denoiser: as in `h_space_pca`.
        shape: as in `h_space_pca`.
        num_samples: as in `h_space_pca`.
        rank: as in `h_space_pca`.
        tap: as in `h_space_pca`.
        cond: as in `h_space_pca`.
        solver: as in `h_space_pca`.
        times: as in `h_space_pca`.
        batch_size: as in `h_space_pca`.
        oversample: as in `h_space_pca`.

    Returns:
        The times of the steps `(num_steps,)`, and `PrincipalDirections` with a leading axis of
        `num_steps`: directions `(num_steps, r, *h)`, std `(num_steps, r)`.

    Raises:
        TypeError: as `h_space_pca`.
        ValueError: as `h_space_pca`.

    Reference: Haas et al., 2023, arXiv 2303.11073.
    """
    options = dict(tap=tap, solver=solver, times=times)
    batches = _activations(key, denoiser, shape, num_samples, cond, batch_size, options)
    grid, found = _fit(batches, num_samples, rank, oversample)
    return grid, eqx.tree_at(lambda f: f.directions, found, _agreeing_signs(found.directions))


def _activations(key, denoiser, shape, num_samples, cond, batch_size, options) -> Iterator:
    """Times and activations `(b, num_steps, *h)`, batch by batch."""
    check_cond(cond, num_samples)
    batch_size = check_count("batch_size", batch_size)
    for start in range(0, num_samples, batch_size):
        count = min(batch_size, num_samples - start)
        own = jax.tree.map(operator.itemgetter(slice(start, start + count)), cond)
        yield trajectory_activations(
            key, denoiser, shape, count, cond=own, first_index=start, **options
        )


_update = jit(jax.vmap(StreamingPCA.update, in_axes=(0, 1)))


def _fit(batches: Iterator, num_samples: int, rank: int, oversample: int):
    """Times, and directions of every group for itself, from activations `(b, groups, *shape)`."""
    if not 1 <= rank < num_samples:
        raise ValueError(
            f"`rank` must lie between 1 and {num_samples - 1}, the largest rank of {num_samples} "
            f"centred examples, got {rank}."
        )
    times, h = next(batches)
    # Never below the rank, so that a rank above the size of an example is found out.
    kept = max(rank, min(rank + oversample, h[0, 0].size))
    empty = StreamingPCA.init(h.shape[2:], kept, jnp.promote_types(h.dtype, jnp.float32))
    pca = _update(jax.tree.map(lambda leaf: jnp.stack([leaf] * h.shape[1]), empty), h)
    for _, h in batches:
        pca = _update(pca, h)
    return times, jax.vmap(lambda pca: pca.finish(rank))(pca)


def _agreeing_signs(directions: Array) -> Array:
    """Directions `(num_steps, r, *h)` with signs turned to those of the step before."""
    flat = directions.reshape(*directions.shape[:2], -1)

    def turn(before, now):
        overlap = jnp.sum(before * now, axis=1, keepdims=True)
        now = jnp.where(overlap < 0, -now, now)
        return now, now

    return jax.lax.scan(turn, flat[0], flat)[1].reshape(directions.shape)


def h_space_jacobian(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    x: Array,
    t: Array,
    rank: int,
    *,
    cond: PyTree = None,
    tap: str = "mid",
    weight: Array | None = None,
    method: SpectralMethod = GolubKahanLanczos(),
) -> Spectrum:
    """Directions in h-space that change this example's x0_hat most, or a region of it.

    The right singular vectors of J = d(weight x0_hat) / d(dh) at dh = 0, at one time.

    Args:
        key: typed PRNG key, for the iteration's start.
        denoiser: a network's denoiser, or guidance and other maps of one.
        x: the noisy example, `(*event)`.
        t: scalar time.
        rank: how many.
        cond: condition, or None.
        tap: which activation; "mid" is the h-space of a UNet.
        weight: factors on the entries of x0_hat, broadcastable to them: a mask of the region whose
            changes count; None for all.
        method: how the directions are computed.

    Returns:
        A `Spectrum`: directions `right`, `(r, *h)`, and the changes `left` of x0_hat.

    Raises:
        TypeError: if there is no network inside.
        ValueError: if the network has no such tap, or as `jacobian_svd`.

    Reference: Haas, Huberman-Spiegelglas, Mulayoff, Grasshof, Brandt, Michaeli, "Discovering
    Interpretable Directions in the Semantic Latent Space of Diffusion Models", 2023,
    arXiv 2303.11073. There one direction after the other, by deflated power iteration.
    """
    response = TapResponse(denoiser, x, t, cond, tap)
    return jacobian_svd(key, response, response.origin, rank, weight=weight, method=method)
