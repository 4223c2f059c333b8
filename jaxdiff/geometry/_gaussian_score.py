"""Gaussian approximations of a score, and the first steps of sampling in closed form.

At high noise a score is nearly that of the Gaussian with the data's mean and covariance, whose
probability flow is known exactly.

Reference: Wang, Vastola, "The Unreasonable Effectiveness of Gaussian Score Approximation for
Diffusion Models and its Applications", 2024, arXiv 2412.09726; and "The Hidden Linear Structure
in Score-Based Models and its Application", 2023, arXiv 2311.10892.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, PRNGKeyArray, PyTree

from jaxdiff._checks import check_cond, check_key
from jaxdiff._tree import jit
from jaxdiff.denoiser import Denoiser
from jaxdiff.geometry._linalg import right_svd
from jaxdiff.oracles import GaussianMixture, gaussian_flow_map
from jaxdiff.predictions import Score
from jaxdiff.processes import GaussianProcess


def fit_gaussian(
    process: GaussianProcess, data: ArrayLike, *, rank: int | None = None
) -> GaussianMixture:
    """The oracle of the Gaussian with the mean and covariance of data.

    C = U diag(lambda) U^T + tau^2 (I - U U^T): the `rank` leading principal components, and the
    mean of the remaining variances in all other directions. Without a rank it is the denoiser
    that is the best affine one, E[x0 | x_t] being replaced by linear regression.

    Costs a decomposition of the whole data matrix in memory, n d min(n, d).

    Args:
        process: the forward process.
        data: clean examples, `(n, *event)`; covariances divide by n.
        rank: number of principal components, at most min(n, d); None for all.

    Returns:
        A single Gaussian: a denoiser, with its density and flow map.

    Raises:
        ValueError: if `rank` is negative or exceeds what the data can have.
    """
    return _fit(process, [jnp.asarray(data)], rank)


def fit_gaussian_mixture(
    process: GaussianProcess, data: ArrayLike, assignments: ArrayLike, *, rank: int | None = None
) -> GaussianMixture:
    """One Gaussian per group of data, as in `fit_gaussian`: per label, cluster or nearest centre.

    Group k is class k of the oracle, so that `cond = k` is its Gaussian, and None the mixture.
    A fit on data, outside jit: groups of unequal size have unequal shapes.

    Args:
        process: the forward process.
        data: clean examples, `(n, *event)`.
        assignments: group of each example, `(n,)` integers in [0, K), none of them empty.
        rank: number of principal components, at most d and the size of the smallest group; None
            for that.

    Returns:
        A mixture of K Gaussians, with the weights of their groups.

    Raises:
        TypeError: if `assignments` are not integers.
        ValueError: if they do not fit, a group is empty, or `rank` exceeds what the groups have.

    Reference: Wang, Vastola, arXiv 2412.09726, for the mixture as the next approximation.
    """
    data, assignments = jnp.asarray(data), np.asarray(assignments)
    groups = _count_groups(assignments, len(data))
    return _fit(process, [data[assignments == k] for k in range(groups)], rank)


def _fit(process: GaussianProcess, groups: list[Array], rank: int | None) -> GaussianMixture:
    counts, dtype = np.asarray([len(group) for group in groups]), groups[0].dtype
    limit = min(int(counts.min()), groups[0][0].size)
    rank = limit if rank is None else rank
    if not 0 <= rank <= limit:
        raise ValueError(
            f"`rank` must lie between 0 and {limit}, the smaller of the event's size and the "
            f"smallest group of the data, got {rank}."
        )
    parts = [_components(group, rank) for group in groups]
    means, basis, spectrum, isotropic = (jnp.stack(leaves) for leaves in zip(*parts, strict=True))
    log_weights = jnp.asarray(np.log(counts / counts.sum()), dtype)
    labels = jnp.arange(len(groups), dtype=jnp.int32)
    return GaussianMixture(
        process, log_weights, means, basis, spectrum, isotropic, labels, len(groups)
    )


def _count_groups(assignments: np.ndarray, length: int) -> int:
    if assignments.shape != (length,):
        raise ValueError(
            f"`assignments` must hold one group per example, shape ({length},), got "
            f"{assignments.shape}."
        )
    if not np.issubdtype(assignments.dtype, np.integer):
        raise TypeError(f"`assignments` must be integers, got dtype {assignments.dtype}.")
    if assignments.min() < 0:
        raise ValueError(f"`assignments` must not be negative, got {assignments.min()}.")
    counts = np.bincount(assignments)
    if counts.min() == 0:
        raise ValueError(
            f"`assignments` must use every group from 0 to {len(counts) - 1}, got none in group "
            f"{int(counts.argmin())}. Number the groups that occur with "
            "np.unique(assignments, return_inverse=True)[1]."
        )
    return len(counts)


@jit
def _components(data, rank):
    """Mean, U, lambda and tau^2 of a group."""
    count, size = data.shape[0], data[0].size
    mean = data.mean(0)
    values, right = right_svd((data - mean).reshape(count, size))
    variances = values**2 / count
    # Variances beyond the values are zero.
    isotropic = variances[rank:].sum() / max(size - rank, 1)
    leaves = mean, right[:rank].T, variances[:rank], isotropic
    return tuple(leaf.astype(data.dtype) for leaf in leaves)


@jit
def _explained_variance(key, denoiser, approximation, x0, t, *, cond, approximation_cond):
    def one(index, x0, cond, approximation_cond):
        eps = jax.random.normal(jax.random.fold_in(key, index), x0.shape, x0.dtype)
        x = denoiser.process.marginal(x0, eps, t).astype(x0.dtype)
        score = denoiser.predict(Score(), x, t, cond)
        error = score - approximation.predict(Score(), x, t, approximation_cond)
        return jnp.sum(error**2), jnp.sum(score**2)

    errors, totals = jax.vmap(one)(jnp.arange(x0.shape[0]), x0, cond, approximation_cond)
    return 1 - errors.mean() / totals.mean()


def explained_variance(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    approximation: Denoiser,
    x0: Array,
    t: Array,
    *,
    cond: PyTree = None,
    approximation_cond: PyTree = None,
) -> Array:
    """How much of a denoiser's score another one explains at time t.

    1 - E ||s - s'||^2 / E ||s||^2 over noised data: 1 where they agree, as a trained score and
    `fit_gaussian` do at high noise.

    Args:
        key: typed PRNG key; example i draws from `fold_in(key, i)`.
        denoiser: whose score is explained.
        approximation: the denoiser that explains it, such as that of `fit_gaussian`.
        x0: clean examples, `(n, *event)`.
        t: scalar time with sigma(t) > 0; `jax.vmap` over it for a curve.
        cond: condition of the denoiser, a pytree with a leading axis of n, or None.
        approximation_cond: that of the approximation; None for an unconditional one.

    Returns:
        A scalar <= 1.

    Raises:
        TypeError: if `key` is not a typed key.
        ValueError: for a condition of the wrong length.

    Reference: Wang, Vastola, arXiv 2412.09726.
    """
    check_key(key)
    check_cond((cond, approximation_cond), x0.shape[0])
    return _explained_variance(
        key, denoiser, approximation, x0, t, cond=cond, approximation_cond=approximation_cond
    )


def _component(mixture: GaussianMixture, k: Array) -> GaussianMixture:
    """The k-th Gaussian of a mixture, alone."""
    parts = (mixture.means, mixture.basis, mixture.spectrum, mixture.isotropic)
    means, basis, spectrum, isotropic = (jnp.take(part, k, axis=0)[None] for part in parts)
    weight, label = jnp.zeros_like(mixture.log_weights[:1]), jnp.zeros_like(mixture.labels[:1])
    return GaussianMixture(
        mixture.process, weight, means, basis, spectrum, isotropic, label, num_classes=1
    )


@jit
def _teleport(key, approximation, components, indices, *, t, t_start):
    process, dtype = approximation.process, approximation.means.dtype

    def one(index, k):
        # The same draw as in `sample`, which keeps the second key for the path.
        prior_key = jax.random.split(jax.random.fold_in(key, index))[0]
        noise = jax.random.normal(prior_key, approximation.event_shape, dtype)
        x = (process.sigma(t_start) * noise).astype(dtype)
        return gaussian_flow_map(_component(approximation, k), x, t_start, t).astype(dtype)

    return jax.vmap(one)(indices, components)


def teleport(
    key: PRNGKeyArray,
    approximation: GaussianMixture,
    t: Array,
    num_samples: int,
    *,
    component: Array | None = None,
    t_start: Array | None = None,
    first_index: int = 0,
) -> Array:
    """States at time t where the probability flow of a Gaussian takes the prior's noise.

    Sampling then goes on from t with the true denoiser and any solver, the steps above t saved:

        x = teleport(key, fit_gaussian(process, data), t, num_samples)
        out = denoise(key, denoiser, x, times=jnp.linspace(t, 0, 20))

    Example i starts from the very noise that `sample` draws from the same key, so that both may
    be compared sample by sample.

    Args:
        key: typed PRNG key, as in `sample`.
        approximation: a Gaussian, such as that of `fit_gaussian`.
        t: scalar time to arrive at; the higher the noise, the better the approximation.
        num_samples: how many.
        component: `(num_samples,)` integers in [0, K), which Gaussian of a mixture carries each
            example, such as the label it is to have; None for a single Gaussian.
        t_start: scalar time of the prior, `times[0]` of the sampler compared with; None for the
            process's t_max.
        first_index: global index of the first example.

    Returns:
        States at t, `(num_samples, *event)`, in the dtype of the approximation.

    Raises:
        TypeError: if `key` is not a typed key.
        ValueError: for a mixture without `component`, or one of the wrong length.

    Reference: Wang, Vastola, arXiv 2412.09726, analytical teleportation. There alpha = 1.
    """
    check_key(key)
    if component is None and len(approximation.means) > 1:
        raise ValueError(
            "`component` must choose the Gaussian of each example where `approximation` has "
            f"several, got None for {len(approximation.means)}. Pass e.g. the labels, or a single "
            "Gaussian."
        )
    component = jnp.zeros(num_samples, jnp.int32) if component is None else jnp.asarray(component)
    if component.shape != (num_samples,):
        raise ValueError(
            f"`component` must have one entry per example, shape ({num_samples},), got "
            f"{component.shape}."
        )
    indices = first_index + jnp.arange(num_samples)
    start = approximation.process.t_max if t_start is None else t_start
    return _teleport(key, approximation, component, indices, t=t, t_start=start)
