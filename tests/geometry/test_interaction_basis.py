import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.geometry._interaction_basis import (
    interaction_bases,
    interaction_edges,
    layer_activations,
)

RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(60, 3, 2)) * [[1.0, 2.0]] + 0.5


class Affine(eqx.Module):
    matrix: jax.Array
    offset: jax.Array

    def __call__(self, h):
        return self.matrix @ h.reshape(-1) + self.offset


class Tanh(eqx.Module):
    """tanh(W h + b) behind a linear change of coordinates, and in front of one."""

    matrix: jax.Array
    offset: jax.Array
    before: jax.Array
    after: jax.Array

    def __call__(self, h):
        return self.after @ jnp.tanh(self.matrix @ (self.before @ h.reshape(-1)) + self.offset)


def affine_layers():
    sizes = [6, 5, 6, 4]
    return [
        Affine(jnp.asarray(RNG.normal(size=(b, a))), jnp.asarray(RNG.normal(size=b)))
        for a, b in zip(sizes[:-1], sizes[1:], strict=True)
    ]


def tanh_layers(change=None):
    """Two layers; `change` writes the activations between them in other coordinates."""
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(5, 6)) * 0.5, rng.normal(size=(4, 5)) * 0.5
    change = np.eye(5) if change is None else change
    eye = jnp.eye(6)
    return [
        Tanh(jnp.asarray(first), jnp.full(5, 0.1), eye, jnp.asarray(change)),
        Tanh(
            jnp.asarray(second), jnp.full(4, -0.2), jnp.asarray(np.linalg.inv(change)), jnp.eye(4)
        ),
    ]


def test_linear_layers_interact_one_to_one(x64):
    layers, inputs = affine_layers(), jnp.asarray(INPUTS)
    bases = interaction_bases(layers, inputs)
    # Only what reaches the output through every layer is left.
    assert [int(basis.rank) for basis in bases] == [4, 4, 4, 4]
    output = np.asarray(layer_activations(layers, inputs)[-1])
    spectrum = np.linalg.eigvalsh(np.cov(output.T, bias=True))[::-1]
    for basis in bases:
        np.testing.assert_allclose(basis.importance[:4], spectrum, rtol=1e-9)
        np.testing.assert_array_equal(basis.importance[4:], 0)
    for edges in interaction_edges(layers, inputs, bases):
        np.testing.assert_allclose(edges[:4, :4], np.eye(4), atol=1e-9)
        np.testing.assert_allclose(edges[4:], 0, atol=1e-9)


def test_coordinates_do_not_depend_on_how_a_layer_is_written(x64):
    change = RNG.normal(size=(5, 5)) + 2 * np.eye(5)
    inputs, found = jnp.asarray(INPUTS), []
    for layers in (tanh_layers(), tanh_layers(change)):
        bases = interaction_bases(layers, inputs)
        hidden = layer_activations(layers, inputs)
        coordinates = [jax.vmap(b)(h) for b, h in zip(bases, hidden, strict=True)]
        found.append((coordinates, interaction_edges(layers, inputs, bases)))
    for plain, changed in zip(*found, strict=True):
        for a, b in zip(plain, changed, strict=True):
            np.testing.assert_allclose(jnp.abs(a), jnp.abs(b), atol=1e-8)


def test_coordinates_are_uncorrelated_and_move_the_next_orthogonally(x64):
    layers, inputs = tanh_layers(), jnp.asarray(INPUTS)
    bases = interaction_bases(layers, inputs)
    hidden = layer_activations(layers, inputs)
    for basis, h in zip(bases, hidden, strict=True):
        coordinates = jax.vmap(basis)(h)
        np.testing.assert_allclose(
            np.cov(coordinates.T, bias=True), np.diag(basis.importance), atol=1e-10
        )
    for layer, h, below, above in zip(layers, hidden[:-1], bases[:-1], bases[1:], strict=True):
        shape = h.shape[1:]

        def carried(y, layer=layer, below=below, above=above, shape=shape):
            return above(layer(below.restore(y, shape)))

        jacobians = jax.vmap(jax.jacfwd(carried))(jax.vmap(below)(h))
        metric = jnp.mean(jacobians.mT @ jacobians, 0)
        kept = np.diag(np.where(below.importance > 0, 1.0, 0.0))
        np.testing.assert_allclose(metric, kept, atol=1e-8)


def test_what_is_dropped_does_not_matter():
    """A unit that nothing reads, and one that repeats another."""
    inputs = jnp.asarray(INPUTS, jnp.float32)
    first = RNG.normal(size=(6, 6))
    first[4] = first[3]
    second = RNG.normal(size=(3, 6))
    second[:, 5] = 0
    layers = [
        Affine(jnp.asarray(first, jnp.float32), jnp.zeros(6)),
        lambda h: jnp.tanh(0.3 * h),
        Affine(jnp.asarray(second, jnp.float32), jnp.zeros(3)),
    ]
    bases = interaction_bases(layers, inputs, importance_threshold=1e-4)
    assert bases[2].matrix.dtype == jnp.float32
    assert int(bases[2].rank) == 3 and int(bases[1].rank) <= 5
    hidden = layer_activations(layers, inputs)
    restored = jax.vmap(lambda h: bases[2].restore(bases[2](h), h.shape))(hidden[2])
    np.testing.assert_allclose(jax.vmap(layers[2])(restored), hidden[3], atol=1e-4)
    assert jnp.abs(restored - hidden[2]).max() > 0.1


def test_bad_numbers_of_layers_are_refused():
    with pytest.raises(ValueError, match="layers"):
        interaction_bases([], jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="one more"):
        interaction_edges([jnp.tanh], jnp.zeros((2, 3)), [])
