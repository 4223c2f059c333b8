"""Curves in the pullback metric: energy, length, curvedness, and geodesics between two points.

A curve is an array `(n + 1, *event)` of points; f maps one point to H, and differences there
measure.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxdiff._tree import jit


def lerp(start: Array, end: Array, num_steps: int) -> Array:
    """The straight line, x_i = start + (i / num_steps) (end - start).

    Args:
        start: `(*event)`.
        end: `(*event)`.
        num_steps: N >= 1.

    Returns:
        Points, `(N + 1, *event)`, both ends included.
    """
    s = jnp.linspace(0.0, 1.0, num_steps + 1, dtype=start.dtype)
    return start + jnp.tensordot(s, end - start, axes=0)


def slerp(start: Array, end: Array, num_steps: int) -> Array:
    """The arc whose direction turns evenly and whose norm changes evenly.

    [sin((1 - s) theta) a / |a| + sin(s theta) b / |b|] / sin theta, times lerp(|a|, |b|), with
    theta the angle between a and b, which must not be opposite.

    Args:
        start: a, `(*event)`.
        end: b, `(*event)`.
        num_steps: steps of the curve.

    Returns:
        `(num_steps + 1, *event)`.

    Reference: Shoemake, "Animating Rotation with Quaternion Curves", SIGGRAPH 1985. There the
    norms are 1.
    """
    s = jnp.linspace(0.0, 1.0, num_steps + 1, dtype=start.dtype)
    norms = jnp.linalg.norm(start), jnp.linalg.norm(end)
    a, b = start / norms[0], end / norms[1]
    # The half-angle form is accurate for small angles, and jnp.sinc for equal directions.
    theta = 2 * jnp.arctan2(jnp.linalg.norm(a - b), jnp.linalg.norm(a + b))
    weights = [r * jnp.sinc(r * theta / jnp.pi) / jnp.sinc(theta / jnp.pi) for r in (1 - s, s)]
    radius = norms[0] + s * (norms[1] - norms[0])
    parts = [jnp.tensordot(radius * w, v, axes=0) for w, v in zip(weights, (a, b), strict=True)]
    return parts[0] + parts[1]


def _segments(f: Callable[[Array], Array], curve: Array) -> Array:
    """f(x_{i+1}) - f(x_i), `(n, m)`."""
    h = jax.vmap(f)(curve)
    h = h.reshape(h.shape[0], -1)
    return jnp.diff(h.astype(jnp.promote_types(h.dtype, jnp.float32)), axis=0)


def curve_energy(f: Callable[[Array], Array], curve: Array) -> Array:
    """E = n / 2 sum_i ||f(x_{i+1}) - f(x_i)||^2; a differentiable loss.

    Twice the energy is at least the squared length, and equal to it at constant speed.

    Args:
        f: from one point to H.
        curve: `(n + 1, *event)`.
    """
    segments = _segments(f, curve)
    return 0.5 * segments.shape[0] * jnp.sum(segments**2)


def curve_length(f: Callable[[Array], Array], curve: Array) -> Array:
    """sum_i ||f(x_{i+1}) - f(x_i)||.

    Args:
        f: from one point to H.
        curve: `(n + 1, *event)`.
    """
    return jnp.sum(jnp.linalg.norm(_segments(f, curve), axis=1))


def curvedness(f: Callable[[Array], Array], curve: Array) -> Array:
    """1 - ||f(x_n) - f(x_0)|| / length, in [0, 1]: 0 if the curve is straight in H.

    Args:
        f: from one point to H.
        curve: `(n + 1, *event)`.

    Reference: Park, Kwon, Jo, Uh, "Unsupervised Discovery of Semantic Latent Directions in
    Diffusion Models", 2023, arXiv 2302.12469, which compares the lengths of lines and arcs; the
    ratio of chord and length is ours.
    """
    segments = _segments(f, curve)
    chord = jnp.linalg.norm(jnp.sum(segments, axis=0))
    return 1 - chord / jnp.sum(jnp.linalg.norm(segments, axis=1))


class Geodesic(eqx.Module):
    """A curve of least energy between its ends.

    Attributes:
        curve: `(n + 1, *event)`.
        energies: before each step of the optimiser, and at the end, `(num_iterations + 1,)`.
    """

    curve: Array
    energies: Array


@jit
def _geodesic(f, curve, *, optimizer, num_iterations):
    optimizer = optax.with_extra_args_support(optimizer)

    def energy(interior):
        return curve_energy(f, jnp.concatenate([curve[:1], interior, curve[-1:]]))

    def descend(carry, _):
        interior, state = carry
        value, gradient = jax.value_and_grad(energy)(interior)
        updates, state = optimizer.update(
            gradient, state, interior, value=value, grad=gradient, value_fn=energy
        )
        return (optax.apply_updates(interior, updates), state), value

    start = (curve[1:-1], optimizer.init(curve[1:-1]))
    (interior, _), energies = jax.lax.scan(descend, start, None, length=num_iterations)
    energies = jnp.append(energies, energy(interior))
    return Geodesic(jnp.concatenate([curve[:1], interior, curve[-1:]]), energies)


def geodesic(
    f: Callable[[Array], Array],
    curve: Array,
    *,
    num_iterations: int = 100,
    optimizer: optax.GradientTransformation = optax.lbfgs(),
) -> Geodesic:
    """Shorten a curve in the pullback metric of f, with its ends fixed.

    Minimises `curve_energy` over the inner points; at the minimum the speed in H is constant.

    Args:
        f: from one point to H; a pytree such as `TapFeature`, or a function.
        curve: where to start, `(n + 1, *event)`, e.g. `slerp(a, b, n)`.
        num_iterations: steps of the optimiser.
        optimizer: from Optax.

    Returns:
        A `Geodesic`.

    Raises:
        ValueError: if the curve has no inner points.

    Reference: Shao, Kumar, Fletcher, "The Riemannian Geometry of Deep Generative Models", 2017,
    arXiv 1711.08014, algorithm 1.
    """
    if curve.shape[0] < 3:
        raise ValueError(
            f"`curve` must have inner points, at least 3 in all, got {curve.shape[0]}. Use "
            "slerp(a, b, n) with n of 2 or more."
        )
    return _geodesic(f, curve, optimizer=optimizer, num_iterations=num_iterations)
