"""Curves: lengths, energies, curvedness and geodesics in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.geometry import curve_energy, curve_length, curvedness, geodesic, lerp, slerp


def circle(x):
    return jnp.concatenate([jnp.cos(x), jnp.sin(x)])


def sphere(x):
    """Longitude and latitude to a point of the unit sphere."""
    longitude, latitude = x
    cos = jnp.cos(latitude)
    return jnp.stack([cos * jnp.cos(longitude), cos * jnp.sin(longitude), jnp.sin(latitude)])


def test_lines_are_straight_under_linear_maps(x64):
    matrix = jax.random.normal(jax.random.key(0), (5, 3))
    curve = lerp(jnp.zeros(3), jnp.asarray([1.0, -2, 0.5]), 7)
    np.testing.assert_allclose(curvedness(lambda x: matrix @ x, curve), 0, atol=1e-14)
    length = curve_length(lambda x: matrix @ x, curve)
    np.testing.assert_allclose(length, jnp.linalg.norm(matrix @ curve[-1]))
    np.testing.assert_allclose(curve_energy(lambda x: matrix @ x, curve), length**2 / 2)


@pytest.mark.parametrize("angle", [0.3, 2.0])
def test_arcs(x64, angle):
    fine = lerp(jnp.zeros(1), jnp.full(1, angle), 4000)
    expected = 1 - 2 * np.sin(angle / 2) / angle
    np.testing.assert_allclose(curvedness(circle, fine), expected, rtol=1e-5)
    np.testing.assert_allclose(curve_length(circle, fine), angle, rtol=1e-7)
    uneven = fine[::40].at[1:-1].add(0.002)
    assert curve_energy(circle, uneven) > curve_length(circle, uneven) ** 2 / 2 + 1e-5


def test_slerp(x64):
    a, b = jnp.asarray([2.0, 0, 0]), jnp.asarray([0, 4.0, 0])
    curve = slerp(a, b, 6)
    turns = np.arange(7) / 6
    np.testing.assert_allclose(jnp.linalg.norm(curve, axis=1), 2 + 2 * turns)
    np.testing.assert_allclose(jnp.arctan2(curve[:, 1], curve[:, 0]), turns * np.pi / 2)
    np.testing.assert_allclose(slerp(a, 3 * a, 2)[1], 2 * a)  # parallel ends
    images = slerp(jnp.ones((2, 2, 1)), -jnp.arange(4.0).reshape(2, 2, 1), 3)
    assert images.shape == (4, 2, 2, 1)
    np.testing.assert_allclose(images[-1], -jnp.arange(4.0).reshape(2, 2, 1), atol=1e-15)


def test_geodesics_of_the_sphere_are_great_circles(x64):
    start, end, n = jnp.asarray([-1.0, 0.6]), jnp.asarray([1.2, 0.9]), 12
    line = lerp(start, end, n)
    found = geodesic(sphere, line, num_iterations=60)
    distance = np.arccos(sphere(start) @ sphere(end))
    chord = 2 * np.sin(distance / (2 * n))
    np.testing.assert_allclose(curve_length(sphere, found.curve), n * chord, rtol=1e-6)
    np.testing.assert_allclose(found.energies[-1], (n * chord) ** 2 / 2, rtol=1e-6)
    assert curve_length(sphere, line) > 1.05 * n * chord
    speeds = np.linalg.norm(np.diff(jax.vmap(sphere)(found.curve), axis=0), axis=1)
    np.testing.assert_allclose(speeds, chord, rtol=1e-3)
    normal = np.cross(sphere(start), sphere(end))
    np.testing.assert_allclose(jax.vmap(sphere)(found.curve) @ normal, 0, atol=1e-4)
    np.testing.assert_array_equal(found.curve[jnp.asarray([0, -1])], line[jnp.asarray([0, -1])])
    assert np.all(np.diff(found.energies) < 1e-12)


def test_bad_input():
    with pytest.raises(
        ValueError, match="`curve` must have inner points, at least 3 in all, got 2"
    ):
        geodesic(circle, lerp(jnp.zeros(1), jnp.ones(1), 1))
