"""The local interaction basis: coordinates of each layer in which layers interact sparsely.

A fit on data. Matrices of the size of a layer are formed: meant for layers of up to about a
thousand numbers, such as pooled activations or small networks.
"""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxdiff._tree import jit
from jaxdiff.geometry._linalg import canonical_signs

Layer = Callable[[Array], Array]


class InteractionBasis(eqx.Module):
    """Coordinates of one layer's activations, in order of importance.

    Coordinates that were dropped are kept as zeros, so that shapes do not depend on the data.

    Attributes:
        mean: of the flattened activations, `(d,)`.
        matrix: C, `(d, d)`; the coordinates of h are C (h - mean).
        inverse: `(d, d)`; `mean + inverse @ coordinates` is h without what was dropped.
        importance: variance of each coordinate, `(d,)`, decreasing. Below the last layer it is the
            variance that reaches the next layer's coordinates, to first order; 0 if dropped.
    """

    mean: Array
    matrix: Array
    inverse: Array
    importance: Array

    @property
    def rank(self) -> Array:
        """How many coordinates are left."""
        return jnp.sum(self.importance > 0)

    @jax.default_matmul_precision("highest")
    def __call__(self, h: Array) -> Array:
        """Coordinates `(d,)` of one activation `(*shape)`."""
        return self.matrix @ (h.reshape(-1) - self.mean)

    @jax.default_matmul_precision("highest")
    def restore(self, coordinates: Array, shape: tuple[int, ...]) -> Array:
        """The activation `(*shape)` of coordinates `(d,)`."""
        return (self.mean + self.inverse @ coordinates).reshape(shape)


def layer_activations(layers: Sequence[Layer], inputs: Array) -> list[Array]:
    """Activations before, between and after the layers.

    Args:
        layers: L functions f_l: h_l -> h_{l+1} of one example.
        inputs: h_0, `(N, *shape)`.

    Returns:
        L + 1 arrays, h_0 to h_L, `(N, *shape of the layer)`.
    """
    activations = [inputs]
    for layer in layers:
        activations.append(jax.vmap(layer)(activations[-1]))
    return activations


@jit
@jax.default_matmul_precision("highest")
def _interaction_bases(layers, inputs, variance_threshold, importance_threshold):
    activations = layer_activations(layers, inputs)
    means, roots, inverse_roots, variances = zip(
        *(_whitening(h, variance_threshold) for h in activations), strict=True
    )
    # The output has no layer after it: its principal components, not rescaled.
    rows = canonical_signs((inverse_roots[-1] * jnp.sqrt(variances[-1])).T)
    bases = [InteractionBasis(means[-1], rows, rows.T, variances[-1])]
    for index in reversed(range(len(layers))):
        metric = _mean_metric(layers[index], activations[index], bases[0].matrix)
        root, inverse_root = roots[index], inverse_roots[index]
        importance, vectors = _descending(root.T @ metric @ root, importance_threshold)
        kept = importance > 0
        scale = jnp.sqrt(importance)
        rows = scale[:, None] * (inverse_root @ vectors).T
        signs = jnp.where(jnp.sum(canonical_signs(rows) * rows, 1) < 0, -1, 1).astype(rows.dtype)
        inverse = (root @ vectors) * jnp.where(kept, 1 / jnp.where(kept, scale, 1), 0)
        basis = InteractionBasis(means[index], signs[:, None] * rows, signs * inverse, importance)
        bases.insert(0, basis)
    return bases


def interaction_bases(
    layers: Sequence[Layer],
    inputs: Array,
    *,
    variance_threshold: float = 1e-5,
    importance_threshold: float = 1e-5,
) -> list[InteractionBasis]:
    """Coordinates of every layer, from the output back to the input.

    With G = U D U^T the covariance of h_l, small D dropped, h_l = mean + U D^{1/2} y for white y.
    With C' the coordinates of the next layer and J = d(C' h_{l+1}) / d h_l,

        M = D^{1/2} U^T E[J^T J] U D^{1/2} = V Lambda V^T,    small Lambda dropped,
        C = Lambda^{1/2} V^T D^{-1/2} U^T.

    The coordinates are uncorrelated, with variances Lambda, and move the next layer's in orthogonal
    ways on average. They do not change, up to signs, when the layer is written in other linear
    coordinates. Between linear layers each coordinate feeds exactly one.

    Args:
        layers: L functions f_l: h_l -> h_{l+1} of one example.
        inputs: h_0, `(N, *shape)`.
        variance_threshold: directions whose variance is below this fraction of the layer's
            largest are dropped.
        importance_threshold: likewise for Lambda.

    Returns:
        L + 1 bases, of h_0 to h_L. That of h_L are its principal components.

    Raises:
        ValueError: if there is no layer.

    Reference: Bushnaq, Heimersheim, Goldowsky-Dill, Braun, Mendel, Haenni, Griffin, Stoehler,
    Wache, Hobbhahn, "The Local Interaction Basis: Identifying Computationally-Relevant and Sparsely
    Interacting Features in Neural Networks", 2024, arXiv 2405.10928; by Jacobians, about the mean,
    and with thresholds relative to the largest value.
    """
    if not layers:
        raise ValueError("`layers` must hold at least one function h_l -> h_{l+1}, got none.")
    return _interaction_bases(tuple(layers), inputs, variance_threshold, importance_threshold)


@jit
def _interaction_edges(layers, inputs, bases):
    activations = layer_activations(layers, inputs)
    steps = zip(layers, activations[:-1], bases[:-1], bases[1:], strict=True)

    def edge(layer, below, above):
        return lambda h: jnp.abs(_rows_of_jacobian(layer, h, above.matrix) @ below.inverse)

    return [_mean(edge(layer, below, above), h) for layer, h, below, above in steps]


def interaction_edges(
    layers: Sequence[Layer], inputs: Array, bases: Sequence[InteractionBasis]
) -> list[Array]:
    """E |d (coordinate i of h_{l+1}) / d (coordinate j of h_l)|: how strongly they interact.

    Args:
        layers: as in `interaction_bases`.
        inputs: `(N, *shape)`.
        bases: from `interaction_bases`, or others with as many entries.

    Returns:
        L matrices, `(d of layer l + 1, d of layer l)`.

    Raises:
        ValueError: unless there is one basis more than layers.

    Reference: Bushnaq et al., 2024, arXiv 2405.10928, with derivatives in place of integrated
    gradients.
    """
    if len(bases) != len(layers) + 1:
        raise ValueError(
            f"`bases` must be one more than `layers`, {len(layers) + 1}, got {len(bases)}."
        )
    return _interaction_edges(tuple(layers), inputs, list(bases))


def _whitening(activations: Array, threshold: Array) -> tuple[Array, Array, Array, Array]:
    """The mean, U D^{1/2}, U D^{-1/2} and D, with zeros for small D."""
    flat = activations.reshape(len(activations), -1)
    mean = jnp.mean(flat, 0)
    centred = flat - mean
    variances, vectors = _descending(centred.T @ centred / len(flat), threshold)
    kept = variances > 0
    inverse = jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, variances, 1)), 0)
    return mean, vectors * jnp.sqrt(variances), vectors * inverse, variances


def _descending(matrix: Array, threshold: Array) -> tuple[Array, Array]:
    """Eigenvalues, decreasing, and vectors; values below a fraction of the largest become 0."""
    values, vectors = jnp.linalg.eigh(matrix)
    values, vectors = values[::-1], vectors[:, ::-1]
    return jnp.where(values > threshold * values[0], values, 0), vectors


def _rows_of_jacobian(layer: Layer, h: Array, matrix: Array) -> Array:
    """d (matrix f(h)) / dh, `(k, d)`, from one vector-Jacobian product per row."""
    value, pull = jax.vjp(layer, h)
    rows = jax.vmap(lambda row: pull(row.reshape(value.shape).astype(value.dtype))[0])(matrix)
    return rows.reshape(len(matrix), -1)


@jax.default_matmul_precision("highest")
def _mean(f: Callable[[Array], PyTree], examples: Array) -> PyTree:
    """The mean of f over examples, one at a time: no more than one Jacobian is held."""

    def add(total, h):
        return total + f(h), None

    shape = jax.eval_shape(f, examples[0])
    total = jax.lax.scan(add, jnp.zeros(shape.shape, shape.dtype), examples)[0]
    return total / len(examples)


def _mean_metric(layer: Layer, activations: Array, matrix: Array) -> Array:
    """E[J^T J], `(d, d)`."""

    def metric(h):
        rows = _rows_of_jacobian(layer, h, matrix)
        return rows.T @ rows

    return _mean(metric, activations)
