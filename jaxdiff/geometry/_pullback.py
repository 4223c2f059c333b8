"""The pullback metric: local bases, edits along them, transport and shooting.

An inner activation h = f_t(x) gives its input the metric of its own space: the length of v at x is
||J v||, with J = dh/dx. The right singular vectors of J are the directions that move h the most
(the local latent basis), the left ones span the tangent space of what h can do (the tangent basis).

Reference: Park, Kwon, Choi, Jo, Uh, "Understanding the Latent Space of Diffusion Models through
the Lens of Riemannian Geometry", 2023, arXiv 2307.12868.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxdiff._tree import jit
from jaxdiff.denoiser import Denoiser
from jaxdiff.geometry._features import TapFeature
from jaxdiff.geometry._jacobian import Jacobian
from jaxdiff.geometry._ritz import GolubKahanLanczos, SpectralMethod, SubspaceIteration
from jaxdiff.geometry._spectrum import Spectrum, jacobian_svd
from jaxdiff.predictions import Eps


def local_basis(
    key: PRNGKeyArray,
    denoiser: Denoiser,
    x: Array,
    t: Array,
    rank: int,
    *,
    cond: PyTree = None,
    tap: str = "mid",
    method: SpectralMethod = GolubKahanLanczos(),
    start: Array | None = None,
    mask: Array | None = None,
    chunk: int | None = None,
) -> Spectrum:
    """Local latent basis (`right`) and tangent basis (`left`) of the pullback metric at x.

    `jacobian_svd` of `TapFeature(denoiser, t, cond, tap)`; call that for its further options.

    Args:
        key: typed PRNG key.
        denoiser: a network's denoiser, or guidance and other maps of one.
        x: the noisy example, `(*event)`.
        t: scalar time.
        rank: how many directions.
        cond: condition, or None.
        tap: the activation; "mid" is the h-space of a UNet.
        method: as in `jacobian_svd`.
        start: as in `jacobian_svd`, `(*, *event)`.
        mask: as in `jacobian_svd`, broadcastable to x; zeros keep a region as it is.
        chunk: as in `jacobian_svd`.

    Returns:
        A `Spectrum`.

    Raises:
        TypeError: if the denoiser has no network.
        ValueError: if the network has no such tap (lists those it has), or as `jacobian_svd`.

    Reference: Park et al., 2023, arXiv 2307.12868.
    """
    feature = TapFeature(denoiser, jnp.asarray(t, x.dtype), cond, (tap,))
    return jacobian_svd(key, feature, x, rank, method=method, start=start, mask=mask, chunk=chunk)


@jit
def _x_space_guidance(denoiser, x, t, cond, direction, *, scale, step, num_steps):
    def eps(x):
        return denoiser.predict(Eps(), x, t, cond)

    def move(x, _):
        ahead, here = jax.vmap(eps)(jnp.stack([x + step * direction, x]))
        x = x + scale * (ahead - here)
        return x, x

    return jnp.concatenate([x[None], jax.lax.scan(move, x, None, length=num_steps)[1]])


def x_space_guidance(
    denoiser: Denoiser,
    x: Array,
    t: Array,
    direction: Array,
    *,
    cond: PyTree = None,
    scale: float = 0.1,
    step: float = 1.0,
    num_steps: int = 16,
) -> Array:
    """Edit a noisy example at one time, by what a move along a direction does to the noise in it.

    x <- x + scale [eps_hat(x + step v) - eps_hat(x)], over and over. Unlike x + delta v
    (`straight_edit`) the change has passed through the network, which keeps x typical.

    Args:
        denoiser: the denoiser.
        x: the noisy example, `(*event)`.
        t: scalar time with sigma > 0.
        direction: v, a unit vector `(*event)` such as a right vector of `local_basis`, or minus it.
        cond: condition of both evaluations.
        scale: size of a move; 0.1 for models of pixels, 1 for latent ones.
        step: how far ahead the network looks.
        num_steps: how many moves.

    Returns:
        All states from x on, `(num_steps + 1, *event)`; `denoise` them from t.

    Raises:
        ValueError: if the direction's shape is not that of x.

    Reference: Park et al., 2023, arXiv 2307.12868. v stays that of the
    starting point, as in the published code.
    """
    _check_direction(direction, x)
    return _x_space_guidance(
        denoiser, x, t, cond, direction, scale=scale, step=step, num_steps=num_steps
    )


def straight_edit(x: Array, direction: Array, distances: Array) -> Array:
    """x + delta v for every delta: the naive edit, which leaves the typical set.

    Args:
        x: the noisy example, `(*event)`.
        direction: v, `(*event)`.
        distances: delta, `(n,)`.

    Returns:
        `(n, *event)`.

    Raises:
        ValueError: if the direction's shape is not that of x.
    """
    _check_direction(direction, x)
    return x + jnp.tensordot(jnp.asarray(distances, x.dtype), direction, axes=0)


def _check_direction(direction: Array, x: Array) -> None:
    if direction.shape != x.shape:
        raise ValueError(
            f"`direction` must have the shape of `x`, {x.shape}, got {direction.shape}. Take one "
            "vector of a basis, e.g. spectrum.right[0]."
        )


def _inner(basis: PyTree, vector: PyTree) -> Array:
    """Products of the r vectors of a basis with one vector, `(r,)`."""
    products = jax.tree.map(
        lambda b, v: (
            b.reshape(b.shape[0], -1).astype(jnp.promote_types(b.dtype, jnp.float32))
            @ v.reshape(-1)
        ),
        basis,
        vector,
    )
    return functools.reduce(jnp.add, jax.tree.leaves(products))


def _combine(weights: Array, basis: PyTree) -> PyTree:
    """sum_i weights_i b_i."""
    return jax.tree.map(lambda b: jnp.tensordot(weights.astype(b.dtype), b, axes=1), basis)


@jax.default_matmul_precision("highest")
def parallel_transport(tangent: PyTree, target: Spectrum, *, power: float = 0.0) -> PyTree:
    """The direction in X at another point that does there what a tangent vector says.

    v = V diag(sigma^-power) U^T u, normalised to length 1. With the right power the move is
    that of u: J v is proportional to U U^T u for power 1, the projection of u, which amplifies
    directions of small sigma. For power 0 the coefficients of u are used as those of v.

    Args:
        tangent: u, a vector in H (a pytree like f(x)), such as `left[k]` of another point.
        target: spectrum at the point to go to, of the same f.
        power: 0 as in the published code, 1 for the pullback of u; anything between.

    Returns:
        v, a pytree like x, of length 1.

    Reference: Park et al., 2023, arXiv 2307.12868, which has no sigma (power 0).
    """
    weights = _inner(target.left, tangent) * target.values**-power
    return _combine(weights / jnp.linalg.norm(weights), target.right)


class Transport(NamedTuple):
    """The first K directions of one point at another one, and how they move h there.

    Attributes:
        directions: kind -> unit vectors in X, `(K, *event)`.
        cosines: kind -> cosines in H of their moves J v with the carried u, `(K,)`.
        lengths: of the projections of u on the tangent space there, `(K,)`: the largest cosine
            that a direction in the span of the target's spectrum can have.
    """

    directions: dict[str, Array]
    cosines: dict[str, Array]
    lengths: Array


@jax.default_matmul_precision("highest")
def compare_transport(
    f: Callable[[Array], Array],
    x: Float[Array, "*event"],
    source: Spectrum,
    target: Spectrum,
    num_directions: int,
) -> Transport:
    """Carry the first directions of one point to another in several ways, and compare them.

    A direction v does at x what u = `source.left[k]` says if J v points along u. The ways are
    "own_direction", the target's own v_k with the sign of u; "unchanged", the source's v_k as it
    is; and "transport" and "pullback", `parallel_transport` with the powers 0 and 1, of which the
    latter is the best in the span of the target's spectrum.

    Args:
        f: x -> h, arrays both.
        x: the point to go to, `(*event)`.
        source: spectrum of df/dx at the point that the directions come from.
        target: that at x, of the same rank.
        num_directions: K, at most the rank.

    Returns:
        A `Transport`. It costs 4 K products with the Jacobian.

    Reference: Park et al., 2023, arXiv 2307.12868, whose figures show the edits that
    the directions make; the cosines are ours.
    """
    left = target.left.reshape(len(target.values), -1)

    def one(k, tangent, unchanged, own):
        inner = left @ tangent.ravel()
        found = {
            "own_direction": own * jnp.where(jnp.take(inner, k) < 0, -1, 1),
            "unchanged": unchanged,
            "transport": parallel_transport(tangent, target, power=0.0),
            "pullback": parallel_transport(tangent, target, power=1.0),
        }
        # Products, because the unchanged direction is not in the span of the target's.
        rows = jnp.stack([v.ravel() for v in found.values()])
        moves = Jacobian(f, x).forward(rows.T).T
        cosines = moves @ tangent.ravel() / jnp.linalg.norm(moves, axis=1)
        return found, dict(zip(found, cosines, strict=True)), jnp.linalg.norm(inner)

    first = (source.left, source.right, target.right)
    rows = (jnp.asarray(part)[:num_directions] for part in first)
    return Transport(*jax.vmap(one)(jnp.arange(num_directions), *rows))


@jit
def _shoot(key, f, x, tangent, first, *, distance, power, method, rank, num_steps, chunk):
    def move(carry, i):
        x, tangent, spectrum = carry
        direction = parallel_transport(tangent, spectrum, power=power)
        x = jax.tree.map(lambda x, v: x + distance * v, x, direction)
        spectrum = jacobian_svd(
            jax.random.fold_in(key, i),
            f,
            x,
            rank,
            method=method,
            start=spectrum.right,
            chunk=chunk,
        )
        weights = _inner(spectrum.left, tangent)
        tangent = _combine(weights / jnp.linalg.norm(weights), spectrum.left)
        return (x, tangent, spectrum), (x, tangent, spectrum.products)

    path = jax.lax.scan(move, (x, tangent, first), jnp.arange(num_steps))[1]
    start = (x, tangent, first.products)
    return jax.tree.map(lambda a, rest: jnp.concatenate([a[None], rest]), start, path)


def geodesic_shooting(
    key: PRNGKeyArray,
    f: Callable[[PyTree], PyTree],
    x: PyTree,
    start: Spectrum,
    tangent: PyTree,
    *,
    distance: float,
    num_steps: int,
    power: float = 1.0,
    method: SpectralMethod = SubspaceIteration(),
    chunk: int | None = None,
) -> tuple[PyTree, PyTree, Array]:
    """Walk straight on in H: move, carry the tangent vector to the new tangent space, repeat.

        v = V diag(sigma^-power) U^T u / |.|;  x <- x + distance v;
        U, V <- bases at the new x, from the old ones;  u <- U U^T u / |.|

    Projecting u is parallel transport along the path as distance -> 0, so that for power 1 the
    path is a geodesic of the image of f.

    Args:
        key: typed PRNG key.
        f: from x to H, as in `jacobian_svd`.
        x: where to start, `(*event)` or a pytree.
        start: spectrum of f at x; its rank is that of the whole walk.
        tangent: u, the direction in H to start with, such as `start.left[k]`.
        distance: length of a step in X.
        num_steps: how many.
        power: as in `parallel_transport`; 0 is that of the publications.
        method: how the bases are found again; from the old ones a few iterations will do.
        chunk: products at a time.

    Returns:
        All x, `(num_steps + 1, *event)`; all u, likewise; and the products spent at each,
        `(num_steps + 1,)`.

    Reference: Park, Kwon, Jo, Uh, "Unsupervised Discovery of Semantic Latent Directions in
    Diffusion Models", 2023, arXiv 2302.12469 (power 0).
    """
    return _shoot(
        key, f, x, tangent, start, distance=distance, power=power, method=method,
        rank=start.values.shape[0], num_steps=num_steps, chunk=chunk,
    )  # fmt: skip
