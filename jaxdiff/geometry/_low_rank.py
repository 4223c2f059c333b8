"""Denoisers of data on subspaces: the rank of the Jacobian, and the clusters it reveals.

For a mixture of Gaussians on subspaces, dD/dx at a point that surely belongs to component k is a
multiple of the projector on its subspace: of the rank of the component, not of the whole mixture.

Reference: Wang, Zhang, Zhang, Chen, Ma, Qu, "Diffusion Models Learn Low-Dimensional Distributions
via Subspace Clustering", 2024, arXiv 2409.02426.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_cond, check_key
from jaxdiff._tree import batched, jit
from jaxdiff.denoiser import Denoiser
from jaxdiff.geometry._grassmann import extrinsic_mean
from jaxdiff.geometry._jacobian import Jacobian
from jaxdiff.geometry._linalg import check_bases, flat_basis, nearest_orthonormal
from jaxdiff.geometry._ritz import GolubKahanLanczos, SpectralMethod
from jaxdiff.geometry._score_jacobian import ScaledDenoiser
from jaxdiff.geometry._spectrum import Spectrum, jacobian_svd


class NumericalRank(eqx.Module):
    """How many singular values of a Jacobian count.

    Attributes:
        rank: number of values above the threshold.
        saturated: whether all values that were computed are: the rank is at least `rank`.
        values: singular values of alpha dD/dx, decreasing, `(max_rank,)`.
    """

    rank: Array
    saturated: Array
    values: Array


@jit
def _ranks(key, denoiser, x0, times, cond, *, threshold, method, max_rank):
    def at(n, t):
        noise_key, svd_key = jax.random.split(jax.random.fold_in(key, n))
        noise = jax.random.normal(noise_key, x0.shape, x0.dtype)
        x = denoiser.process.marginal(x0, noise, t).astype(x0.dtype)
        return _rank_at(svd_key, denoiser, x, t, cond, threshold, method, max_rank)

    return jax.lax.map(lambda row: at(*row), (jnp.arange(len(times)), times))


def _rank_at(key, denoiser, x, t, cond, threshold, method, max_rank) -> NumericalRank:
    f = ScaledDenoiser(denoiser, t, cond)
    values = jacobian_svd(key, f, x, max_rank, method=method).values
    rank = jnp.sum(values > threshold * values[0])
    return NumericalRank(rank, (rank == max_rank) & (max_rank < x.size), values)


def denoiser_rank(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    x: Array,
    t: Array,
    max_rank: int,
    *,
    cond: PyTree = None,
    threshold: float = 0.01,
    method: SpectralMethod = GolubKahanLanczos(),
) -> NumericalRank:
    """Numerical rank of dD/dx: the singular values above a fraction of the largest.

    Args:
        key: typed PRNG key, for the starting block.
        denoiser: the denoiser.
        x: one noisy example, `(*event)`.
        t: its scalar time.
        max_rank: how many singular values are computed.
        cond: condition, or None.
        threshold: the fraction, in (0, 1).
        method: see `jacobian_svd`.

    Returns:
        A `NumericalRank`.

    Raises:
        ValueError: for a `max_rank` below 1 or above the size of x.
    """
    return _rank_at(key, denoiser, x, t, cond, threshold, method, max_rank)


def denoiser_rank_over_times(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    x0: Array,
    times: Array,
    max_rank: int,
    *,
    cond: PyTree = None,
    threshold: float = 0.01,
    method: SpectralMethod = GolubKahanLanczos(),
) -> NumericalRank:
    """Numerical rank of dD/dx at one example noised to each of several times.

    Time n draws its noise from fold_in(key, n). Average over examples and keys with `jax.vmap`.

    Args:
        key: typed PRNG key.
        denoiser: the denoiser.
        x0: one clean example, `(*event)`.
        times: `(T,)`.
        max_rank: as in `denoiser_rank`.
        cond: as in `denoiser_rank`.
        threshold: as in `denoiser_rank`.
        method: as in `denoiser_rank`.

    Returns:
        A `NumericalRank` whose leaves have a leading axis of T.

    Raises:
        ValueError: as for `denoiser_rank`.
    """
    check_key(key)
    return _ranks(
        key, denoiser, x0, times, cond, threshold=threshold, method=method, max_rank=max_rank
    )


@jit
def _participation_ratio(key, denoiser, x, t, cond, *, num_probes):
    jacobian = Jacobian(ScaledDenoiser(denoiser, t, cond), x)
    probes = jax.random.rademacher(key, (x.size, num_probes), jacobian.dtype)
    products = jacobian.forward(probes)
    traces = jnp.sum(probes * products, 0)
    pairs = jnp.sum(traces) ** 2 - jnp.sum(traces**2)
    square = jnp.mean(jnp.sum(products**2, 0))
    return pairs / (num_probes * (num_probes - 1)) / square


def participation_ratio(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    x: Array,
    t: Array,
    *,
    cond: PyTree = None,
    num_probes: int = 64,
) -> Array:
    """(tr J)^2 / ||J||^2 of J = dD/dx: a rank without a threshold, from random probes.

    The rank of a symmetric J whose nonzero eigenvalues are equal, and less where they differ. With
    Rademacher probes v, tr J = E v^T J v and ||J||^2 = E |J v|^2 share their products; the square
    of the trace is estimated without bias from pairs of different probes.

    Args:
        key: typed PRNG key, for the probes.
        denoiser: the denoiser.
        x: one noisy example, `(*event)`.
        t: its scalar time.
        cond: condition, or None.
        num_probes: Jacobian products, >= 2.

    Returns:
        A scalar.

    Raises:
        ValueError: for fewer than two probes.
    """
    if num_probes < 2:
        raise ValueError(f"`num_probes` must be at least 2, got {num_probes}.")
    check_key(key)
    return _participation_ratio(key, denoiser, x, t, cond, num_probes=num_probes)


@jax.default_matmul_precision("highest")
def subspace_affinity(bases: Array) -> Array:
    """exp(-sum sin^2) of the principal angles between N subspaces.

    Args:
        bases: `(N, r, *shape)`.

    Returns:
        `(N, N)`, symmetric, 1 for equal subspaces and exp(-r) for orthogonal ones.

    Raises:
        ValueError: if `bases` has fewer than three axes.

    Reference: Yan, Pollefeys, "A General Framework for Motion Segmentation: Independent,
    Articulated, Rigid, Non-rigid, Degenerate and Non-degenerate", ECCV 2006.
    """
    check_bases(bases)
    flat = jax.vmap(flat_basis)(bases)
    cosines = jnp.einsum("nim,kjm->nikj", flat, flat)
    return jnp.exp(jnp.sum(cosines**2, (1, 3)) - bases.shape[1])


@jax.default_matmul_precision("highest")
def spectral_clustering(affinity: Array, num_clusters: int) -> Array:
    """Labels of N points from their affinities, without random starts.

    The leading eigenvectors of D^{-1/2} A D^{-1/2}, for the degrees D, are a rotation of the
    indicators of clusters, up to the scale of rows. A pivoted QR decomposition finds one point per
    cluster, and the polar factor of their rows turns that rotation back.

    Args:
        affinity: `(N, N)`, symmetric, not negative.
        num_clusters: from 1 to N.

    Returns:
        `(N,)` integers; their order has no meaning.

    Raises:
        ValueError: for another shape, or too many clusters.

    Reference: Damle, Minden, Ying, "Simple, Direct, and Efficient Multi-way Spectral Clustering",
    2016, arXiv 1609.08251, algorithm 1; the normalisation: Ng, Jordan, Weiss, "On Spectral
    Clustering: Analysis and an Algorithm", 2001.
    """
    count = len(affinity)
    if affinity.shape != (count, count) or not 1 <= num_clusters <= count:
        raise ValueError(
            "`affinity` must be square, (N, N), and `num_clusters` from 1 to N, got shape "
            f"{affinity.shape} and {num_clusters} clusters."
        )
    scale = jax.lax.rsqrt(jnp.sum(affinity, 1))
    rows = jnp.linalg.eigh(scale[:, None] * affinity * scale)[1][:, -num_clusters:]

    def pivot(k, carry):
        rest, chosen = carry
        norms = jnp.linalg.norm(rest, axis=1)
        index = jnp.argmax(norms)
        direction = rest[index] / norms[index]
        return rest - jnp.outer(rest @ direction, direction), chosen.at[k].set(index)

    chosen = jax.lax.fori_loop(0, num_clusters, pivot, (rows, jnp.zeros(num_clusters, int)))[1]
    return jnp.argmax(rows @ nearest_orthonormal(rows[chosen]).T, 1)


class SubspaceClusters(eqx.Module):
    """Points grouped by the subspaces that a denoiser sees there.

    Attributes:
        labels: cluster of each point, `(N,)`; their order has no meaning.
        bases: mean subspace of each cluster, `(K, r, *event)`; NaN for a cluster without points.
        affinity: between points, `(N, N)`.
        spectra: leading singular triplets at each point, with a leading axis of N.
    """

    labels: Array
    bases: Array
    affinity: Array
    spectra: Spectrum


@jit
def _clusters(key, denoiser, x, t, cond, *, method, rank, num_clusters, batch_size):
    def local(i, x, cond):
        f = ScaledDenoiser(denoiser, t, cond)
        return jacobian_svd(jax.random.fold_in(key, i), f, x, rank, method=method)

    spectra = batched(local, batch_size)(jnp.arange(len(x)), x, cond)
    affinity = subspace_affinity(spectra.left)
    labels = spectral_clustering(affinity, num_clusters)

    def mean(k):
        return extrinsic_mean(spectra.left, weights=labels == k)

    bases = jax.lax.map(mean, jnp.arange(num_clusters))
    return SubspaceClusters(labels, bases, affinity, spectra)


def subspace_clusters(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    x: Array,
    t: Array,
    rank: int,
    num_clusters: int,
    *,
    cond: PyTree = None,
    method: SpectralMethod = GolubKahanLanczos(),
    batch_size: int | None = None,
) -> SubspaceClusters:
    """Cluster points by the leading left singular subspaces of dD/dx there.

    Those span where the denoised example moves when the noisy one does. Subspaces are compared by
    `subspace_affinity`, grouped by `spectral_clustering`, and averaged by `extrinsic_mean`.

    Args:
        key: typed PRNG key; point i starts its block from fold_in(key, i).
        denoiser: the denoiser.
        x: noisy examples, `(N, *event)`.
        t: their scalar time, of a middle noise level: low enough that the posterior knows the
            component, high enough that the denoiser does not copy its input.
        rank: dimension of the subspaces.
        num_clusters: how many clusters.
        cond: conditions with a leading axis of N, or None.
        method: see `jacobian_svd`.
        batch_size: points analysed at a time, to bound memory; None for all at once.

    Returns:
        A `SubspaceClusters`.

    Raises:
        ValueError: for more clusters than points, a `rank` that the Jacobian cannot have, or
            conditions that are not one per example.
    """
    check_key(key)
    check_cond(cond, len(x))
    return _clusters(
        key, denoiser, x, t, cond, method=method, rank=rank, num_clusters=num_clusters,
        batch_size=batch_size,
    )  # fmt: skip
