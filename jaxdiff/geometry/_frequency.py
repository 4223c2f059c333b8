"""Spatial frequencies of directions: whether an edit is coarse or fine.

Frequencies are in cycles per pixel, 0 to 1/sqrt(2) in a corner. Energies |F v|^2 are of the unitary
discrete Fourier transform over height and width, summed over channels. Rings are of width
1 / min(H, W) around its multiples.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def ring_frequencies(height: int, width: int) -> np.ndarray:
    """The middle frequency of each ring, `(K,)`, in cycles per pixel."""
    return np.arange(_rings(height, width).max() + 1) / min(height, width)


def ring_sizes(height: int, width: int) -> np.ndarray:
    """How many coefficients of the transform each ring has, `(K,)`; none is empty."""
    return np.bincount(_rings(height, width).ravel())


def ring_energy(directions: Array) -> Array:
    """Energy in each ring; over all rings it sums to ||v||^2.

    Args:
        directions: `(*, H, W, C)`.

    Returns:
        `(*, K)`, from the constant to the finest; see `ring_frequencies`.

    Raises:
        ValueError: for fewer than three axes.
    """
    energy = _energy(directions)
    rings = _rings(*energy.shape[-2:])
    return jnp.zeros((*energy.shape[:-2], rings.max() + 1), energy.dtype).at[..., rings].add(energy)


def power_spectral_density(directions: Array) -> Array:
    """Mean energy per coefficient in each ring, normalised to sum 1: flat for white noise.

    Args:
        directions: `(*, H, W, C)`, not zero; e.g. the right singular vectors at several times.

    Returns:
        `(*, K)`; see `ring_frequencies`.

    Raises:
        ValueError: for fewer than three axes.

    Reference: Park, Kwon, Choi, Jo, Uh, "Understanding the Latent Space of Diffusion Models through
    the Lens of Riemannian Geometry", 2023, arXiv 2307.12868.
    """
    energy = ring_energy(directions)
    density = energy / jnp.asarray(ring_sizes(*directions.shape[-3:-1]), energy.dtype)
    return density / jnp.sum(density, -1, keepdims=True)


def mean_frequency(directions: Array) -> Array:
    """Mean frequency under the distribution of energy: one number for how fine a direction is.

    White noise has 0.383 on large images.

    Args:
        directions: `(*, H, W, C)`, not zero.

    Returns:
        `(*)`, in cycles per pixel.

    Raises:
        ValueError: for fewer than three axes.
    """
    energy = _energy(directions)
    radius = jnp.asarray(_radius(*energy.shape[-2:]), energy.dtype)
    return jnp.sum(energy * radius, (-2, -1)) / jnp.sum(energy, (-2, -1))


def low_frequency_fraction(directions: Array, cut: Array) -> Array:
    """Fraction of energy at frequencies below a cut.

    Args:
        directions: `(*, H, W, C)`, not zero.
        cut: scalar frequency, in cycles per pixel; itself not included.

    Returns:
        `(*)`, in [0, 1].

    Raises:
        ValueError: for fewer than three axes.
    """
    energy = _energy(directions)
    below = jnp.asarray(_radius(*energy.shape[-2:]), energy.dtype) < cut
    return jnp.sum(energy * below, (-2, -1)) / jnp.sum(energy, (-2, -1))


def _energy(directions: Array) -> Array:
    """`(*, H, W, C)` to `(*, H, W)`."""
    if directions.ndim < 3:
        raise ValueError(
            f"`directions` must be images, (*, H, W, C), got shape {directions.shape}. Flat "
            "activations have no spatial frequencies."
        )
    images = directions.astype(jnp.promote_types(jnp.float32, directions.dtype))
    coefficients = jnp.fft.fft2(images, axes=(-3, -2), norm="ortho")
    return jnp.sum(jnp.real(coefficients) ** 2 + jnp.imag(coefficients) ** 2, -1)


def _radius(height: int, width: int) -> np.ndarray:
    return np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))


def _rings(height: int, width: int) -> np.ndarray:
    """Index of the ring of each coefficient. Nearest neighbours differ by one ring at most."""
    return np.floor(_radius(height, width) * min(height, width) + 0.5).astype(int)
