"""Singular value decomposition of latent codes, channel by channel."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array


class ChannelSVD(eqx.Module):
    """x[:, :, c] = U_c diag(S_c) V_c^T for every channel c.

    Attributes:
        left: U, orthonormal columns, `(C, H, k)`, k = min(H, W).
        values: S, decreasing, `(C, k)`.
        right: V, orthonormal columns, `(C, W, k)`.
    """

    left: Array
    values: Array
    right: Array

    @jax.default_matmul_precision("highest")
    def compose(self) -> Array:
        """The latent that these parts make, `(H, W, C)`."""
        return jnp.einsum("chk,ck,cwk->hwc", self.left, self.values, self.right)


def channel_svd(x: Array) -> ChannelSVD:
    """The singular value decomposition of every channel of a latent.

    Signs of pairs (u, v) are such that the largest entry of each u is positive.

    Args:
        x: `(H, W, C)`.

    Returns:
        A `ChannelSVD`.

    Raises:
        ValueError: if x is not a single image.

    Reference: Wang, Gao, Li, Wang, Yang, Clifton, Xiao, "Exploring the Latent Space of Diffusion
    Models Directly through Singular Value Decomposition", 2025, arXiv 2502.02225.
    """
    _check_image(x, "x")
    left, values, right = jnp.linalg.svd(jnp.moveaxis(x, -1, 0), full_matrices=False)
    largest = jnp.argmax(jnp.abs(left), axis=1, keepdims=True)
    signs = jnp.where(jnp.take_along_axis(left, largest, 1) < 0, -1, 1).astype(x.dtype)
    return ChannelSVD(signs * left, values, signs * right.mT)


def channel_singular_values(x: Array) -> Array:
    """Singular values of every channel, decreasing.

    Args:
        x: `(..., H, W, C)`; a trajectory, as in `Trajectory.x`, is a leading axis.

    Returns:
        `(..., C, min(H, W))`.
    """
    return jnp.linalg.svd(jnp.moveaxis(x, -1, -3), compute_uv=False)


def noise_edges(height: int, width: int, std: Array | float = 1.0) -> tuple[Array, Array]:
    """Where the singular values of pure noise end, for large images.

    std |sqrt(H) -+ sqrt(W)|: values above the upper edge are signal.

    Args:
        height: H.
        width: W.
        std: standard deviation of an entry, e.g. sigma(t).

    Returns:
        The lower and the upper edge.

    Reference: Marchenko, Pastur, "Distribution of Eigenvalues for Some Sets of Random Matrices",
    1967.
    """
    return std * abs(height**0.5 - width**0.5), std * (height**0.5 + width**0.5)


def svd_swap(x: Array, y: Array, parts: str, k: int | None = None) -> Array:
    """x with some of the leading singular vectors or values of y in place of its own.

    Singular vectors have arbitrary signs, and come in pairs. Those of each pair of y are chosen
    such that <u_x, u_y> + <v_x, v_y> >= 0; the result does not depend on the decomposition's
    signs, and where x = y it is x.

    Args:
        x: the latent that is changed, `(H, W, C)`.
        y: the latent that parts are taken from, `(H, W, C)`.
        parts: which: any of the letters U, S and V, e.g. "S" or "UV".
        k: how many leading triplets are touched, for all channels; None for all.

    Returns:
        `(H, W, C)`. The other direction of an exchange is `svd_swap(y, x, parts, k)`.

    Raises:
        ValueError: for latents of different shapes, other letters, or k out of range.

    Reference: Wang, Gao, Li, Wang, Yang, Clifton, Xiao, "Exploring the Latent Space of Diffusion
    Models Directly through Singular Value Decomposition", 2025, arXiv 2502.02225. The
    choice of signs is ours.
    """
    _check_image(x, "x")
    if x.shape != y.shape:
        raise ValueError(f"`y` must have the shape of `x`, {x.shape}, got {y.shape}.")
    if not parts or set(parts) - set("USV"):
        raise ValueError(f"`parts` must consist of the letters U, S and V, got {parts!r}.")
    size = min(x.shape[:2])
    k = size if k is None else k
    if not 1 <= k <= size:
        raise ValueError(f"`k` must lie between 1 and min(H, W) = {size}, got {k}.")
    kept, taken = channel_svd(x), channel_svd(y)
    agreement = jnp.sum(kept.left * taken.left, 1) + jnp.sum(kept.right * taken.right, 1)
    signs = jnp.where(agreement < 0, -1, 1).astype(x.dtype)[:, None]

    def choose(name, old, new):
        return old.at[..., :k].set(new[..., :k]) if name in parts else old

    return ChannelSVD(
        choose("U", kept.left, signs * taken.left),
        choose("S", kept.values, taken.values),
        choose("V", kept.right, signs * taken.right),
    ).compose()


def _check_image(x: Array, argument: str) -> None:
    if x.ndim != 3:
        raise ValueError(
            f"`{argument}` must be one latent (H, W, C), got shape {x.shape}. Use jax.vmap for a "
            "batch."
        )
