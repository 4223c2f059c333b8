"""Densities on the plane, as pure samplers.

Point i is drawn from `fold_in(key, i)`, whatever the number of points. The shapes are those of
Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud, "FFJORD: Free-Form Continuous Dynamics for
Scalable Reversible Generative Models", 2018, arXiv 1810.01367, section 4.1, and earlier work; the
sizes are ours, such that each coordinate has a standard deviation near one, and every mean but
the roll's is zero.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import random
from jaxtyping import Array, Float, PRNGKeyArray

from jaxdiff._checks import check_key


def _draw(point: Callable, key: PRNGKeyArray, n: int) -> Array:
    check_key(key)
    return jax.vmap(lambda i: point(random.fold_in(key, i)))(jnp.arange(n))


def _polar(radius: Array | float, angle: Array) -> Array:
    return radius * jnp.stack([jnp.cos(angle), jnp.sin(angle)])


def two_moons(key: PRNGKeyArray, n: int, *, noise: float = 0.05) -> Float[Array, "{n} 2"]:
    """Two interleaved half circles of radius 1.

    +/-(cos a - 1/2, sin a - 1/4) + noise * eps, with a uniform on [0, pi] and either sign equally
    likely: `sklearn.datasets.make_moons`, centred.

    Args:
        key: typed PRNG key.
        n: number of points.
        noise: standard deviation of the Gaussian noise.

    Returns:
        (n, 2) points.
    """

    def point(key):
        sign_key, angle_key, noise_key = random.split(key, 3)
        moon = _polar(1.0, random.uniform(angle_key, maxval=jnp.pi)) - jnp.array([0.5, 0.25])
        return random.rademacher(sign_key, ()) * moon + noise * random.normal(noise_key, (2,))

    return _draw(point, key, n)


def swiss_roll(key: PRNGKeyArray, n: int, *, noise: float = 0.05) -> Float[Array, "{n} 2"]:
    """A spiral of one and a half turns.

    (a cos a, a sin a) / 7 + noise * eps, with a uniform on [3 pi / 2, 9 pi / 2]: a plane section
    of `sklearn.datasets.make_swiss_roll`.

    Args:
        key: typed PRNG key.
        n: number of points.
        noise: standard deviation of the Gaussian noise.

    Returns:
        (n, 2) points.
    """

    def point(key):
        angle_key, noise_key = random.split(key)
        angle = random.uniform(angle_key, minval=1.5 * jnp.pi, maxval=4.5 * jnp.pi)
        return _polar(angle / 7, angle) + noise * random.normal(noise_key, (2,))

    return _draw(point, key, n)


def checkerboard(key: PRNGKeyArray, n: int) -> Float[Array, "{n} 2"]:
    """Uniform on the eight squares of [-2, 2]^2 where floor(x1) + floor(x2) is even.

    Args:
        key: typed PRNG key.
        n: number of points.

    Returns:
        (n, 2) points.
    """

    def point(key):
        column_key, row_key, place_key = random.split(key, 3)
        column = random.randint(column_key, (), -2, 2)
        row = 2 * random.randint(row_key, (), -1, 1) + column % 2
        return jnp.stack([column, row]) + random.uniform(place_key, (2,))

    return _draw(point, key, n)


def eight_gaussians(key: PRNGKeyArray, n: int, *, noise: float = 0.1) -> Float[Array, "{n} 2"]:
    """Eight equally likely Gaussians, with means at equal angles on a circle of radius sqrt(2).

    Args:
        key: typed PRNG key.
        n: number of points.
        noise: standard deviation of each.

    Returns:
        (n, 2) points.
    """

    def point(key):
        mode_key, noise_key = random.split(key)
        angle = random.randint(mode_key, (), 0, 8) * (jnp.pi / 4)
        return _polar(2**0.5, angle) + noise * random.normal(noise_key, (2,))

    return _draw(point, key, n)


def rings(key: PRNGKeyArray, n: int, *, noise: float = 0.05) -> Float[Array, "{n} 2"]:
    """Four equally likely concentric circles of radius 1/2, 1, 3/2 and 2.

    Args:
        key: typed PRNG key.
        n: number of points.
        noise: standard deviation of the Gaussian noise.

    Returns:
        (n, 2) points.
    """

    def point(key):
        ring_key, angle_key, noise_key = random.split(key, 3)
        radius = random.randint(ring_key, (), 1, 5) / 2
        angle = random.uniform(angle_key, maxval=2 * jnp.pi)
        return _polar(radius, angle) + noise * random.normal(noise_key, (2,))

    return _draw(point, key, n)
