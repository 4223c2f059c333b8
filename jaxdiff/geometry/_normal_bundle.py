"""Intrinsic dimension of the data from scores, which at low noise span the normal space."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff._checks import check_key
from jaxdiff._tree import batched, jit
from jaxdiff.denoiser import Denoiser
from jaxdiff.geometry._linalg import right_svd
from jaxdiff.predictions import Score


def largest_gap(values: Array) -> Array:
    """How many of `(n,)` decreasing values lie above the largest gap between neighbours."""
    return (jnp.argmax(values[:-1] - values[1:]) + 1).astype(jnp.int32)


class NormalBundle(eqx.Module):
    """Normal and tangent space of the data at a point.

    Attributes:
        dimension: estimated dimension of the tangent space, int32, between 1 and d - 1.
        values: singular values of the matrix of scores, decreasing, `(d,)`.
        basis: its right singular vectors, `(d, *event)`: the first d - dimension span the normal
            space, the others the tangent space.
    """

    dimension: Array
    values: Array
    basis: Array

    @jax.default_matmul_precision("highest")
    def tangent_part(self, direction: Array) -> Array:
        """The projection of a direction `(*event)` on the estimated tangent space."""
        size = self.values.shape[0]
        rows = self.basis.reshape(size, size)
        inside = jnp.where(jnp.arange(size) >= size - self.dimension, rows @ direction.ravel(), 0)
        return (inside @ rows).reshape(direction.shape).astype(direction.dtype)


@jit
def _normal_bundle(key, denoiser, x, t, cond, *, count, chunk):
    alpha, sigma = denoiser.process.alpha(t), denoiser.process.sigma(t)

    def score(k):
        noise = jax.random.normal(jax.random.fold_in(key, k), x.shape, x.dtype)
        noisy = (alpha * x + sigma * noise).astype(x.dtype)
        return denoiser.predict(Score(), noisy, t, cond).ravel()

    values, right = right_svd(batched(score, chunk)(jnp.arange(count)))
    dimension = x.size - largest_gap(values)
    return NormalBundle(dimension, values, right.reshape(-1, *x.shape))


def normal_bundle(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    x: Array,
    t: Array,
    cond: PyTree = None,
    *,
    num_perturbations: int | None = None,
    chunk: int | None = None,
) -> NormalBundle:
    """Intrinsic dimension of the data at x, from the scores of its perturbations at low noise.

        x_k = alpha x + sigma xi_k,  S = [score(x_1, t), ..., score(x_K, t)]
        dimension = d - argmax_i (sv_i(S) - sv_{i+1}(S))

    At low noise scores point to the data manifold, and d - dimension singular values of S, of
    order sqrt(K) / sigma, tower above the rest. Data of variance tau^2 along the manifold have
    sv ratios of about (tau^2 + sigma^2 / alpha^2) / (sigma^2 / alpha^2). t must be such that
    sigma / alpha is small against the spread of the data along the manifold and the radii of
    its curvature, but large against the errors of the denoiser: try several.

    Costs K evaluations, memory for K d numbers, and a decomposition of d^3: for small events.

    Args:
        key: typed PRNG key; perturbation k draws from `fold_in(key, k)`.
        denoiser: the denoiser.
        x: clean example, `(*event)`, with d = x.size >= 2.
        t: scalar time with a small sigma(t) > 0.
        cond: condition, or None.
        num_perturbations: K >= d; None for 4 d, as in the paper.
        chunk: evaluations at a time, to bound memory; None for all at once.

    Returns:
        A `NormalBundle`; all shapes are fixed, so that it runs inside jit and vmap.

    Raises:
        TypeError: if `key` is not a typed key.
        ValueError: for fewer perturbations than dimensions, or an event of one number.

    Reference: Stanczuk, Batzolis, Deveney, Schoenlieb, "Your Diffusion Model Secretly Knows the
    Dimension of the Data Manifold", 2022, arXiv 2212.12611, algorithm 1. There alpha = 1.
    """
    check_key(key)
    x = jnp.asarray(x)
    if x.size < 2:
        raise ValueError(f"`x` must hold at least two numbers to have a tangent space, got {x}.")
    count = 4 * x.size if num_perturbations is None else num_perturbations
    if count < x.size:
        raise ValueError(
            f"`num_perturbations` must be at least the size of the event, {x.size}, to span a "
            f"normal space of unknown dimension, got {count}. Pass None for {4 * x.size}."
        )
    return _normal_bundle(key, denoiser, x, t, cond, count=count, chunk=chunk)
